"""What is written is what Megatron-LM looks for: names, strictly, and arguments.

Megatron-LM itself is not among the dependencies. That its `load_checkpoint` takes such a
checkpoint is in docs/interchange.md, with the versions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tanren.config.model import Model, RopeScaling
from tanren.convert import mcore
from tanren.convert.tensors import Held
from tests.conftest import REPOSITORY
from tests.convert.saved_by_others import shape, weights
from tests.convert.strict import CASE


def test_megatron_core_loads_it_strictly(tmp_path: Path) -> None:
    checkpoint = tmp_path / "release"
    mcore.write_base(shape(CASE), Held(weights(shape(CASE))), checkpoint)
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.convert.strict", str(checkpoint)],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["parameters"]) == 4 * 6 + 3
    assert found["different"] == []
    assert found["lacking"] == []
    # The local layers have no scales of these; Transformer Engine's do.
    assert found["left"] == [
        "decoder.final_layernorm._extra_state",
        "decoder.layers.self_attention.core_attention._extra_state",
    ]


def test_the_arguments_are_those_that_megatron_lm_reads(tmp_path: Path) -> None:
    model = Model.model_validate(
        shape(CASE).model_dump() | {"rope_scaling": RopeScaling(factor=32.0), "head_size": 8}
    )
    said = vars(mcore.arguments(model, weights_only=True, tensor=2, pipeline=4))
    assert said == {
        # What its load_args_from_checkpoint takes with --use-checkpoint-args.
        "num_layers": 4, "hidden_size": 16, "ffn_hidden_size": 24, "seq_length": 64,
        "num_attention_heads": 4, "num_query_groups": 2, "group_query_attention": True,
        "kv_channels": 8, "max_position_embeddings": 64, "position_embedding_type": "rope",
        "rotary_base": 500000.0, "rotary_percent": 1.0, "rotary_interleaved": False,
        "add_bias_linear": False, "add_qkv_bias": False, "squared_relu": False, "swiglu": True,
        "untie_embeddings_and_output_weights": True, "apply_layernorm_1p": False,
        "normalization": "RMSNorm", "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "padded_vocab_size": 128, "ckpt_format": "torch_dist",
        # What load_checkpoint asks.
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4,
        "no_save_optim": True, "no_save_rng": True,
        # What it takes from its command line alone, and a reader of ours from here.
        "norm_epsilon": 1e-6, "use_rope_scaling": True, "rope_scaling_factor": 32.0,
        "vocab_size": 120,
    }  # fmt: skip
