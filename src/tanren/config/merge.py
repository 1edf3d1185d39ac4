"""A soup of models: mergekit's own settings, in which a model may be a stage's export.

What the methods do and which parameters they take, mergekit's documentation says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from tanren.config.fields import Job, NonNegative, Positive, Strict, one_key_mapping

_EXPORT = re.compile(
    r"(?:(?P<task>[A-Za-z0-9_][A-Za-z0-9._-]*)/)?"
    r"stage:(?P<run>[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<iteration>[1-9][0-9]*))?"
)


@dataclass(frozen=True)
class ExportReference:
    """`TASK/stage:RUN@ITERATION`: the run folder's own name, whatever the soup's variant and name.

    `task` is None for the soup's own task, `iteration` for the newest.
    """

    task: str | None
    run: str
    iteration: int | None


def export_named(model: str) -> ExportReference | None:
    """The export that a soup's model names; None for a folder or a repository of the hub."""
    found = _EXPORT.fullmatch(model)
    if found is None:
        return None
    iteration = found["iteration"]
    return ExportReference(found["task"], found["run"], int(iteration) if iteration else None)


def _readable(value: str) -> str:
    if "stage:" in value and export_named(value) is None:
        raise ValueError(
            f"{value} names no export: write stage:sft, stage:sft.VARIANT-NAME, stage:sft@500 or "
            "TASK/stage:sft"
        )
    return value


Model = Annotated[
    str, BeforeValidator(one_key_mapping), Field(min_length=1), AfterValidator(_readable)
]
Parameters = dict[str, JsonValue]
# Those of mergekit 0.1.5.
Method = Literal[
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della",
    "della_linear", "karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp",
    "passthrough", "ram", "ramplus_tl", "sce", "slerp", "task_arithmetic", "ties",
]  # fmt: skip
Dtype = Literal["float32", "bfloat16", "float16"]


class MergedModel(Strict):
    """A model whose tensors go in whole."""

    model: Model
    parameters: Parameters | None = None


class SliceSource(Strict):
    """Layers of a model: from the first of `layer_range` up to the second, which is not in it."""

    model: Model
    layer_range: tuple[NonNegative, Positive]
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def _some_layers(self) -> SliceSource:
        first, end = self.layer_range
        if first >= end:
            raise ValueError(f"layer_range [{first}, {end}] holds no layer")
        return self


Ingredient = TypeVar("Ingredient", MergedModel, SliceSource)


class Slice(Strict):
    """Layers of the result, made from as many layers of each source."""

    sources: tuple[SliceSource, ...]
    base_model: Model | None = None
    residual_weight: float | None = None
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def _some_source(self) -> Slice:
        if not self.sources:
            raise ValueError("sources are empty")
        return self


class Merge(Strict):
    """A model from several of one shape, by mergekit.

    `models` go in whole, `slices` put layers together. A model is `stage:sft` (the newest export of
    that run; `stage:sft@500`, `stage:sft.VARIANT-NAME`, `TASK/stage:sft`), `stage:convert` (the
    base), another soup (`stage:merge-NAME`), a folder, or `owner/name@revision` of the hub.

    `dtype` is what is computed in, `out_dtype` what is written; without it the same. With
    `tokenizer_source` (`union`, `base` or one of the models) tokenizers may differ. `seed` is for
    the methods that drop values at random.
    """

    merge_method: Method
    models: tuple[MergedModel, ...] = ()
    slices: tuple[Slice, ...] = ()
    base_model: Model | None = None
    parameters: Parameters | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: Model | None = None
    seed: NonNegative = 1234
    job: Job = Job()

    @model_validator(mode="after")
    def _one_kind_of_ingredients(self) -> Merge:
        if bool(self.models) == bool(self.slices):
            raise ValueError("state models or slices, and not both")
        source = self.tokenizer_source
        if source == "base" and self.base_model is None:
            raise ValueError("tokenizer_source: base needs base_model")
        if source not in (None, "base", "union") and source not in self.ingredients:
            raise ValueError(f"tokenizer_source {source} is none of the models")
        return self

    @property
    def ingredients(self) -> tuple[str, ...]:
        """Every model as it is written, each once: those that go in, then the base model."""
        return tuple(dict.fromkeys(self._written()))

    def _written(self) -> Iterator[str]:
        for one in self.models:
            yield one.model
        for part in self.slices:
            for source in part.sources:
                yield source.model
        bases = [part.base_model for part in self.slices]
        yield from (base for base in [self.base_model, *bases] if base is not None)

    def with_models(self, named: dict[str, str]) -> Merge:
        """The same with other names for its models, those of `named` by the old ones."""

        def new(model: str | None) -> str | None:
            return None if model is None else named.get(model, model)

        def renamed(one: Ingredient) -> Ingredient:
            return one.model_copy(update={"model": new(one.model)})

        slices = tuple(
            part.model_copy(update={
                "base_model": new(part.base_model), "sources": tuple(map(renamed, part.sources)),
            })
            for part in self.slices
        )  # fmt: skip
        return self.model_copy(update={
            "models": tuple(map(renamed, self.models)), "slices": slices,
            "base_model": new(self.base_model), "tokenizer_source": new(self.tokenizer_source),
        })  # fmt: skip
