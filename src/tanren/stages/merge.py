"""A soup: one Hugging Face model from several, by mergekit, in mergekit's own environment.

mergekit makes the tensors. The folder around them is made here, since mergekit takes config.json,
tokenizer and template from a model that it chooses by chance where no base model is named.
"""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import audit, hf
from tanren.data import hub
from tanren.data import tokenizer as tokenizers
from tanren.plan.plan import MergePlan, digest

logger = logging.getLogger("tanren")
Folders = dict[str, Path]
Pieces = dict[str, int]
# What tensors' shapes follow from; what else a config.json says may differ.
_SHAPE = ("layers", "hidden_size", "ffn_hidden_size", "attention_heads", "kv_groups", "head_width",
          "tied_embeddings", "vocabulary_size")  # fmt: skip
_BESIDE = ("max_positions", "rotary_base", "rope_scaling", "norm_epsilon")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def run(plan: MergePlan, attempt: int) -> None:
    """Make `hf/merged` in the run folder.

    Raises:
        RequestError: the models do not go together, or not by this method.
    """
    recipe, place = plan.recipe, plan.recipe_file
    folders = {model: _located(model, folder) for model, folder in plan.folders.items()}
    for model, folder in folders.items():
        logger.info("%s is %s", model, folder)
    shapes = {model: audit.check_hf(folder, values=False) for model, folder in folders.items()}
    _check_shapes(plan, shapes)
    pieces = {model: _pieces(folder) for model, folder in folders.items()}
    if recipe.tokenizer_source is None:
        _check_tokenizers(pieces, place)
    donor = _donor(plan, folders)
    target = plan.folder.hf_merged
    with runs.whole_folder(target) as partial:
        _merge(plan, folders, partial)
        _finish(plan, partial, folders, pieces, donor)
        shape = audit.check_hf(partial, place=target)
    runs.mark_done(
        plan.folder,
        {
            "identity": digest(plan.settings),
            "hf": str(target),
            "model": orjson.loads(shape.model_dump_json()),
            "tokenizer_of": donor,
            "chat": has_template(target),
            "models": {model: str(folder) for model, folder in folders.items()},
            "mergekit": metadata.version("mergekit"),
        },
    )


def _located(model: str, folder: str | None) -> Path:
    assert folder is not None, model
    return Path(folder) if folder.startswith("/") else hub.find(hub.model_of(folder)).folder


def _check_shapes(plan: MergePlan, shapes: dict[str, Model]) -> None:
    """Refuse models whose tensors have different shapes, and layers that a model has not."""
    recipe, place = plan.recipe, plan.recipe_file
    free = {"layers"} if recipe.slices else set()
    free |= {"vocabulary_size"} if recipe.tokenizer_source else set()
    (first, there), *others = shapes.items()
    for model, here in others:
        differing = _differing(here, there, [key for key in _SHAPE if key not in free])
        if differing:
            raise RequestError(
                f"{place}: {model}",
                f"is of another shape than {first}: {'; '.join(differing)}",
                "a soup is made of models that come from one base",
            )
        if beside := _differing(here, there, _BESIDE):
            logger.warning("%s is not as %s: %s", model, first, "; ".join(beside))
    for part in recipe.slices:
        for one in part.sources:
            layers = shapes[one.model].layers
            if one.layer_range[1] > layers:
                raise RequestError(
                    f"{place}: layer_range {list(one.layer_range)}",
                    f"goes beyond the {layers} layers of {one.model}",
                    f"the second number is at most {layers}",
                )


def _differing(here: Model, there: Model, keys: Any) -> list[str]:
    return [
        f"{key} {getattr(here, key)} instead of {getattr(there, key)}"
        for key in keys
        if getattr(here, key) != getattr(there, key)
    ]


def _pieces(folder: Path) -> Pieces | None:
    """Every piece of a folder's tokenizer with its id; None where there is none."""
    if not tokenizers.is_there(folder):
        return None
    return tokenizers.read(folder).backend.pieces()


def _check_tokenizers(pieces: dict[str, Pieces | None], place: str) -> None:
    """Refuse models of which a row of the embedding does not stand for the same piece in each."""
    known = [(model, own) for model, own in pieces.items() if own is not None]
    if not known:
        return
    (first, there), *others = known
    for model, here in others:
        other = sorted({*there.items()} ^ {*here.items()})
        if other:
            piece = other[0][0]
            raise RequestError(
                f"{place}: {model}",
                f"has another tokenizer than {first}: {piece!r} is {here.get(piece, 'no piece')} "
                f"here and {there.get(piece, 'no piece')} there",
                "tokenizer_source: union, base, or one of the models, moves the rows of the "
                "embedding to where the pieces are",
            )


def _donor(plan: MergePlan, folders: Folders) -> str:
    """The model that gives tokenizer, chat template and generation config.

    The one that tokenizer_source names, else the first that has a chat template, else the first
    with a tokenizer.
    """
    source = plan.recipe.tokenizer_source
    if source == "base":
        assert plan.recipe.base_model is not None
        return plan.recipe.base_model
    if source not in (None, "union"):
        assert source is not None
        return source
    carrying = [model for model, folder in folders.items() if tokenizers.is_there(folder)]
    if not carrying:
        raise RequestError(
            f"{plan.recipe_file}: models", "none of them carries a tokenizer",
            "put the tokenizer's files into the folder of one",
        )  # fmt: skip
    with_template = [model for model in carrying if has_template(folders[model])]
    return (with_template or carrying)[0]


def has_template(folder: Path) -> bool:
    """Whether a folder's tokenizer has a chat template, in a file of its own or in its settings."""
    settings = runs.read_json(folder / "tokenizer_config.json") or {}
    return (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))


def _merge(plan: MergePlan, folders: Folders, target: Path) -> None:
    """Have mergekit write the tensors, its config.json, and a tokenizer where it moved rows."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    asked = settings(plan, folders)
    runs.write_json(plan.folder.mergekit, asked)
    logger.info("mergekit %s: %s", metadata.version("mergekit"), plan.recipe.merge_method)
    options = MergeOptions(
        copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=plan.recipe.seed,
        out_shard_size=hf.MAX_SHARD_BYTES,
    )  # fmt: skip
    try:
        run_merge(MergeConfiguration.model_validate(asked), str(target), options)
    except (RuntimeError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        said = str(error).strip().splitlines()
        raise RequestError(
            f"{plan.recipe_file}: merge_method {plan.recipe.merge_method}",
            f"mergekit refuses it: {said[0] if said else type(error).__name__}",
            "its documentation says which parameters a method takes, and whether base_model",
        ) from error


def settings(plan: MergePlan, folders: Folders) -> dict[str, Any]:
    """What mergekit is asked for, with paths as they are: one with @ or + in it is no reference."""

    def path(model: str) -> dict[str, Any]:
        return {"model": {"path": str(folders[model])}}

    asked: dict[str, Any] = plan.recipe.model_dump(
        mode="json", exclude={"seed", "job"}, exclude_none=True
    )
    del asked["slices" if asked["models"] else "models"]  # the empty one
    for part in [asked, *asked.get("slices", ())]:
        for one in [*part.get("models", ()), *part.get("sources", ())]:
            one["model"] = path(one["model"])
        if "base_model" in part:
            part["base_model"] = path(part["base_model"])
    if asked.get("tokenizer_source", "base") not in ("base", "union"):
        asked["tokenizer_source"] = path(asked["tokenizer_source"])
    return asked


def _finish(
    plan: MergePlan, target: Path, folders: Folders, pieces: dict[str, Pieces | None], donor: str
) -> None:
    """config.json, generation_config.json and the tokenizer of the result.

    config.json is the base model's, or the first one's, with the layers, the vocabulary and the
    type of the result.
    """
    recipe = plan.recipe
    like = recipe.base_model or recipe.ingredients[0]
    made, config = hf.read_config(target), hf.read_config(folders[like])
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    config |= {key: made[key] for key in ("num_hidden_layers", "vocab_size")}
    config["torch_dtype"] = _dtype_of(target)
    generation = runs.read_json(folders[donor] / "generation_config.json") or {}
    if recipe.tokenizer_source != "union":
        # As it was, and not as mergekit would write it.
        for pattern in hub.TOKENIZER_FILES:
            for path in target.glob(pattern):
                path.unlink()
        tokenizers.copy(folders[donor], target)
        now = pieces[donor]
    else:
        now = _pieces(target)
        template = folders[donor] / "chat_template.jinja"
        if template.is_file():
            (target / template.name).write_bytes(template.read_bytes())
    _renumber(config, pieces[like], now)
    _renumber(generation, pieces[donor], now)
    for file, value in (("config.json", config), ("generation_config.json", generation)):
        (target / file).write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))
    # safetensors lets the owner alone read what it writes.
    for path in target.glob("*.safetensors"):
        path.chmod((target / "config.json").stat().st_mode)


def _dtype_of(folder: Path) -> str:
    """The type of the tensors; of several the most frequent one, and the gate names the others."""
    with hf.open_model(folder) as tensors:
        types = [str(stored.dtype).removeprefix("torch.") for stored in tensors.stored.values()]
    return max(set(types), key=types.count)


def _renumber(values: dict[str, Any], before: Pieces | None, now: Pieces | None) -> None:
    """Give special tokens the ids that they have in the result's tokenizer."""
    if before is None or now is None or before == now:
        return
    names = {number: piece for piece, number in before.items()}

    def new(number: Any) -> Any:
        return now.get(names.get(number, ""), number)

    for key in _SPECIAL:
        if values.get(key) is not None:
            old = values[key]
            values[key] = [new(one) for one in old] if isinstance(old, list) else new(old)
