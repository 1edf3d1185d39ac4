"""Makes the checkpoints of others in tests/convert/fixtures, with the programs of others.

    python -m tests.convert.make_fixtures MEGATRON-LM WORK [NAME ...]

MEGATRON-LM is a clone of github.com/NVIDIA/Megatron-LM with its tags. Each case is saved by that
version's own `save_checkpoint`, its arguments made by its own parser, with megatron-core of that
version from PyPI, on a CPU: a process a rank, under gloo. WORK keeps what is installed.

Nothing of this runs in the tests, except `value`, which says what every weight is.
"""

from __future__ import annotations

import importlib
import io
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints.tar.xz"
SHAPE = {
    "num-layers": 4, "hidden-size": 16, "ffn-hidden-size": 24, "num-attention-heads": 4,
    "seq-length": 64, "max-position-embeddings": 64, "rotary-base": 500000, "norm-epsilon": 1e-6,
}  # fmt: skip
# With the end of document that Megatron-LM's NullTokenizer adds: 120.
VOCABULARY = 119


@dataclass(frozen=True)
class Case:
    """One fixture: who saves it, in which layout."""

    version: str
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # chunks of a pipeline stage
    format: str = "torch_dist"
    names: str = "local"  # or "te": as Transformer Engine's layers name their norms
    scales: str = "none"  # "old": `_extra_state` as Transformer Engine < 1.10 gives it
    groups: int = 2
    tied: bool = False
    optimizer: bool = False
    singly: bool = False  # a tensor a layer


CASES = {
    "mcore-0.9.0": Case("0.9.0", tensor=2, scales="old", optimizer=True),
    "mcore-0.10.0": Case("0.10.0", pipeline=2, scales="old"),
    "mcore-0.11.0": Case("0.11.0", tied=True),
    "mcore-0.12.0": Case("0.12.0", tensor=2, pipeline=2, groups=4),
    "mcore-0.13.0": Case("0.13.0", tensor=2, optimizer=True),
    "mcore-0.14.0": Case("0.14.0", pipeline=2, virtual=2),
    "mcore-0.15.0": Case("0.15.0", tensor=2, singly=True),
    "mcore-0.16.1": Case("0.16.1", tensor=2, pipeline=2, optimizer=True),
    "torch-0.9.0": Case("0.9.0", format="torch", names="te", scales="old", optimizer=True),
    "torch-0.9.0-tp2-pp2-vp2": Case("0.9.0", 2, 2, 2, format="torch"),
    "torch-0.12.0-tied": Case("0.12.0", 2, 2, format="torch", names="te", tied=True),
    "torch-0.16.1": Case("0.16.1", 2, format="torch", groups=4),
}


def value(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What a whole tensor of these models holds: a function of its name, exact in bf16."""
    count = torch.Size(shape).numel()
    numbers = (torch.arange(count) * 7 + zlib.crc32(name.encode()) % 251) % 251 - 125
    return (numbers / 128).to(dtype).view(shape)


def main(megatron: Path, work: Path, names: list[str]) -> None:
    for name in names or list(CASES):
        case = CASES[name]
        roots = [_core(work, case.version), _training(megatron, work, case.version), _extra(work)]
        shutil.rmtree(work / "saved" / name, ignore_errors=True)
        _spawn(name, work / "saved" / name, roots)
    # In one archive, since they have much in common.
    with tarfile.open(FIXTURES, "w:xz", preset=9) as archive:
        for path in sorted((work / "saved").rglob("*")):
            archive.add(path, path.relative_to(work / "saved").as_posix(), False, filter=_nobody)
    print(FIXTURES, FIXTURES.stat().st_size, "bytes")


def _nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def _core(work: Path, version: str) -> Path:
    folder = work / f"core-{version}"
    if not folder.exists():
        _install(folder, f"megatron-core=={version}")
    return folder


def _extra(work: Path) -> Path:
    """What Megatron-LM imports beside torch; triton only has to be there."""
    folder = work / "extra"
    if not folder.exists():
        _install(folder, "six", "einops", "wrapt")
    return folder


def _install(folder: Path, *packages: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, *packages], check=True)


def _training(megatron: Path, work: Path, version: str) -> Path:
    folder = work / f"training-{version}"
    if not folder.exists():
        folder.mkdir(parents=True)
        git = ["git", "-C", str(megatron), "archive", f"core_v{version}"]
        # Its megatron/core stays behind: that of PyPI is taken.
        there = subprocess.run(
            ["git", "-C", str(megatron), "ls-tree", "--name-only", f"core_v{version}", "megatron/"],
            check=True, capture_output=True, text=True,
        ).stdout.split()  # fmt: skip
        paths = [path for path in there if path != "megatron/core"]
        archive = subprocess.run([*git, *paths], check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", str(folder)], input=archive, check=True)
    return folder


def _spawn(name: str, target: Path, roots: list[Path]) -> None:
    case = CASES[name]
    world = case.tensor * case.pipeline
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [*roots, here / "src", here])),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.convert.make_fixtures", "--rank", name, str(target)]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    codes = [rank.wait() for rank in ranks]
    assert codes == [0] * world, (name, codes)


# From here on: one rank, with the megatron of that version.


def save(name: str, target: Path) -> None:
    """One rank's part of saving a case."""
    _pretend(CASES[name].version)
    _write_as_before()
    from tanren.engine import cpu

    cpu.install()
    import torch.distributed as dist
    from megatron import core
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.training import checkpointing, global_vars

    case = CASES[name]
    assert core.__version__ == case.version, core.__file__
    args = _arguments(case, target)
    global_vars.set_args(args)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        case.tensor, case.pipeline, case.virtual if case.virtual > 1 else None
    )
    # Random states go into the checkpoint; those of one seed take less room.
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    chunks = [_model(case, args, part) for part in range(case.virtual)]
    optimizer = _optimizer(chunks, case) if case.optimizer else None
    _fill([_unwrapped(chunk) for chunk in chunks], args)
    if optimizer is not None:
        optimizer.reload_model_params()
    checkpointing.save_checkpoint(20, chunks, optimizer, None, 1e9)
    dist.barrier()
    if case.format == "torch" and case.names == "te" and dist.get_rank() == 0:
        for path in target.rglob("model_optim_rng.pt"):
            _rename_norms(path)
    dist.barrier()
    dist.destroy_process_group()


def _pretend(version: str) -> None:
    """No compiler; and triton, which the latest imports and nothing here calls."""
    import types
    from importlib.machinery import ModuleSpec

    compiled: Any = torch
    numbers: Any = numpy
    numbers.product = numpy.prod  # numpy 2 has not, megatron-core before 0.14 asks for
    compiled.compile = lambda function=None, **settings: function or (lambda inner: inner)
    # torch asks for triton, too, and is told the truth.
    importlib.import_module("torch._inductor.runtime.hints")
    for name in ("triton", "triton.language") if version in ("0.15.0", "0.16.1") else ():
        module: Any = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.jit = compiled.compile
        module.__version__ = "3.4.0"
        module.constexpr = lambda value: value
        module.__getattr__ = _unused
        sys.modules[name] = module
        if "." in name:
            sys.modules["triton"].language = module  # type: ignore[attr-defined]


def _unused(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return object


def _write_as_before() -> None:
    """torch's function that writes an item, as megatron-core before 0.12 calls it."""
    import functools

    from torch.distributed.checkpoint import filesystem

    module: Any = filesystem
    now = module._write_item

    @functools.wraps(now)
    def write(*given: Any, **named: Any) -> Any:
        if not isinstance(given[0], module._StorageWriterTransforms):
            given = (module._StorageWriterTransforms(), *given)
        if len(given) + len(named) < 6:
            named["serialization_format"] = module.SerializationFormat.TORCH_SAVE
        return now(*given, **named)

    module._write_item = write


def _arguments(case: Case, target: Path) -> Any:
    from megatron.training.arguments import parse_args, validate_args

    words = [word for key, held in SHAPE.items() for word in (f"--{key}", str(held))]
    words += ["--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"]
    words += ["--disable-bias-linear", "--bf16", "--hidden-dropout", "0", "--attention-dropout"]
    words += ["0", "--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", "10"]
    words += [
        "--save-interval",
        "10",
        "--lr",
        "1e-4",
        "--tokenizer-type",
        "NullTokenizer",
        "--vocab-size",
        str(VOCABULARY),
    ]
    words += ["--transformer-impl", "local", "--no-masked-softmax-fusion", "--save", str(target)]
    words += ["--no-gradient-accumulation-fusion", "--ckpt-format", case.format]
    words += ["--no-persist-layer-norm", "--no-rope-fusion", "--no-bias-swiglu-fusion"]
    words += ["--tensor-model-parallel-size", str(case.tensor)]
    words += ["--pipeline-model-parallel-size", str(case.pipeline)]
    if case.virtual > 1:
        words += ["--num-layers-per-virtual-pipeline-stage", "1"]
    if case.groups < SHAPE["num-attention-heads"]:
        words += ["--group-query-attention", "--num-query-groups", str(case.groups)]
    if not case.tied:
        words.append("--untie-embeddings-and-output-weights")
    if case.optimizer and case.format == "torch_dist":
        words.append("--use-distributed-optimizer")
    elif not case.optimizer:
        words.append("--no-save-optim")
    sys.argv = ["pretrain_gpt.py", *words]
    # Where it asks for the number of GPUs.
    cuda: Any = torch.cuda
    cuda.device_count = lambda: int(os.environ["WORLD_SIZE"])
    cuda.get_device_capability = lambda *rest: (9, 0)
    cuda.get_device_properties = lambda *rest: type("Properties", (), {"major": 9, "minor": 0})
    args = validate_args(parse_args())
    # As its tokenizer's builder sets it: to a multiple that all tensor-parallel ranks share.
    multiple = args.make_vocab_size_divisible_by * case.tensor
    args.padded_vocab_size = -(-(VOCABULARY + 1) // multiple) * multiple
    return args


def _model(case: Case, args: Any, part: int) -> Any:
    import inspect

    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer import transformer_block as blocks

    from tanren.engine.cpu import RMSNorm

    if case.virtual > 1:
        parallel_state.set_virtual_pipeline_model_parallel_rank(part)
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size, num_attention_heads=args.num_attention_heads,
        num_query_groups=case.groups, kv_channels=args.kv_channels, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, normalization="RMSNorm",
        layernorm_epsilon=SHAPE["norm-epsilon"], bf16=True, params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline, use_cpu_initialization=True,
        virtual_pipeline_model_parallel_size=case.virtual if case.virtual > 1 else None,
        bias_dropout_fusion=False,
    )  # fmt: skip
    if case.singly:
        config.hetereogenous_dist_checkpoint = True
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    here = args.num_layers // case.pipeline // case.virtual
    spec = blocks.TransformerBlockSubmodules(layer_specs=[layer] * here, layer_norm=RMSNorm)
    stage = {"vp_stage": part} if "vp_stage" in inspect.signature(GPTModel).parameters else {}
    model = GPTModel(
        config, spec, vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.get_pipeline_model_parallel_rank() == part == 0,
        post_process=(parallel_state.get_pipeline_model_parallel_rank(), part)
        == (case.pipeline - 1, case.virtual - 1),
        share_embeddings_and_output_weights=case.tied, position_embedding_type="rope",
        rotary_base=args.rotary_base, **stage,
    ).bfloat16()  # fmt: skip
    if case.scales == "old":
        _old_scales(model)
    return model


def _old_scales(model: Any) -> None:
    """Linear layers with `_extra_state` as Transformer Engine < 1.10 returned it: a BytesIO."""

    def get_extra_state(self: Any) -> Any:
        stream = io.BytesIO()
        torch.save({"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(4, 3)}, stream)
        return stream

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind,), {"get_extra_state": get_extra_state})


def _optimizer(chunks: list[Any], case: Case) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    distributed = case.format == "torch_dist"
    settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    for place, chunk in enumerate(chunks):
        chunks[place] = DistributedDataParallel(chunk.config, settings, chunk)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-4, bf16=True, params_dtype=torch.bfloat16,
        use_distributed_optimizer=distributed,
    )  # fmt: skip
    return get_megatron_optimizer(config, chunks)


def _unwrapped(chunk: Any) -> Any:
    while not hasattr(chunk, "decoder"):
        chunk = chunk.module
    return chunk


def _fill(models: list[Any], args: Any) -> None:
    """Every parameter from the rule, through where its shards lie in the whole tensors."""
    from megatron.core import parallel_state

    tensor = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    for model in models:
        for name, parameter in model.named_parameters():
            whole, axis = _whole(model, name, parameter, ranks, args)
            found = whole
            if axis is not None and name.endswith("linear_fc1.weight"):
                gate, up = whole.chunk(2)
                found = torch.cat([gate.chunk(ranks)[tensor], up.chunk(ranks)[tensor]])
            elif axis is not None:
                found = whole.chunk(ranks, axis)[tensor]
            assert found.shape == parameter.shape, (name, found.shape, parameter.shape)
            parameter.data.copy_(found)


def _whole(
    model: Any, name: str, parameter: Any, ranks: int, args: Any
) -> tuple[torch.Tensor, int | None]:
    """The whole tensor that a parameter is a shard of, and the axis that it is cut along."""
    parts = name.split(".")
    shape = list(parameter.shape)
    axis = None
    if "layernorm" not in name:
        axis = 1 if parts[-2] in ("linear_proj", "linear_fc2") else 0
        shape[axis] *= ranks
    if parts[0] == "decoder" and parts[1] == "layers":
        layer = model.decoder.layers[int(parts[2])].layer_number - 1
        norms = {"input_layernorm": "self_attention.linear_qkv.layer_norm_weight",
                 "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm_weight"}  # fmt: skip
        rest = norms.get(parts[3], ".".join(parts[3:]))
        stacked = f"decoder.layers.{rest}"
        return value(stacked, (args.num_layers, *shape))[layer], axis
    if parts[0] == "output_layer" and not args.untie_embeddings_and_output_weights:
        name = "embedding.word_embeddings.weight"
    return value(name, tuple(shape)), axis


def _rename_norms(path: Path) -> None:
    """A file of the torch format as Transformer Engine's layers, which hold the norms, make it."""
    state = torch.load(path, weights_only=False)
    for part in [key for key in state if key.startswith("model")]:
        state[part] = {
            key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
                "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
            ): held
            for key, held in state[part].items()
        }
    torch.save(state, path)


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        torch.set_num_threads(1)
        save(sys.argv[2], Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
