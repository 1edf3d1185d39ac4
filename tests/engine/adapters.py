"""Run by test_lora.py in processes of its own: engine/cpu.py changes torch for good.

`python -m tests.engine.adapters FOLDER RANK RANKS`: one process trains every case, or two train
them in every layout of two, from the bases that lie in the folder. Each leaves its curve and its
whole tensors there, a file a layout and case, and the checkpoints that another layout goes on from.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tanren.config.model import Model
from tanren.config.training import Layout, Lora, Optimizer, Schedule
from tanren.convert import llama_config
from tanren.engine import distributed
from tanren.plan.paths import RunFolder

SHAPE = Model(
    layers=2, hidden_size=32, ffn_hidden_size=48, attention_heads=4, kv_groups=2,
    vocabulary_size=120, max_positions=64, rotary_base=10000.0, norm_epsilon=1e-5, init_std=0.08,
)  # fmt: skip
TIED = SHAPE.model_copy(update={"tied_embeddings": True})
RANK = 4
ALL = Lora(rank=RANK, alpha=6.0)
LORAS = {name: Lora(rank=RANK, alpha=6.0, targets=(name,)) for name in ALL.linears} | {
    "all": ALL, "tied": ALL,
}  # fmt: skip
# Each target alone is tried where layers, or the stack of them, are split; tied embeddings where
# both ends of the model are another rank's.
SPLIT = (*ALL.linears, "all")
CASES = {
    "single": tuple(LORAS), "tensor": SPLIT, "sequence": SPLIT, "pipeline": tuple(LORAS),
    "recomputed": ("all",), "data": ("all",),
}  # fmt: skip
LAYOUTS = {
    "tensor": Layout(tensor=2),
    "sequence": Layout(tensor=2, sequence_parallel=True),
    "pipeline": Layout(pipeline=2),
    "recomputed": Layout(pipeline=2, recompute="full"),
    "data": Layout(data=2),
}
# From whose checkpoint in the middle of its run each goes on.
ORIGINS = {"tensor": "single", "sequence": "tensor", "pipeline": "sequence", "data": "tensor"}
# At the first step B is nought, and A has no gradient yet.
STEPS, MIDDLE, BATCH, MICRO_BATCH, SEQUENCE, SEED = 3, 2, 4, 2, 16, 11


def shape_of(case: str) -> Model:
    return TIED if case == "tied" else SHAPE


def hf_tensors(shape: Model) -> dict[str, torch.Tensor]:
    """Random weights, norms among them, by their Hugging Face names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig.from_dict(llama_config.config_of(shape)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return dict(model.state_dict())


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [batch, sequence + 1] and which of them count, unevenly; the same at every step."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(SHAPE.vocabulary_size, (BATCH, SEQUENCE + 1), generator=generator)
    return tokens, (torch.rand(BATCH, SEQUENCE, generator=generator) < 0.7).float()


class Case:
    """One model with adapters, its optimizer, and a folder for what it leaves."""

    def __init__(
        self, root: Path, name: str, layout: Layout, lora: Lora | None, precision: str = "fp32"
    ) -> None:
        from tanren.engine import lora as adapters
        from tanren.engine import model as models
        from tanren.engine.checkpoint import TrainingState, load_base
        from tanren.engine.optimizer import build_optimizer, build_schedule

        shape = shape_of(name)
        self.config = models.transformer_config(shape, layout, precision=precision)
        self.llama = models.build(shape, self.config)
        if lora is not None:
            adapters.add_adapters(self.llama, lora, seed=SEED)
        load_base(self.llama, root / ("base-tied" if name == "tied" else "base"), "recipe.yaml")
        wrapped = models.wrap_for_training(self.llama)
        # An epsilon as large as the gradients: what differs by rounding must not change a sign.
        settings = Optimizer(lr=0.05, epsilon=0.01)
        optimizer = build_optimizer(settings, wrapped, precision=precision)
        optimizer.reload_model_params()
        schedule = build_schedule(
            Schedule(style="constant"), settings, optimizer, steps=STEPS, global_batch=BATCH
        )
        self.state = TrainingState(wrapped, optimizer, schedule, shape)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def train(self, last: int) -> None:
        """Steps up to `last`."""
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        state, ranks = self.state, parallel_state.get_data_parallel_world_size()
        self.config.grad_scale_func = state.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        state.model.train()
        while state.iteration < last:
            state.model.zero_grad_buffer()
            state.optimizer.zero_grad()
            reports = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=micro_batches(parallel_state.get_data_parallel_rank(), ranks),
                model=[state.model],
                num_microbatches=BATCH // (MICRO_BATCH * ranks),
                seq_length=SEQUENCE,
                micro_batch_size=MICRO_BATCH,
                forward_only=False,
            )
            total = torch.zeros(2)
            if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
                total = torch.stack(reports).sum(0)[:2]
            dist.all_reduce(total)
            _, norm, _ = state.optimizer.step()
            state.schedule.step(increment=BATCH)
            state.iteration += 1
            self.losses.append(float(total[0] / total[1]))
            self.norms.append(float(norm))

    def save(self, folder: Path) -> None:
        from tanren.engine.saver import Saver

        saver = Saver(RunFolder(folder), keep_last=9)
        saver.save(self.state)
        saver.close()

    def load(self, folder: Path, iteration: int) -> None:
        from tanren.engine.checkpoint import load

        load(self.state, RunFolder(folder).checkpoint(iteration))

    def leave(self, file: Path) -> None:
        """The curve, and what a checkpoint would hold, put together from every rank's part."""
        from tanren.engine import checkpoint, shards

        mine = []
        for shard in shards.shards(self.state.optimizer, checkpoint.trained_weights(self.llama)):
            kept = shards.state(self.state.optimizer, shard)
            names = {shards.STATE_NAME.format(kind=kind, name="{}"): kept[kind] for kind in kept}
            for name, flat in ({"{}": shards.weight(shard)} | names).items():
                for part in shard.parts:
                    for chunk in part.chunks(shard.start, shard.end):
                        where = slice(chunk.first - shard.start, None)
                        data = flat[where][: chunk.numel].view(chunk.sizes).detach()
                        mine.append((name.format(chunk.name), chunk.shape, chunk.offsets, data))
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        whole: dict[str, torch.Tensor] = {}
        for key, shape, offsets, data in itertools.chain(*parts):
            box = tuple(slice(o, o + n) for o, n in zip(offsets, data.shape, strict=True))
            whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))[box] = data
        if dist.get_rank() == 0:
            file.parent.mkdir(exist_ok=True)
            torch.save({"loss": self.losses, "norm": self.norms, "tensors": whole}, file)

    def logits(self, *, training: bool = False) -> torch.Tensor:
        """Of the batch, [batch, sequence, vocabulary]; for one process."""
        tokens = samples()[0][:, :-1]
        self.llama.train(training)
        with torch.no_grad():
            logits: torch.Tensor = self.llama(tokens, positions(tokens), None)
        return logits[..., : SHAPE.vocabulary_size].clone()

    def token_losses(self) -> torch.Tensor:
        """Of the batch, [batch, sequence]; the same on every tensor-parallel rank."""
        tokens = samples()[0]
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        with torch.no_grad():
            losses: torch.Tensor = self.llama(inputs, positions(inputs), None, labels=labels)
        return losses


def positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[-1]).expand(tokens.shape[0], -1)


def micro_batches(rank: int, ranks: int) -> Iterator[dict[str, torch.Tensor]]:
    tokens, mask = samples()
    for first in range(rank * MICRO_BATCH, BATCH, ranks * MICRO_BATCH):
        part = slice(first, first + MICRO_BATCH)
        yield {"tokens": tokens[part, :-1], "labels": tokens[part, 1:], "mask": mask[part]}


def forward_step(
    data: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    from tanren.engine.loss import token_loss

    batch = next(data)
    tokens = batch["tokens"]
    output = model(tokens, positions(tokens), attention_mask=None, labels=batch["labels"])
    return output, partial(token_loss, batch["mask"])


def look_at_one(root: Path) -> dict[str, Any]:
    """What one process shows: of a run of its own, and of what was loaded from its checkpoint."""
    from tanren.config.errors import RequestError
    from tanren.engine import lora as adapters

    found: dict[str, Any] = {}
    untouched = Case(root, "plain", Layout(), None)
    plain, found["losses of the base"] = untouched.logits(), untouched.token_losses()
    made = Case(root, "all", Layout(), ALL)
    llama = made.llama
    found["as the base"] = torch.equal(made.logits(), plain)
    own = {name: weight for name, weight in llama.named_parameters() if weight.requires_grad}
    others = {n: w.detach().clone() for n, w in llama.named_parameters() if n not in own}
    made.train(MIDDLE)
    found["trained"] = {
        name: (tuple(weight.shape), float(weight.main_grad.abs().max()))
        for name, weight in own.items()
    }
    found["optimized"] = sum(
        weight.numel() for group in made.state.optimizer.param_groups for weight in group["params"]
    )
    found["frozen"] = {n: torch.equal(w, llama.get_parameter(n)) for n, w in others.items()}

    made = Case(root, "all", Layout(), ALL)
    made.load(root / "single", MIDDLE)
    found["logits"] = made.logits()
    with adapters.without_adapters(made.state.model):
        found["without"] = torch.equal(made.logits(), plain)
    found["with them again"] = torch.equal(made.logits(), found["logits"])
    found["in training"] = torch.equal(made.logits(training=True), found["logits"])

    found["losses"] = made.token_losses()

    dropping = Case(root, "all", Layout(), ALL.model_copy(update={"dropout": 0.5}))
    dropping.load(root / "single", MIDDLE)
    found["dropped"] = [dropping.logits(training=True) for _ in range(2)]
    found["not dropped"] = torch.equal(dropping.logits(), found["logits"])

    half = Case(root, "all", Layout(), ALL, "bf16")
    half.train(STEPS)
    half.leave(root / "single" / "bf16.pt")
    found["refusals"] = []
    for other in (None, ALL.model_copy(update={"rank": 8})):
        try:
            Case(root, "all", Layout(), other).load(root / "single", MIDDLE)
        except RequestError as error:
            found["refusals"].append(str(error))
    return found


def look_at_dropout(root: Path, layout: Layout) -> list[dict[str, Any]]:
    """Of both ranks: the weights that each holds whole, after training, and what each drops."""
    from tanren.engine import lora as adapters

    made = Case(root, "all", layout, ALL.model_copy(update={"dropout": 0.5}))
    made.train(STEPS)
    mine = {
        name: weight.detach()
        for name, weight in made.llama.named_parameters()
        if weight.requires_grad and not getattr(weight, "tensor_model_parallel", False)
    }
    dropped = {
        name: module._dropped(torch.ones(64)) > 0
        for name, module in made.llama.named_modules()
        if isinstance(module, adapters.Adapter)
    }
    both: list[Any] = [None, None]
    dist.all_gather_object(both, {"whole": mine, "dropped": dropped})
    return both


def folded(root: Path, layout: Layout) -> torch.Tensor:
    """The losses of a base that took up a checkpoint's adapters, beside new ones of its own."""
    from tanren.convert import mcore
    from tanren.engine import lora as adapters

    made = Case(root, "all", layout, ALL)
    with mcore.open_checkpoint(RunFolder(root / "single").checkpoint(MIDDLE)) as tensors:
        adapters.fold(made.llama, tensors, ALL)
    return made.token_losses()


def run_layout(root: Path, name: str, layout: Layout) -> None:
    """Each case from the base, and one also from the middle of another layout's run."""
    from megatron.core import parallel_state

    distributed.initialize(layout, "cpu", seed=1)
    for case in CASES[name]:
        made = Case(root, case, layout, LORAS[case])
        made.train(MIDDLE)
        if case == "all" and name in {"single", *ORIGINS.values()}:
            made.save(root / name)
        made.train(STEPS)
        made.leave(root / name / f"{case}.pt")
    if name in ORIGINS:
        made = Case(root, "all", layout, ALL)
        made.load(root / ORIGINS[name], MIDDLE)
        made.train(STEPS)
        made.leave(root / name / "resumed.pt")
    if name in ("single", "tensor"):
        losses = folded(root, layout)
        if dist.get_rank() == 0:
            torch.save(losses, root / name / "folded.pt")
    if name == "single":
        torch.save(look_at_one(root), root / "one.pt")
    if layout.tensor > 1:
        both = look_at_dropout(root, layout)
        if dist.get_rank() == 0:
            torch.save(both, root / name / "dropout.pt")
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    torch.set_num_threads(1)
    # A CPU's numbers are drawn from one state, inside megatron-core's regions and outside.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    store = dist.FileStore(str(folder / f"store-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    if ranks == 1:
        run_layout(folder, "single", Layout())
    else:
        for layout_name, each in LAYOUTS.items():
            run_layout(folder, layout_name, each)
    dist.destroy_process_group()
