"""Whether two forms of a model compute the same: logits on a CPU, a layer's weights at a time.

A Hugging Face folder runs through transformers' own modules, a checkpoint under megatron-core's
names through megatron-core's, both in fp32 and on the same tokens. Each side goes on from what it
computed itself, so that the last line is the difference of the logits.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from tanren.config.errors import RequestError, WorkError
from tanren.config.model import Model
from tanren.config.training import Layout
from tanren.convert import hf
from tanren.convert.tensors import Cast, Tensors, rows
from tanren.data import tokenizer as tokenizers

# Of the length of a token's vector. Layouts of one model differ by less than 1e-5 in fp32.
TOLERANCE = 1e-4
TOKENS = 48
# Rows of the vocabulary whose logits are made at a time.
_BLOCK = 16384
# Positions beyond: the angles of fp32 are no longer the same in two libraries.
_FARTHEST = 8192
_TEXT = (
    "The smith folds the steel twelve times, and it holds. 吾輩は猫である。名前はまだ無い。"
    "def f(x):\n    return x ** 2  # 二乗\n"
    "鍛錬とは千日の稽古を鍛とし、万日の稽古を錬とすることである。"
)


@dataclass(frozen=True)
class Difference:
    """How far two sides are apart at one place.

    Attributes:
        largest: the largest difference of an element.
        relative: the length of a token's difference over that of its vector; the largest of tokens.
    """

    where: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Report:
    """The differences in the order of the forward pass, up to the first beyond the tolerance."""

    differences: tuple[Difference, ...]
    tolerance: float
    tokens: int
    seconds: float

    @property
    def failed(self) -> Difference | None:
        """The place that differs; None where the two compute the same."""
        last = self.differences[-1]
        # Whatever compares with a NaN is false.
        return None if last.relative <= self.tolerance else last

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file or another process."""
        return asdict(self)


class Side(Protocol):
    """One form of a model. Vectors are [tokens, hidden], in fp32."""

    layers: int
    hidden: int
    vocabulary: int

    def embed(self, ids: torch.Tensor) -> torch.Tensor: ...

    def layer(self, number: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What one layer makes of the vectors: after its attention, and after its MLP."""
        ...

    def norm(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits of the pieces from start up to stop: [tokens, stop - start]."""
        ...


def on_cpu() -> None:
    """Keep this process off GPUs, and ready for megatron-core; before anything looked for one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not os.environ.get("TANREN_DEBUG"):
        # What megatron-core says of libraries that it does not find is nothing to whoever asked.
        warnings.simplefilter("ignore")
    from tanren.engine import cpu, eager

    cpu.hide_gpu_libraries()
    eager.import_megatron()


def comparison(
    place: object, show: Callable[[Report], None], watch: Callable[[str], None]
) -> Callable[[Path, Tensors, Model, torch.dtype | None], None]:
    """What a conversion is given to compare its two sides with; see convert/interchange.py.

    Args:
        place: what an error names.
        show: is given each report, also of a comparison that fails.
        watch: is told what is being compared.
    """

    def compare_both(
        folder: Path, tensors: Tensors, model: Model, dtype: torch.dtype | None
    ) -> None:
        ids = ids_for(folder if tokenizers.is_there(folder) else None, model)
        report = verify(
            folder, tensors, model, ids, place,
            dtype=dtype, watch=lambda where: watch("comparing " + " ".join(where.split()[:2])),
        )  # fmt: skip
        show(report)
        check(report, place)

    return compare_both


def verify(
    folder: Path, tensors: Tensors, model: Model, ids: list[int], place: object,
    *, dtype: torch.dtype | None = None, tolerance: float = TOLERANCE,
    watch: Callable[[str], None] = lambda doing: None,
) -> Report:  # fmt: skip
    """Compare a Hugging Face folder with a checkpoint under megatron-core's names.

    Peak memory does not depend on the number of layers. To be called where megatron-core runs on
    the CPU and is not in use otherwise: this changes torch for good, see engine/cpu.py.

    Args:
        ids: of the tokens, see `ids_for`.
        place: what an error names.
        dtype: what the folder's tensors are rounded to first; None leaves them as they are.
        watch: is told what is being compared.
    Raises:
        RequestError: the two have no forward pass in common (other numbers of layers, a tensor
            lacks).
    """
    with hf.open_model(folder) as read:
        at = positions(len(ids), model)
        one = Transformers(folder, read if dtype is None else Cast(read, dtype), at)
        other = Megatron(model, tensors, at)
        try:
            return compare(one, other, ids, place, tolerance=tolerance, watch=watch)
        finally:
            other.close()


def verify_hf(
    folder: Path, other: Path, model: Model, ids: list[int], place: object,
    *, tolerance: float = TOLERANCE, watch: Callable[[str], None] = lambda doing: None,
) -> Report:  # fmt: skip
    """Compare two Hugging Face folders; see `verify`."""
    at = positions(len(ids), model)
    with hf.open_model(folder) as read, hf.open_model(other) as read_other:
        return compare(
            Transformers(folder, read, at), Transformers(other, read_other, at), ids, place,
            tolerance=tolerance, watch=watch,
        )  # fmt: skip


@torch.no_grad()
def compare(
    one: Side, other: Side, ids: list[int], place: object,
    *, tolerance: float, watch: Callable[[str], None] = lambda doing: None,
) -> Report:  # fmt: skip
    """Run both sides until they differ by more than the tolerance, or to the end."""
    began = time.monotonic()
    for name in ("layers", "hidden", "vocabulary"):
        if getattr(one, name) != getattr(other, name):
            raise RequestError(
                place,
                f"the two models have {getattr(one, name)} and {getattr(other, name)} "
                f"{'pieces' if name == 'vocabulary' else name}",
                "compare two forms of one model",
            )
    found: list[Difference] = []
    for difference in _differences(one, other, torch.tensor(ids)):
        found.append(difference)
        watch(difference.where)
        if not difference.relative <= tolerance:
            break
    return Report(tuple(found), tolerance, len(ids), time.monotonic() - began)


def check(report: Report, place: object) -> None:
    """Refuse a conversion whose two sides do not compute the same.

    Raises:
        WorkError: the message names the first place that differs.
    """
    if report.failed is not None:
        raise WorkError(
            place,
            f"{report.failed.where} computes something else than in the model that it was made "
            f"of: by {report.failed.relative:.1e} of a token's vector, and {report.tolerance:.0e} "
            "is the rounding of fp32",
            "use neither until it is known which of the two is right; this is a bug of the "
            "conversion, or config.json is not true of its tensors",
        )


def ids_for(tokenizer: Path | None, model: Model, count: int = TOKENS) -> list[int]:
    """The tokens of a fixed text; where there is no tokenizer, drawn from a fixed seed."""
    if tokenizer is not None:
        read = tokenizers.read(tokenizer)
        ids = [*([] if read.bos is None else [read.bos]), *read.encode([_TEXT])[0].tolist()]
        return [one for one in ids if one < model.vocabulary_size][:count]
    generator = torch.Generator().manual_seed(0)
    drawn: list[int] = torch.randint(model.vocabulary_size, (count,), generator=generator).tolist()
    return drawn


def positions(count: int, model: Model) -> torch.Tensor:
    """Where the tokens stand: close together at first, then ever farther apart.

    So the slow channels of the rotary embedding turn, too; only they tell its scalings apart.
    """
    farthest = min(model.max_positions, _FARTHEST) - 1
    steps = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    spread = (steps**3 * max(farthest - count, 0)).long()
    return torch.arange(count) + spread


def _differences(one: Side, other: Side, ids: torch.Tensor) -> Iterator[Difference]:
    ours, theirs = one.embed(ids), other.embed(ids)
    yield _difference("embedding", ours, theirs)
    for number in range(one.layers):
        (attended, ours), (attended_there, theirs) = (
            side.layer(number, hidden) for side, hidden in ((one, ours), (other, theirs))
        )
        yield _difference(f"layer {number} attention", attended, attended_there)
        yield _difference(f"layer {number} MLP", ours, theirs)
    ours, theirs = one.norm(ours), other.norm(theirs)
    yield _difference("final norm", ours, theirs)
    largest = torch.zeros(())
    squares = torch.zeros((2, len(ids)), dtype=torch.float64)
    for start in range(0, one.vocabulary, _BLOCK):
        stop = min(start + _BLOCK, one.vocabulary)
        logits = one.logits(ours, start, stop)
        apart = logits - other.logits(theirs, start, stop)
        largest = torch.maximum(largest, apart.abs().max())
        squares += torch.stack([apart.double().square().sum(1), logits.double().square().sum(1)])
    yield Difference("logits", float(largest), _relative(*squares.sqrt()))


def _difference(where: str, ours: torch.Tensor, theirs: torch.Tensor) -> Difference:
    apart = ours - theirs
    lengths = apart.double().norm(dim=1), ours.double().norm(dim=1)
    return Difference(where, float(apart.abs().max()), _relative(*lengths))


def _relative(apart: torch.Tensor, length: torch.Tensor) -> float:
    # Of two zeros too: an embedding that was never trained.
    return float((apart / length.clamp_min(torch.finfo(torch.float64).tiny)).max())


class Transformers:
    """A Hugging Face folder, by the modules that transformers makes of its config.json."""

    def __init__(self, folder: Path, tensors: Tensors, at: torch.Tensor) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self._tensors = tensors
        config = AutoConfig.from_pretrained(folder)
        # The modules alone: a meta device gives them no memory.
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        self._model.eval()
        core = self._model.model
        self.layers, self.hidden = len(core.layers), int(config.hidden_size)
        self.vocabulary = int(config.vocab_size)
        self._head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self._at = at[None]
        rotary = type(core.rotary_emb)(config)
        self._rotary = rotary(torch.zeros(1, dtype=torch.float32), self._at)
        count = len(at)
        self._mask = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)[None, None]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._tensors.read("model.embed_tokens.weight")[ids].float()

    def layer(self, number: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        module = self._model.model.layers[number]
        prefix = f"model.layers.{number}."
        weights = {name: self._tensors.read(prefix + name).float() for name in module.state_dict()}
        module.load_state_dict(weights, assign=True)
        attended: list[torch.Tensor] = []
        hook = module.post_attention_layernorm.register_forward_pre_hook(
            lambda _, given: attended.append(given[0])
        )
        result = module(
            hidden[None],
            attention_mask=self._mask,
            position_ids=self._at,
            position_embeddings=self._rotary,
        )
        hook.remove()
        module.to("meta")
        return attended[0][0], result[0]

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        module = self._model.model.norm
        module.load_state_dict(
            {"weight": self._tensors.read("model.norm.weight").float()}, assign=True
        )
        result: torch.Tensor = module(hidden)
        return result

    def logits(self, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return F.linear(hidden, rows(self._tensors, self._head, None, start, stop).float())


class Megatron:
    """A checkpoint under megatron-core's names, by its TransformerLayer with the local spec."""

    def __init__(self, model: Model, tensors: Tensors, at: torch.Tensor) -> None:
        from tanren.engine import distributed

        distributed.initialize(Layout(), "cpu", seed=0)
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
        from megatron.core.transformer.spec_utils import build_module

        from tanren.engine import cpu
        from tanren.engine.model import scale_rotary, transformer_config

        self._leave = distributed.finalize
        self.layers, self.hidden = model.layers, model.hidden_size
        self.vocabulary = model.vocabulary_size
        self._tensors = tensors
        self._head = (
            "embedding.word_embeddings.weight" if model.tied_embeddings else "output_layer.weight"
        )
        config = transformer_config(
            model.model_copy(update={"layers": 1}), Layout(), precision="fp32"
        )
        config.perform_initialization = False
        spec = cpu.block_spec(config).layer_specs[0]
        # One layer, which is each of the model's in turn.
        self._layer: Any = build_module(spec, config=config, layer_number=1)
        self._layer.eval()
        self._names: dict[str, str] = spec.submodules.sharded_state_dict_keys_map
        self._norm = cpu.RMSNorm(config, model.hidden_size, model.norm_epsilon)
        rotary = RotaryEmbedding(
            model.head_width, 1.0, rotary_base=model.rotary_base, use_cpu_initialization=True
        )
        scale_rotary(rotary, model.rope_scaling)
        self._rotary = rotary(int(at[-1]) + 1)[at]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._tensors.read("embedding.word_embeddings.weight")[ids].float()

    def layer(self, number: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for name, weight in self._layer.named_parameters():
            weight.copy_(self._tensors.read(f"decoder.layers.{self._stored(name)}", number))
        attended: list[torch.Tensor] = []
        hook = self._layer.pre_mlp_layernorm.register_forward_pre_hook(
            lambda _, given: attended.append(given[0])
        )
        result, _ = self._layer(hidden[:, None], attention_mask=None, rotary_pos_emb=self._rotary)
        hook.remove()
        return attended[0][:, 0], result[:, 0]

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        self._norm.weight.copy_(self._tensors.read("decoder.final_layernorm.weight"))
        result: torch.Tensor = self._norm(hidden)
        return result

    def logits(self, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return F.linear(hidden, rows(self._tensors, self._head, None, start, stop).float())

    def close(self) -> None:
        """Leave the process group."""
        self._leave()

    def _stored(self, name: str) -> str:
        """What a checkpoint calls a parameter: the local layers' norms stand on their own."""
        for here, there in self._names.items():
            if name.startswith(here):
                return there + name.removeprefix(here)
        return name
