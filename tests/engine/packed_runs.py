"""Run by test_packed.py in processes of their own: engine/cpu.py changes torch for good.

The same micro batches through transformers, through GPTModel's own forward pass, and packed, in
several layouts. Each run leaves what it found in a file of the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tanren.config.model import Model
from tanren.config.training import Layout
from tanren.convert.tensors import Held
from tanren.data.packing import collate
from tanren.engine import distributed
from tests.convert.held import whole

WIDTH, ROWS = 24, 2
COMMON = {
    "layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "attention_heads": 4, "kv_groups": 2,
    "vocabulary_size": 203, "max_positions": 64, "rotary_base": 10000.0, "norm_epsilon": 1e-5,
    "init_std": 0.1,
}  # fmt: skip
# Of 256 columns 53 are padding: with tensor parallelism all of them are the second rank's.
SHAPES = {name: Model.model_validate(COMMON | {"tied_embeddings": tied})
          for name, tied in (("untied", False), ("tied", True))}  # fmt: skip
LAYOUTS = {
    "tensor": Layout(tensor=2),
    "sequence": Layout(tensor=2, sequence_parallel=True),
    "pipeline": Layout(pipeline=2),
    "sequence, recomputed": Layout(tensor=2, sequence_parallel=True, recompute="full"),
}
Batch = dict[str, torch.Tensor]
Found = dict[str, Any]


class Text(NamedTuple):
    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]


def texts() -> list[Text]:
    """Of lengths 9, 7, 8, 5, 12 and 24; about half of their tokens are trained on."""
    numbers = np.random.default_rng(3)
    return [
        Text(numbers.integers(1, 203, length + 1, dtype=np.int32), numbers.random(length + 1) < 0.5)
        for length in (9, 7, 8, 5, 12, 24)
    ]


def micro_batches() -> list[Batch]:
    """A row without padding and one with; a row of one example and an empty one; nothing."""
    a, b, c, d, e, f = texts()
    batches: list[list[list[Text]]] = [[[a, b, c], [d, e]], [[f], []], [[], []]]
    return [collate(rows, WIDTH) for rows in batches]


def start(layout: Layout) -> None:
    """The process groups of a layout; those of the one before end."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    distributed.initialize(layout, "cpu", seed=1)


def model_of(shape: Model, layout: Layout, folder: Path, precision: str = "fp32") -> Any:
    """This rank's part of the model with the base's weights."""
    from tanren.engine import model as models
    from tanren.engine.checkpoint import load_base

    config = models.transformer_config(shape, layout, precision=precision)
    model = models.build(shape, config)
    load_base(model, folder / "mcore", "recipe.yaml")
    return model


def through_transformers(shape: Model, folder: Path) -> Found:
    """A random base, converted; each text on its own through transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tanren.convert import llama, llama_config
    from tanren.stages import convert

    torch.manual_seed(7)
    model: Any = LlamaForCausalLM(LlamaConfig.from_dict(llama_config.config_of(shape))).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder / "hf")
    convert.convert_base(folder / "hf", shape, folder / "mcore", "recipe.yaml")
    losses, means = [], []
    for text in texts():
        tokens, trained = torch.from_numpy(text.tokens).long(), torch.from_numpy(text.trained)
        logits = model(tokens[None, :-1]).logits[0]
        losses.append(F.cross_entropy(logits, tokens[1:], reduction="none")[trained[1:]])
        labels = tokens.where(trained, -100)
        means.append(model(tokens[None], labels=labels[None]).loss.detach())
    torch.cat(losses).mean().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return {
        "losses": [one.detach() for one in losses],
        "means": torch.stack(means),
        "gradients": whole(llama.to_mcore(shape, Held(gradients))),
    }


def one_by_one(shape: Model, folder: Path) -> Found:
    """Each text on its own through GPTModel's forward pass: logits everywhere, no padding."""
    model = model_of(shape, Layout(), folder)
    losses = []
    for text in texts():
        tokens = torch.from_numpy(text.tokens).long()[None]
        places = torch.arange(tokens.size(1) - 1)[None]
        everywhere = model(tokens[:, :-1], places, None, labels=tokens[:, 1:])
        losses.append(everywhere[0, torch.from_numpy(text.trained)[1:]])
    torch.cat(losses).mean().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return {"losses": [one.detach() for one in losses], "gradients": gradients}


class SegmentsOnly(torch.nn.Module):
    """What Transformer Engine's attention makes of packed sequences (thd), on a CPU."""

    def forward(
        self, query: Any, key: Any, value: Any, attention_mask: None, *, packed_seq_params: Any,
        **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Query [tokens, heads, d], key and value [tokens, groups, d]: to [tokens, heads x d]."""
        bounds = packed_seq_params.cu_seqlens_q
        lengths = bounds.diff().tolist()
        assert packed_seq_params.qkv_format == "thd"
        assert bounds.dtype == torch.int32
        assert max(lengths) == packed_seq_params.max_seqlen_q == packed_seq_params.max_seqlen_kv
        assert attention_mask is None
        seen = [
            F.scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in parts), is_causal=True, enable_gqa=True
            )[0].transpose(0, 1)
            for parts in zip(
                *(one.split(lengths) for one in (query, key, value)), strict=True
            )
        ]  # fmt: skip
        return torch.cat(seen).flatten(1)


def step(
    shape: Model, layout: Layout, folder: Path,
    *, thd: bool = False, known: bool = True, overlap: bool = False,
) -> Found:  # fmt: skip
    """One global batch as the training loop takes it: losses, report, this rank's gradients.

    Args:
        known: tell the model beforehand what each loss counts, as SFT does, and DPO cannot.
        overlap: reduce gradients as soon as the last micro batch has made them, as on GPUs.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from tanren.engine import head, packed
    from tanren.engine import model as models
    from tanren.engine.loss import answer_loss

    # The 29 positions of the first micro batch in eight parts.
    head.CHUNK = 4
    bare = model_of(shape, layout, folder)
    shape_of_batch = packed.schedule_shape(ROWS, WIDTH)
    if thd:
        bare.takes_sequences = True
        shape_of_batch = (ROWS * WIDTH, 1)
        for layer in bare.decoder.layers:
            layer.self_attention.core_attention = SegmentsOnly()
    if overlap:
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=True, bucket_size=4096
        )
        model = DistributedDataParallel(bare.config, settings, bare)
        model.config.no_sync_func = model.no_sync
    else:
        model = models.wrap_for_training(bare)
    model.config.finalize_model_grads_func = finalize_model_grads
    losses: list[torch.Tensor] = []

    def forward_step(data: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(data)
        output = packed.packed_forward(batch, model, batch["weights"] if known else None)
        losses.append(output.detach().clone())
        return output, partial(answer_loss, batch["weights"])

    model.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches()),
        model=[model],
        num_microbatches=3,
        seq_length=shape_of_batch[0],
        micro_batch_size=shape_of_batch[1],
        forward_only=False,
    )
    offset = shape.layers // layout.pipeline * (dist.get_rank() if layout.pipeline > 1 else 0)
    return {
        "losses": losses if reports else None,
        "report": sum(reports) if reports else None,
        "gradients": {
            number_layer(name, offset): weight.main_grad.clone()
            for name, weight in bare.named_parameters()
        },
    }


def number_layer(name: str, offset: int) -> str:
    """A parameter's name with its layer counted from the model's first."""
    head, dot, tail = name.partition("layers.")
    if not dot:
        return name
    number, _, rest = tail.partition(".")
    return f"{head}layers.{int(number) + offset}.{rest}"


def losses_of(model: Any, rows: list[list[Text]]) -> list[torch.Tensor]:
    """The losses of each example of a micro batch of these rows."""
    from tanren.engine.packed import packed_forward

    batch = collate(rows, WIDTH)
    with torch.no_grad():
        losses = packed_forward(batch, model)
    return [losses[batch["examples"] == number] for number in range(sum(map(len, rows)))]


def examples_apart(folder: Path) -> Found:
    """What an example's losses depend on: its neighbours, its place."""
    model = model_of(SHAPES["untied"], Layout(), folder)
    a, b, c, d, _, _ = texts()
    other = Text((b.tokens + 7) % 203, b.trained)
    turns: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(
        lambda _, __, given: turns.append(given["rotary_pos_emb"]), with_kwargs=True
    )
    return {
        "before": losses_of(model, [[a, b, c], [d]]),
        "after": losses_of(model, [[a, other, c], [d]]),
        "moved": losses_of(model, [[d, c], [b, a]]),
        "turns": turns[0],
        "turns from the start": model.rotary_pos_emb(WIDTH),
    }


def empty(folder: Path) -> Found:
    """A micro batch with nothing to train on."""
    from tanren.engine.loss import answer_loss
    from tanren.engine.packed import packed_forward

    model = model_of(SHAPES["untied"], Layout(), folder)
    batch = collate([[], []], WIDTH)
    found = answer_loss(batch["weights"], packed_forward(batch, model))
    found[0].backward()
    return {"found": found, "gradients": [weight.grad for weight in model.parameters()]}


def in_bf16(folder: Path) -> list[torch.Tensor]:
    from tanren.engine.model import wrap_for_training
    from tanren.engine.packed import packed_forward

    model = wrap_for_training(model_of(SHAPES["untied"], Layout(), folder, "bf16"))
    return [packed_forward(batch, model) for batch in micro_batches()]


def single(_: int, folder: Path) -> None:
    """All that one process can find out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    start(Layout())
    for name, shape in SHAPES.items():
        found = {
            "transformers": through_transformers(shape, folder / name),
            "one by one": one_by_one(shape, folder / name),
        }
        for recompute in ("none", "selective", "full"):
            layout = Layout(recompute=recompute)
            found[f"rows, {recompute}"] = step(shape, layout, folder / name)
            found[f"thd, {recompute}"] = step(shape, layout, folder / name, thd=True)
        found["rows, unknown"] = step(shape, Layout(), folder / name, known=False)
        torch.save(found, folder / name / "single.pt")
    base = folder / "untied"
    torch.save((examples_apart(base), empty(base), in_bf16(base)), folder / "more.pt")
    dist.destroy_process_group()


def pair(rank: int, folder: Path) -> None:
    """One of two processes, in each layout of two."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name, shape in SHAPES.items():
        found = {}
        for word, layout in LAYOUTS.items():
            start(layout)
            found[word] = step(shape, layout, folder / name)
            found[f"{word}, unknown"] = step(shape, layout, folder / name, known=False)
        # Both on the same data, so that the mean over all tokens is that of either.
        start(Layout())
        found["data, overlapped"] = step(shape, Layout(), folder / name, overlap=True)
        torch.save(found, folder / name / f"{rank}.pt")
    dist.destroy_process_group()
