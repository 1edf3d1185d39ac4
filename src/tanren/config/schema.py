"""What a recipe may say: strict, frozen models, one a stage.

Units are in the names. Unknown keys are errors. Nothing here reads a file or knows a site.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tanren.config.data import Preprocess
from tanren.config.fields import (
    Job,
    NonNegative,
    Positive,
    StageReference,
    Strict,
    one_key_mapping,
    one_or_many,
)
from tanren.config.merge import Merge
from tanren.config.training import Dpo, Midtrain, Sft


class Convert(Strict):
    """A Hugging Face base to a megatron-core checkpoint.

    `source` is `hf:PATH-or-repo`, or `random` for a base that the recipe makes itself.
    """

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    source: Annotated[str, BeforeValidator(one_key_mapping), Field(pattern=r"^(random|hf:\S.*)$")]
    tokenizer: StageReference | None = None
    seed: NonNegative = 1234
    job: Job = Job()

    @model_validator(mode="after")
    def _random_needs_tokenizer(self) -> Convert:
        if self.source == "random" and self.tokenizer is None:
            raise ValueError("source: random needs tokenizer: stage:preprocess")
        return self


class Export(Strict):
    """A trained checkpoint to a Hugging Face folder, with a generated sample.

    The sample goes on from `prompt`; a model of sft or dpo answers `question` instead. Adapters are
    merged into the weights, or written as a PEFT folder beside the base (`adapters: peft`).
    """

    of: StageReference
    iteration: Positive | Literal["latest"] = "latest"
    dtype: Literal["bf16", "fp32"] = "bf16"
    adapters: Literal["merged", "peft"] = "merged"
    prompt: str = ""
    question: str = ""
    sample_tokens: NonNegative = 0
    job: Job = Job()

    @model_validator(mode="after")
    def _sample_has_a_prompt(self) -> Export:
        if self.sample_tokens and not (self.prompt or self.question):
            raise ValueError("sample_tokens needs a prompt to go on from, or a question to answer")
        return self


class Evaluation(Strict):
    """Scores of an export by lm-evaluation-harness.

    `tasks` are the harness's own or local ones: the YAML files, of the harness's own form, in
    `task_folder`, which is looked for from the recipe's folder; paths in them are from there.
    `chat` asks by the chat template: when it is not said, models of sft and dpo are asked so.
    `limit` takes the first examples of each task. `offline` keeps the harness from the hub, where
    tasks of its own have their data.
    """

    of: StageReference
    iteration: Positive | Literal["latest"] = "latest"
    tasks: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9][^\s,=]*$")], ...],
        BeforeValidator(one_or_many),
        Field(min_length=1),
    ]
    task_folder: str | None = None
    limit: Positive | None = None
    shots: NonNegative | None = None
    chat: bool | None = None
    batch_size: Positive = 8
    offline: bool = True
    seed: NonNegative = 1234
    job: Job = Job()


Recipe = Preprocess | Convert | Midtrain | Sft | Dpo | Export | Merge | Evaluation

STAGES: dict[str, type[Strict]] = {
    "preprocess": Preprocess,
    "convert": Convert,
    "midtrain": Midtrain,
    "sft": Sft,
    "dpo": Dpo,
    "export": Export,
    "merge": Merge,
    "eval": Evaluation,
}
