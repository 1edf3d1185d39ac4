"""What a recipe may say: strict, frozen models, one a stage.

Units are in the names. Unknown keys are errors. Nothing here reads a file or knows a site.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tanren.config.data import Preprocess
from tanren.config.fields import Job, NonNegative, Positive, StageReference, Strict, one_key_mapping
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


Recipe = Preprocess | Convert | Midtrain | Sft | Dpo | Export

STAGES: dict[str, type[Strict]] = {
    "preprocess": Preprocess,
    "convert": Convert,
    "midtrain": Midtrain,
    "sft": Sft,
    "dpo": Dpo,
    "export": Export,
}
