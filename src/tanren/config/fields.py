"""What the fields of all recipes are made of: strict models, numbers, references."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Strict(BaseModel):
    """Base of every model: no unknown key, no change after reading, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
# Of a source. Its token files lie in folders where the name has a /, and never outside of them.
SOURCE_NAME = rf"^{_PART}(/{_PART})*$"

# Of an environment variable that holds a key or a token: its value is written nowhere.
SECRET_NAME = r"(?i)(KEY|TOKEN|SECRET|PASSWORD|PASSPHRASE)S?$"


def one_key_mapping(value: Any) -> Any:
    """`init: {hf: PATH}` and `init: hf:PATH` say the same."""
    if isinstance(value, dict) and len(value) == 1:
        ((kind, target),) = value.items()
        return f"{kind}:{target}" if isinstance(target, str) else value
    return value


def one_or_many(value: Any) -> Any:
    """`targets: all` and `targets: [all]` say the same."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


StageReference = Annotated[
    str, BeforeValidator(one_key_mapping), Field(pattern=r"^stage:[A-Za-z0-9._-]+$")
]
BASE_PATTERN = r"^(scratch|given|(hf|checkpoint):\S.*|stage:[A-Za-z0-9._-]+)$"
# What a pattern means, for errors.
FORMS = {
    BASE_PATTERN: "hf:FOLDER, hf:OWNER/NAME, checkpoint:FOLDER/iter_0000500, stage:NAME, scratch "
    "or given",
}
Base = Annotated[str, BeforeValidator(one_key_mapping), Field(pattern=BASE_PATTERN)]
# A repository of the Hugging Face hub at a revision (a commit, a tag or a branch; main without).
HUB_REFERENCE = (
    r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._/-]*)?$"
)
HubReference = Annotated[str, Field(pattern=HUB_REFERENCE)]


class Job(Strict):
    """What a stage asks a scheduler for; the command line (NODES=, HOURS=, TYPE=) goes first.

    `type` is one of the site's; without it the site's type for GPUs or for CPUs. `save_minutes`
    before the end of the walltime training stops, to save: without it 10, or 15 % of a short job.
    A step that takes longer than `hang_minutes` ends the run, with the stacks of its ranks.
    """

    nodes: Positive = 1
    walltime_hours: PositiveFloat = 1.0
    type: str | None = None
    save_minutes: PositiveFloat | None = None
    hang_minutes: PositiveFloat = 30.0
