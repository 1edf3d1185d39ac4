"""Run by test_checkpoint.py in processes of its own: engine/cpu.py changes torch for good.

`python -m tests.engine.checkpoints FOLDER RANK RANKS`: a tiny bf16 model with tied embeddings is
trained, saved, loaded in another layout and saved again from there. Two processes come first.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tanren.config.training import Layout
from tanren.engine import distributed
from tanren.engine.boxes import join, split
from tests.engine.adapters import Case

STEPS = 2
LAYOUTS = {
    "data": Layout(data=2), "tensor": Layout(tensor=2), "pipeline": Layout(pipeline=2),
}  # fmt: skip


def make(root: Path, layout: Layout) -> Case:
    return Case(root, "tied", layout, None, "bf16")


def save_as_megatron_does(case: Case, folder: Path) -> None:
    """By megatron-core's own functions, the optimizer's state gathered on every rank."""
    from megatron.core import dist_checkpointing

    from tanren.engine.checkpoint import common_state

    kind = {"distrib_optim_sharding_type": "fully_reshardable"}
    model = case.llama.sharded_state_dict(metadata=dict(kind))
    optimizer = case.state.optimizer.sharded_state_dict(model, metadata=dict(kind))
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(
        {**common_state(case.state), "model": model, "optimizer": optimizer},
        str(folder),
        content_metadata=kind,
    )


def load_as_megatron_does(case: Case, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    kind = {"distrib_optim_sharding_type": "fully_reshardable"}
    model = case.llama.sharded_state_dict(metadata=dict(kind))
    optimizer = case.state.optimizer.sharded_state_dict(model, is_loading=True, metadata=dict(kind))
    loaded = dist_checkpointing.load({"model": model, "optimizer": optimizer}, str(folder))
    case.llama.load_state_dict(loaded["model"])
    case.state.optimizer.load_state_dict(loaded["optimizer"])
    case.state.iteration = int(loaded["iteration"])


def two(root: Path) -> None:
    """Saved by data parallelism, gone on with by the others; and Megatron's own, by this one."""
    from megatron.core import parallel_state

    for name, layout in LAYOUTS.items():
        distributed.initialize(layout, "cpu", seed=1)
        case = make(root, layout)
        if name == "data":
            case.train(STEPS)
            case.save(root / name)
            save_as_megatron_does(case, root / "theirs" / "checkpoints" / f"iter_{STEPS:07d}")
            case = make(root, layout)
            case.load(root / "theirs", STEPS)
            case.save(root / "from theirs")
        else:
            case.load(root / "data", STEPS)
            case.save(root / name)
        parallel_state.destroy_model_parallel()


def one(root: Path) -> None:
    """What one process makes of what two have saved."""
    distributed.initialize(Layout(), "cpu", seed=1)
    for name in LAYOUTS:
        case = make(root, Layout())
        case.load(root / name, STEPS)
        case.save(root / f"one from {name}")
    case.train(STEPS + 1)
    followed = {"loss": case.losses, "norm": case.norms}
    case = make(root, Layout())
    load_as_megatron_does(case, root / "data" / "checkpoints" / f"iter_{STEPS:07d}")
    case.save(root / "one by megatron")
    case.train(STEPS + 1)
    followed |= {"their loss": case.losses, "their norm": case.norms}
    take_remainders()
    case = make(root, Layout())
    case.load(root / "data", STEPS)
    case.save(root / "aware")
    case.train(STEPS + 1)
    followed |= {"aware loss": case.losses, "aware norm": case.norms}
    case.save(root / "aware")
    inner: Any = case.state.optimizer.chained_optimizers[0].optimizer
    kept = [(own.detach().clone(), inner.state[own]) for own in inner.state]
    again = make(root, Layout())
    again.load(root / "aware", STEPS + 1)
    other: Any = again.state.optimizer.chained_optimizers[0].optimizer
    followed["same"] = [
        torch.equal(mine, theirs) and all(torch.equal(a[kind], b[kind]) for kind in a)
        for (mine, a), (theirs, b) in zip(
            kept, ((own, other.state[own]) for own in other.state), strict=True
        )
    ]
    followed["types"] = {kind: kept[0][1][kind].dtype for kind in kept[0][1]}
    torch.save(followed, root / "followed.pt")


def take_remainders() -> None:
    """From here on optimizers keep what Transformer Engine's precision-aware one keeps."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    from tanren.engine import cpu, optimizer

    class Aware(cpu.FusedAdam):
        """Moments in bf16, and of each master the 16 bits that its weight does not have."""

        store_param_remainders = True

        def __init__(self, params: Any, **options: Any) -> None:
            known = ("lr", "weight_decay", "betas", "eps")
            super().__init__(params, **{key: options[key] for key in known})

        def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
            assert store_param_remainders
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[param][name] = torch.zeros_like(param)
            self.state[param]["master_param"] = torch.zeros_like(param, dtype=torch.int16)

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                first, second = group["betas"]
                for own in group["params"]:
                    state, gradient = self.state[own], own.decoupled_grad.float()
                    master = join(own, state["master_param"])
                    mean = state["exp_avg"].float().lerp(gradient, 1 - first)
                    square = state["exp_avg_sq"].float().lerp(gradient**2, 1 - second)
                    update = (mean / (1 - first ** group["step"])) / (
                        (square / (1 - second ** group["step"])).sqrt() + group["eps"]
                    )
                    master -= group["lr"] * (update + group["weight_decay"] * master)
                    weight, remainder = split(master)
                    own.copy_(weight)
                    state["master_param"].copy_(remainder)
                    state["exp_avg"].copy_(mean)
                    state["exp_avg_sq"].copy_(square)

    build = optimizer.get_megatron_optimizer

    def aware(config: Any, *rest: Any, **options: Any) -> Any:
        config.use_precision_aware_optimizer = True
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        config.exp_avg_dtype = config.exp_avg_sq_dtype = torch.bfloat16
        return build(config, *rest, **options)

    patched: Any = optimizer
    patched.get_megatron_optimizer = aware
    optimizers.Adam = distrib_optimizer.Adam = Aware
    optimizers.is_te_min_version = lambda version: True


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    store = dist.FileStore(str(folder / f"store-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    (one if ranks == 1 else two)(folder)
    dist.destroy_process_group()
