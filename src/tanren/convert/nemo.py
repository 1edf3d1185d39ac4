"""NeMo checkpoints, 1 and 2: read and written from their tensors alone, without NeMo.

Their weights are a megatron-core distributed checkpoint, NeMo 2's in `weights` with `module.`
before each name, NeMo 1's in `model_weights` with `model.`. What is beside them is read in
nemo_config.py and written in nemo_context.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson
import torch

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import (
    archives,
    audit,
    folders,
    hf,
    llama,
    llama_config,
    mcore,
    nemo_config,
    nemo_context,
    torch_dist,
)
from tanren.convert.interchange import Made, Options, Say, amount, cast, sizes
from tanren.convert.tensors import Stored, Tensors, rows
from tanren.data import tokenizer as tokenizers

Format = Literal["nemo1", "nemo2"]
PREFIX: dict[Format, str] = {"nemo1": "model.", "nemo2": "module."}
_EMBEDDING = "embedding.word_embeddings.weight"
_VOCABULARY = (_EMBEDDING, "output_layer.weight")
_CONTEXT, _CONFIG = "context", "model_config.yaml"
_WEIGHTS: dict[Format, str] = {"nemo1": "model_weights", "nemo2": "weights"}
_ARCHIVE = ".nemo"
_GENERATION = "generation_config.json"
# Where each of them has the tokenizer's files, as we write it; NeMo 2 itself, too.
_TOKENIZER = {"nemo1": "tokenizer", "nemo2": "nemo_tokenizer"}
# Parts of a layer of which Transformer Engine keeps a state beside the weights: NeMo asks for that
# of each layer and does not load without. Of weights that are not FP8 it is None.
_WITH_STATE = ("self_attention.linear_qkv", "self_attention.core_attention",
               "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An open NeMo checkpoint. `tensors` are under megatron-core's names, of the model's shapes."""

    model: Model
    tensors: Tensors
    tokenizer: Path | None
    generation: Path | None


def hf_to_nemo(
    source: Path, target: Path, options: Options, say: Say, *, kind: Format = "nemo2"
) -> Made:
    """A Hugging Face folder to a NeMo checkpoint.

    Args:
        target: a folder, or for NeMo 1 a file that ends in .nemo; it appears when it is whole.
    Raises:
        RequestError: something is not right with the folders, the files or the model.
        WorkError: the disk did not take it.
    """
    archive = target.suffix == _ARCHIVE
    if archive and kind != "nemo1":
        raise RequestError(target, "NeMo 2 has no archives", "name a folder, or say --format nemo1")
    source = folders.read_from(source)
    final = (
        archives.write_to(target, force=options.force)
        if archive
        else folders.write_to(target, source, force=options.force)
    )
    config = hf.read_config(source)
    model = llama_config.model_of(config, source / "config.json")
    model = model.model_copy(update={"init_std": config.get("initializer_range", model.init_std)})
    with hf.open_model(source) as stored:
        audit.check_base(source, stored, model)
        tensors = llama.to_mcore(model, cast(stored, options.dtype), source)
        # An archive is packed from a folder beside it.
        folders.check_room(final, sizes(tensors) * (2 if archive else 1))
        say(f"writing {amount(model.parameters)} parameters")
        if archive:
            with archives.beside(final) as folder:
                _write(folder, kind, model, tensors, source, source)
                _verify(folder, source, model, options)
                archives.pack(folder, final)
        else:
            with folders.alone(final), runs.whole_folder(final) as partial:
                _write(partial, kind, model, tensors, source, final / _TOKENIZER[kind])
                _verify(partial, source, model, options)
    return Made(final, model.parameters, sum(sizes(tensors)))


def nemo_to_hf(
    source: Path, target: Path, options: Options, say: Say, *, like: Path | None = None
) -> Made:
    """A NeMo checkpoint of either kind to a Hugging Face folder.

    Args:
        source: what `open_checkpoint` takes.
        like: a Hugging Face folder whose config.json and tokenizer are the model's. Without it
            what NeMo itself states, and the tokenizer that it names.
    Raises:
        RequestError: something is not right with the folders, the files or the model.
        WorkError: the disk did not take it.
    """
    source = _file(source) or folders.read_from(source)
    final = folders.write_to(target, source, force=options.force)
    base = folders.read_from(like) if like else None
    with open_checkpoint(source, final, base) as there:
        tensors = cast(llama.to_hf(there.model, there.tensors, source), options.dtype)
        kinds = {one.dtype for one in tensors.stored.values()}
        if len(kinds) > 1:
            raise RequestError(
                source, f"holds tensors of {' and '.join(sorted(map(str, kinds)))}",
                "say which type they shall have: --dtype bf16 or fp32",
            )  # fmt: skip
        folders.check_room(final, sizes(tensors))
        say(f"writing {amount(there.model.parameters)} parameters")

        def verify(partial: Path) -> None:
            if options.verify is not None:
                options.verify(partial, cast(there.tensors, options.dtype), there.model, None)

        with folders.alone(final):
            hf.write_model(
                final, there.model, tensors, tokenizer=there.tokenizer, base=base,
                max_shard_bytes=options.max_shard_bytes,
                generation=there.generation if base is None else None, place=source, verify=verify,
            )  # fmt: skip
    return Made(final, there.model.parameters, sum(sizes(tensors)))


def _verify(folder: Path, source: Path, model: Model, options: Options) -> None:
    """Compare what was written with what it was made from, if that is asked for."""
    if options.verify is not None:
        written = _open(folder, folder, source)
        options.verify(source, written.tensors, model, hf.DTYPES.get(options.dtype or ""))


@contextmanager
def open_checkpoint(source: Path, scratch: Path, base: Path | None = None) -> Iterator[Checkpoint]:
    """A NeMo checkpoint: NeMo 2's folder, NeMo 1's folder or archive, or the folder of a run that
    holds one, `step=...-last` of it.

    Args:
        scratch: an archive is unpacked beside this.
        base: a Hugging Face folder of the model.
    Raises:
        RequestError: it is none, is not whole, or is no LLaMA.
    """
    if source.is_file():
        folders.check_room(scratch, [source.stat().st_size])
        with archives.unpacked(source, scratch) as folder:
            yield _open(folder, source, base)
    else:
        yield _open(source, source, base)


def _open(folder: Path, source: Path, base: Path | None) -> Checkpoint:
    if not (folder / _CONFIG).is_file() and not (folder / _CONTEXT).is_dir():
        # NeMo 2's runs have whole checkpoints below them.
        for below in (folder, folder / "checkpoints"):
            last = [one for one in sorted(below.glob("*-last")) if (one / _CONTEXT).is_dir()]
            if last:
                folder = _only(last, source)
                break
    context, config = folder / _CONTEXT, folder / _CONFIG
    if context.is_dir():
        tokenizer = base or _first(context / _TOKENIZER["nemo2"], context)
        model = nemo_config.read_nemo2(context, _size(tokenizer))
        weights, generation = folder / _WEIGHTS["nemo2"], context / "artifacts" / _GENERATION
    elif config.is_file():
        tokenizer = base or _tokenizer_of_nemo1(folder, source)
        model = nemo_config.read_nemo1(config, _size(tokenizer))
        weights, generation = folder / _WEIGHTS["nemo1"], folder / _GENERATION
        if not weights.is_dir():
            weights = _only(sorted(folder.glob("*-last")), source)
    else:
        raise RequestError(
            source,
            f"is no checkpoint of NeMo: neither {_CONTEXT}/ (of NeMo 2) nor {_CONFIG} (of NeMo 1)",
            "name the folder that holds it",
        )
    if base is not None:
        model = _agreed(model, base, source)
    return Checkpoint(
        model, _tensors(weights, model),
        tokenizer if tokenizer and _is_tokenizer(tokenizer) else None,
        generation if generation.is_file() else None,
    )  # fmt: skip


def _agreed(model: Model, base: Path, source: Path) -> Model:
    """The shape of the base, whose vocabulary may be another than the tokenizer's.

    Raises:
        RequestError: what NeMo states differs from it.
    """
    there = llama_config.model_of(hf.read_config(base), base / "config.json")
    changes = {"vocabulary_size": there.vocabulary_size, "init_std": model.init_std}
    stated = model.model_copy(update={"vocabulary_size": there.vocabulary_size})
    llama_config.check_same_shape(stated, there, source, base)
    return there.model_copy(update=changes)


def _file(path: Path) -> Path | None:
    found = path.expanduser()
    return found.resolve() if found.is_file() else None


def _is_tokenizer(path: Path) -> bool:
    return path.is_file() or tokenizers.is_there(path)


def _first(*folders: Path) -> Path | None:
    return next((one for one in folders if tokenizers.is_there(one)), None)


def _only(found: list[Path], source: Path) -> Path:
    if len(found) == 1:
        return found[0]
    if not found:
        raise RequestError(
            source, f"holds neither {_WEIGHTS['nemo1']} nor step=...-last: no weights",
            "bring the checkpoint again, whole",
        )  # fmt: skip
    raise RequestError(
        source, f"holds several: {', '.join(one.name for one in found)}",
        f"name one of them, or make one a link: ln -s {found[-1].name} {_WEIGHTS['nemo1']}",
    )  # fmt: skip


def _size(tokenizer: Path | None) -> int:
    """The vocabulary of a checkpoint that states none; without a tokenizer 0, which none has."""
    if tokenizer is None or not _is_tokenizer(tokenizer):
        return 0
    return tokenizers.read(tokenizer).size


def _tokenizer_of_nemo1(folder: Path, source: Path) -> Path | None:
    stated = nemo_config.tokenizer_of_nemo1(folder / _CONFIG)
    places = [folder / _TOKENIZER["nemo1"], folder]
    if stated is not None and stated.startswith("nemo:"):
        places.insert(0, folder / stated.removeprefix("nemo:"))
    elif stated is not None:
        places += [Path(stated), source.parent / stated]
    return next((one for one in places if _is_tokenizer(one)), None)


def _tensors(weights: Path, model: Model) -> Tensors:
    """The model's tensors, whatever stands before their names and however the vocabulary is padded.

    Raises:
        RequestError: they are not those of the model, or of another format.
    """
    if not (weights / ".metadata").is_file():
        about = weights / "metadata.json"
        kind = orjson.loads(about.read_bytes()).get("sharded_backend") if about.is_file() else None
        raise RequestError(
            weights / ".metadata",
            "is missing" if kind in (None, "torch_dist") else f"is missing: the format is {kind}",
            "bring the checkpoint again, whole; only torch_dist is read",
        )
    there = mcore.Checkpoint(weights)
    prefix = next(
        (name.removesuffix(_EMBEDDING) for name in there.stored if name.endswith(_EMBEDDING)), None
    )
    if any(".adapter" in name for name in there.stored):
        raise RequestError(
            weights, "holds adapters, which are not merged here",
            "merge them with NeMo first: llm.peft.merge_lora",
        )  # fmt: skip
    if prefix not in ("", "module.", "model.", "model.module."):
        raise RequestError(weights, f"holds no {_EMBEDDING}", "is it a GPT of megatron-core?")
    own = _Named(there, prefix)
    found = own.stored[_EMBEDDING].shape[0]
    if found < model.vocabulary_size:
        raise RequestError(
            weights,
            f"has {found} rows of embeddings, and the vocabulary is {model.vocabulary_size}",
            "is it the checkpoint's tokenizer?",
        )
    tensors = _Rows(own, model.padded_vocabulary)
    llama.check_tensors(tensors.stored, llama.mcore_shapes(model), weights)
    return tensors


def _write(
    folder: Path, kind: Format, model: Model, tensors: Tensors, source: Path, tokenizer: Path
) -> None:
    """Write a checkpoint's files.

    Args:
        tokenizer: where the tokenizer will be, for NeMo 1, which names it by its whole path.
    """
    weights = folder / _WEIGHTS[kind]
    weights.mkdir()
    # As many rows as the vocabulary, as NeMo's own importer has it.
    rows_of_vocabulary = _Rows(tensors, model.vocabulary_size)
    shapes = {name: rows_of_vocabulary.stored[name].shape for name in llama.mcore_shapes(model)}
    with audit.passing(rows_of_vocabulary, shapes, source) as passed:
        torch_dist.write(
            weights, passed, prefix=PREFIX[kind],
            empty=[f"{PREFIX[kind]}{name}" for name in _states(model)],
        )  # fmt: skip
    common = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.4.0", "state_dict": {},
              "optimizer_states": [], "lr_schedulers": []}  # fmt: skip
    torch.save(common, weights / "common.pt")
    (weights / "metadata.json").write_bytes(mcore.FORMAT)
    dtype = tensors.stored[_EMBEDDING].dtype
    there, generation = tokenizers.is_there(source), (source / _GENERATION).is_file()
    if kind == "nemo1":
        nemo_context.write_nemo1(folder / _CONFIG, model, dtype, str(tokenizer) if there else None)
        beside = folder
    else:
        beside = folder / _CONTEXT / "artifacts"
        (folder / _CONTEXT).mkdir()
        name = _TOKENIZER[kind] if there else None
        nemo_context.write_nemo2(folder / _CONTEXT, model, dtype, tokenizer=name,
                                generation=generation)  # fmt: skip
    if generation:
        beside.mkdir(exist_ok=True)
        shutil.copyfile(source / _GENERATION, beside / _GENERATION)
    if there:
        inside = folder if kind == "nemo1" else folder / _CONTEXT
        tokenizers.copy(source, inside / _TOKENIZER[kind])
        _name_for_nemo(inside / _TOKENIZER[kind] / "tokenizer_config.json")


def _name_for_nemo(place: Path) -> None:
    """transformers 5 writes a name of its own for a class that 4, NeMo's, has under another."""
    if not place.is_file():
        return
    about = orjson.loads(place.read_bytes())
    if about.get("tokenizer_class") == "TokenizersBackend":
        about["tokenizer_class"] = "PreTrainedTokenizerFast"
        place.write_bytes(orjson.dumps(about, option=orjson.OPT_INDENT_2))


def _states(model: Model) -> Iterator[str]:
    for part in _WITH_STATE:
        for layer in range(model.layers):
            yield f"{torch_dist.STACKED}{part}._extra_state/shard_{layer}_{model.layers}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


class _Named:
    """The tensors whose names begin with a prefix, without it."""

    def __init__(self, tensors: Tensors, prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix
        self.stored = {
            name.removeprefix(prefix): stored
            for name, stored in tensors.stored.items()
            if name.startswith(prefix)
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        return self._tensors.read(self._prefix + name, layer)

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        return rows(self._tensors, self._prefix + name, layer, start, stop)


class _Rows:
    """The same tensors with another number of rows of the vocabulary: padding is zeros."""

    def __init__(self, tensors: Tensors, count: int) -> None:
        self._tensors = tensors
        self.stored = {
            name: Stored((count, *one.shape[1:]), one.dtype) if name in _VOCABULARY else one
            for name, one in tensors.stored.items()
        }

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        if name in _VOCABULARY:
            return self.rows(name, layer, 0, self.stored[name].shape[0])
        return self._tensors.read(name, layer)

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> torch.Tensor:
        if name not in _VOCABULARY:
            return rows(self._tensors, name, layer, start, stop)
        end = self._tensors.stored[name].shape[0]
        there = rows(self._tensors, name, layer, min(start, end), min(stop, end))
        padding = max(stop, end) - max(start, end)
        return torch.cat([there, there.new_zeros(padding, there.shape[1])]) if padding else there
