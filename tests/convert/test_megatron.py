"""Checkpoints that Megatron-LM of many versions saved, and what is wrong with others."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from tanren.config.errors import RequestError
from tanren.config.model import Model, RopeScaling
from tanren.convert import hf, interchange, legacy, llama, llama_config, megatron, named, unpickle
from tanren.convert.tensors import Held, rows
from tests.convert.make_fixtures import CASES, value
from tests.convert.saved_by_others import shape, unpack, weights

DIST = [name for name, case in CASES.items() if case.format == "torch_dist"]
TORCH = [name for name, case in CASES.items() if case.format == "torch"]
ITERATION = "iter_0000020"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint that a test may spoil: the folder with the tracker file."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(saved / name, tmp_path / name))

    return copy


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_there_is_a_checkpoint_of_every_version_and_both_formats() -> None:
    versions = {case.version for case in CASES.values()}
    assert versions == {f"0.{minor}.0" for minor in range(9, 16)} | {"0.16.1"}
    assert len(DIST) == 8
    assert len(TORCH) == 4


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_what_was_saved(saved: Path, name: str) -> None:
    wanted = weights(shape(name))
    with megatron.open_any(saved / name) as opened:
        assert opened.model == shape(name)
        assert opened.iteration == 20
        assert opened.folder.name == ITERATION
        assert list(opened.tensors.stored) == list(wanted)
        for key, tensor in wanted.items():
            stored = opened.tensors.stored[key]
            assert (stored.shape, stored.dtype) == (tuple(tensor.shape), torch.bfloat16)
            assert torch.equal(opened.tensors.read(key), tensor), key
            if key.startswith("decoder.layers."):
                assert torch.equal(opened.tensors.read(key, 2), tensor[2]), key
                # Over the border of two shards, wherever it is.
                middle = len(tensor[1]) // 2
                part = rows(opened.tensors, key, 1, middle - 3, middle + 3)
                assert torch.equal(part, tensor[1][middle - 3 : middle + 3]), key


@pytest.mark.parametrize("name", CASES)
def test_they_become_hugging_face_tensors(saved: Path, name: str) -> None:
    model = shape(name)
    wanted = llama.to_hf(model, Held(weights(model)))
    with megatron.open_any(saved / name) as opened:
        found = llama.to_hf(opened.model, opened.tensors)
        assert list(found.stored) == list(llama.hf_shapes(model))
        assert found.stored["model.embed_tokens.weight"].shape == (120, 16)
        for key in found.stored:
            assert torch.equal(found.read(key), wanted.read(key)), key


def test_the_fixtures_hold_what_is_let_pass(saved: Path) -> None:
    """What the readers must not stumble over is there, as those versions wrote it."""
    there = {}
    for name in DIST:
        metadata = unpickle.load_metadata(saved / name / ITERATION / ".metadata")
        there[name] = metadata.state_dict_metadata
    for name in ("mcore-0.9.0", "mcore-0.10.0"):
        scales = [key for key in there[name] if "_extra_state" in key]
        assert "decoder.layers.mlp.linear_fc1._extra_state/shard_3_4" in scales
        assert all(isinstance(there[name][key], dcp.BytesStorageMetadata) for key in scales)
        (content,) = _object(
            saved / name / ITERATION, "decoder.layers.mlp.linear_fc1._extra_state/"
        )
        assert isinstance(content, io.BytesIO), "as Transformer Engine before 1.10 had it"
    for name in ("mcore-0.9.0", "mcore-0.13.0"):
        assert "optimizer.state.fp32_param.output_layer.weight" in there[name]
    assert any(key.startswith("optimizer.distributed.") for key in there["mcore-0.16.1"])
    assert all(any(key.startswith("rng_state") for key in one) for one in there.values())
    assert "decoder.layers.3.mlp.linear_fc1.weight" in there["mcore-0.15.0"]
    state = unpickle.load(saved / "torch-0.9.0" / ITERATION / "mp_rank_00" / legacy.FILE)
    assert {"args", "model", "optimizer", "rng_state", "checkpoint_version"} <= state.keys()
    assert isinstance(state["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"], io.BytesIO)
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in state["model"]
    ranks = sorted(path.name for path in (saved / "torch-0.9.0-tp2-pp2-vp2" / ITERATION).iterdir())
    assert ranks == [f"mp_rank_0{t}_00{p}" for t in range(2) for p in range(2)]
    state = unpickle.load(saved / "torch-0.9.0-tp2-pp2-vp2" / ITERATION / ranks[1] / legacy.FILE)
    assert "decoder.layers.0.input_layernorm.weight" in state["model1"]
    args = unpickle.load(saved / "mcore-0.12.0" / ITERATION / "common.pt")["args"]
    assert (args.attention_backend, args.padded_vocab_size) == (5, 256)


def _object(checkpoint: Path, name: str) -> Any:
    metadata = unpickle.load_metadata(checkpoint / ".metadata")
    index = next(one for one in metadata.storage_data if one.fqn.startswith(name))
    place = metadata.storage_data[index]
    content = (checkpoint / place.relative_path).read_bytes()
    (checkpoint / "object").write_bytes(content[place.offset : place.offset + place.length])
    return unpickle.load(checkpoint / "object")


@pytest.mark.parametrize("name", ["common.pt", ".metadata"])
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(
    copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = copied("mcore-0.16.1") / ITERATION / name
    if name == "common.pt":
        common = unpickle.load(path)
        common["args"].timers = Runs()
        torch.save(common, path)
    else:
        metadata = unpickle.load_metadata(path)
        metadata.planner_data = Runs()
        path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(RequestError) as refused, megatron.open_any(path.parents[1]):
        pass
    assert refused.value.place == str(path)
    assert refused.value.problem.startswith("names posix.system, which could run code")
    assert not (tmp_path / "ran").exists()
    with megatron.open_any(path.parents[1], trust=True) as opened:
        assert opened.model == shape("mcore-0.16.1")
    assert (tmp_path / "ran").exists(), "who says --trust gets what pickle does"


def test_a_hostile_file_of_a_rank_is_refused_and_runs_nothing(
    copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = copied("torch-0.16.1") / ITERATION / "mp_rank_01" / legacy.FILE
    state = unpickle.load(path)
    state["optimizer"] = {"state": [Runs()]}
    save_torch(state, path)
    with pytest.raises(RequestError) as refused, megatron.open_any(path.parents[2]):
        pass
    assert refused.value.place == str(path)
    assert "names posix.system" in refused.value.problem
    assert not (tmp_path / "ran").exists()


def change_dist(folder: Path, change: Callable[[dict[str, Any], Any], None]) -> None:
    path = folder / ITERATION / ".metadata"
    found = unpickle.load_metadata(path)
    change(found.state_dict_metadata, found.storage_data)
    # Without what is of Megatron's own classes.
    kept = dcp.Metadata(found.state_dict_metadata, storage_data=found.storage_data)
    path.write_bytes(pickle.dumps(kept))


def save_torch(state: dict[str, Any], path: Path) -> None:
    """What the reader takes of a file, with what a test changed."""
    kept = ("args", "checkpoint_version", "iteration", "model", "optimizer")
    torch.save({key: state[key] for key in kept if key in state}, path)


def change_torch(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    for path in folder.rglob(legacy.FILE):
        state = unpickle.load(path)
        change(state["model"])
        save_torch(state, path)


def test_a_missing_tensor_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("mcore-0.11.0")
    change_dist(folder, lambda tensors, _: tensors.pop("decoder.layers.mlp.linear_fc2.weight"))
    with pytest.raises(RequestError) as refused, megatron.open_any(folder):
        pass
    assert refused.value.place == str(folder / ITERATION)
    assert "holds no tensor decoder.layers.{0-3}.mlp.linear_fc2.weight" in refused.value.problem
    folder = copied("torch-0.16.1")
    change_torch(folder, lambda model: model.pop("decoder.layers.2.input_layernorm.weight"))
    with pytest.raises(RequestError) as refused, megatron.open_any(folder):
        pass
    norm = "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight"
    assert refused.value.problem == f"holds no tensor {norm}"


def test_a_surplus_tensor_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("mcore-0.11.0")

    name = "decoder.layers.mlp.surplus.weight"

    def add(tensors: dict[str, Any], places: dict[Any, Any]) -> None:
        tensors[name] = tensors["decoder.final_layernorm.weight"]
        places[dcp.MetadataIndex(name, [0])] = _StorageInfo("__9_9.distcp", 0, 1)

    change_dist(folder, add)
    with pytest.raises(RequestError) as refused, megatron.open_any(folder):
        pass
    assert f"has not: {name}" in refused.value.problem
    folder = copied("torch-0.16.1")
    change_torch(
        folder,
        lambda model: model.update({"decoder.layers.4.mlp.linear_fc2.weight": torch.ones(1)}),
    )
    with pytest.raises(RequestError) as refused, megatron.open_any(folder):
        pass
    assert "has not: decoder.layers.4.mlp.linear_fc2.weight" in refused.value.problem


def test_a_tensor_of_another_shape_or_type_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("torch-0.9.0")
    change_torch(folder, lambda m: m.update({"decoder.final_layernorm.weight": torch.ones(17)}))
    with pytest.raises(RequestError, match=r"decoder\.final_layernorm\.weight is \[17\] there"):
        megatron.open_any(folder).__enter__()
    folder = copied("torch-0.16.1")
    norm = "decoder.layers.1.input_layernorm.weight"
    change_torch(folder, lambda model: model.update({norm: torch.ones(16)}))
    with pytest.raises(RequestError, match=rf"{norm} is torch\.float32, and they become one"):
        megatron.open_any(folder).__enter__()


def test_embeddings_of_another_width_are_named(saved: Path) -> None:
    with megatron.open_any(saved / "mcore-0.9.0") as opened:
        held = {name: opened.tensors.read(name) for name in opened.tensors.stored}
    name = "embedding.word_embeddings.weight"
    with pytest.raises(RequestError, match=rf"{name} is \[128, 8\] there, and .*\[128, 16\]"):
        named.named(opened.model, Held(held | {name: held[name][:, :8]}), "narrow")


def test_a_tensor_under_two_names_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("torch-0.16.1")
    both = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    change_torch(folder, lambda model: model.update({both: torch.ones(16, dtype=torch.bfloat16)}))
    with pytest.raises(RequestError, match=rf"holds {both} twice, under two names"):
        megatron.open_any(folder).__enter__()


def test_a_missing_rank_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("torch-0.9.0-tp2-pp2-vp2")
    (folder / ITERATION / "mp_rank_01_000" / legacy.FILE).unlink()
    with pytest.raises(RequestError, match=r"lacks model_optim_rng\.pt of mp_rank_01_000"):
        megatron.open_any(folder).__enter__()


def test_ranks_of_two_checkpoints_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("torch-0.16.1")
    path = folder / ITERATION / "mp_rank_01" / legacy.FILE
    state = unpickle.load(path)
    state["model"]["decoder.final_layernorm.weight"] += 1
    save_torch(state, path)
    with pytest.raises(RequestError, match=r"decoder\.final_layernorm\.weight differs between"):
        megatron.open_any(folder).__enter__()
    state["model"].pop("decoder.final_layernorm.weight")
    save_torch(state, path)
    with pytest.raises(RequestError, match="other tensors on one rank of stage 0 than on another"):
        megatron.open_any(folder).__enter__()


@pytest.mark.parametrize("name", ["mcore-0.12.0", "torch-0.12.0-tied"])
def test_a_torn_file_is_named(copied: Callable[[str], Path], name: str) -> None:
    folder = copied(name)
    pattern = "common.pt" if CASES[name].format == "torch_dist" else legacy.FILE
    path = sorted((folder / ITERATION).rglob(pattern))[-1]
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(RequestError) as refused, megatron.open_any(folder):
        pass
    assert refused.value.place == str(path)
    assert refused.value.problem.startswith("is not whole")


def test_a_file_of_boxes_that_is_missing_or_short_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("mcore-0.12.0")
    path = folder / ITERATION / "__3_1.distcp"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RequestError) as refused, megatron.open_any(folder) as opened:
        for name in opened.tensors.stored:
            opened.tensors.read(name)
    assert refused.value.place == str(path)
    path.unlink()
    with pytest.raises(RequestError) as refused, megatron.open_any(folder) as opened:
        for name in opened.tensors.stored:
            opened.tensors.read(name)
    assert (refused.value.place, refused.value.problem) == (str(path), "is missing")


ARGS = {
    "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4,
    "group_query_attention": True, "num_query_groups": 2, "kv_channels": 4,
    "max_position_embeddings": 64, "padded_vocab_size": 256, "rotary_base": 10000,
    "norm_epsilon": 1e-5, "untie_embeddings_and_output_weights": True, "swiglu": True,
    "normalization": "RMSNorm", "add_bias_linear": False, "position_embedding_type": "rope",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu": False}, "was trained with swiglu False, and True is read"),
        ({"normalization": "LayerNorm"}, "normalization LayerNorm, and RMSNorm is read"),
        ({"add_bias_linear": True}, "add_bias_linear True, and False is read"),
        ({"position_embedding_type": "learned_absolute"}, "learned_absolute, and rope is read"),
        ({"add_qkv_bias": True}, "add_qkv_bias True, which the engine has not"),
        ({"num_experts": 8}, "num_experts 8, which the engine has not"),
        ({"qk_layernorm": True}, "qk_layernorm True, which the engine has not"),
        ({"rotary_percent": 0.5}, "rotary_percent 0.5, which the engine has not"),
        ({"rope_type": "yarn"}, "rope_type yarn, which the engine has not"),
        ({"window_size": (128, 0)}, r"window_size \(128, 0\), which the engine has not"),
        ({"num_layers": None}, "its args give no shape: layers"),
        ({"num_attention_heads": 3, "num_query_groups": 2}, "not a multiple of kv_groups 2"),
    ],
)
def test_what_the_engine_has_not_is_refused_by_its_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=f"^iter: .*{message}"):
        megatron.shape_of(argparse.Namespace(**(ARGS | changes)), "iter")


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        # Megatron-LM's default of num_query_groups is 1 where there is no grouping.
        ({"group_query_attention": False, "num_query_groups": 1}, "kv_groups", 4),
        ({"kv_channels": 8}, "head_size", 8),
        ({"untie_embeddings_and_output_weights": False}, "tied_embeddings", True),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "rope_scaling",
         RopeScaling(factor=32.0)),
        # Before the argument there was a factor of 8.
        ({"use_rope_scaling": True}, "rope_scaling", RopeScaling(factor=8.0)),
        ({"norm_epsilon": None, "layernorm_epsilon": 1e-6}, "norm_epsilon", 1e-6),
        ({"init_method_std": 0.008}, "init_std", 0.008),
        ({"position_embedding_type": None, "use_rotary_position_embeddings": True}, "layers", 2),
    ],
)  # fmt: skip
def test_arguments_of_megatron_make_the_shape(
    changes: dict[str, Any], field: str, value: object
) -> None:
    model = megatron.shape_of(argparse.Namespace(**(ARGS | changes)), "iter")
    assert getattr(model, field) == value


def test_what_is_known_of_the_model_has_to_agree(saved: Path) -> None:
    known = shape("mcore-0.9.0").model_copy(update={"max_positions": 9000})
    with megatron.open_any(saved / "mcore-0.9.0", like=known) as opened:
        assert opened.model == known, "positions are what a model was made for, not what it is"
    other = known.model_copy(update={"norm_epsilon": 1e-5})
    with pytest.raises(RequestError, match="is another model: norm_epsilon 1e-06 there, 1e-05 her"):
        megatron.open_any(saved / "mcore-0.9.0", like=other).__enter__()
    # Our first checkpoints said less: what they leave out is taken from what is known.
    scaled = shape("mcore-0.9.0").model_copy(update={"rope_scaling": RopeScaling(factor=4.0)})
    args = llama_config.megatron_arguments(scaled)
    for name in ("swiglu", "use_rope_scaling", "rope_scaling_factor"):
        delattr(args, name)
    with pytest.raises(RequestError, match="does not say all of its shape"):
        megatron.shape_of(args, "ours")
    assert megatron.shape_of(args, "ours", 120, scaled) == scaled


def test_our_own_arguments_make_our_shape_again() -> None:
    for name in ("mcore-0.9.0", "mcore-0.11.0", "mcore-0.12.0"):
        model = shape(name).model_copy(update={"rope_scaling": RopeScaling(factor=4.0)})
        args = llama_config.megatron_arguments(model)
        assert megatron.shape_of(args, "ours", model.vocabulary_size) == model


def test_the_vocabulary_is_cut_and_its_padding_filled(saved: Path) -> None:
    """256 rows are stored: of a vocabulary of 120 ours takes 128, of 250 all."""
    folder = saved / "mcore-0.13.0"
    embedding = "embedding.word_embeddings.weight"

    def like(size: int) -> Model:
        return shape("mcore-0.13.0").model_copy(update={"vocabulary_size": size})

    for size, padded in ((100, 128), (250, 256)):
        with megatron.open_any(folder, like=like(size)) as opened:
            assert opened.model.vocabulary_size == size
            found = opened.tensors.read(embedding)
            assert found.shape == (padded, 16)
            assert torch.equal(found[:size], value(embedding, (size, 16)))
            assert not found[size:].any()
            part = rows(opened.tensors, embedding, None, size - 2, padded)
            assert torch.equal(part, found[size - 2 :])
    with pytest.raises(
        RequestError, match="has 256 rows of embeddings, and the vocabulary has 300"
    ):
        megatron.open_any(folder, like=like(300)).__enter__()
    # Some writers have no padding at all.
    model = shape("mcore-0.13.0")
    bare = {**weights(model), embedding: value(embedding, (120, 16))}
    filled = named.named(model, Held(bare), "bare").read(embedding)
    assert torch.equal(filled, weights(model)[embedding])


def test_gate_and_up_apart_and_layers_singly_are_read_as_well() -> None:
    model = shape("mcore-0.9.0")
    wanted = weights(model)
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in wanted.items():
        if not name.startswith("decoder.layers."):
            apart[name] = tensor
            continue
        for layer, one in enumerate(tensor):
            numbered = name.replace("layers.", f"layers.{layer}.")
            if name.endswith("linear_fc1.weight"):
                apart[numbered + "_w"], apart[numbered + "_v"] = one.chunk(2)
            else:
                apart[numbered] = one
    found = named.named(model, Held(apart), "apart")
    for name, tensor in wanted.items():
        assert torch.equal(found.read(name), tensor), name
    part = rows(found, "decoder.layers.mlp.linear_fc1.weight", 1, 20, 28)
    assert torch.equal(part, wanted["decoder.layers.mlp.linear_fc1.weight"][1, 20:28])
    del apart["decoder.layers.1.mlp.linear_fc1.weight_v"]
    with pytest.raises(
        RequestError, match=r"no tensor decoder\.layers\.1\.mlp\.linear_fc1\.weight"
    ):
        named.named(model, Held(apart), "apart")


def test_the_names_before_megatron_core_are_read(tmp_path: Path) -> None:
    """The legacy GPT model: dicts in dicts, and other names for the same layouts."""
    model = shape("mcore-0.12.0")
    wanted = weights(model)
    old = {
        "self_attention.linear_qkv.layer_norm_weight": "input_norm.weight",
        "self_attention.linear_qkv.weight": "self_attention.query_key_value.weight",
        "self_attention.linear_proj.weight": "self_attention.dense.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_norm.weight",
        "mlp.linear_fc1.weight": "mlp.dense_h_to_4h.weight",
        "mlp.linear_fc2.weight": "mlp.dense_4h_to_h.weight",
    }
    encoder = {
        f"layers.{layer}.{theirs}": wanted[f"decoder.layers.{ours}"][layer].clone()
        for ours, theirs in old.items()
        for layer in range(model.layers)
    }
    encoder["final_norm.weight"] = wanted["decoder.final_layernorm.weight"]
    embedding = {"word_embeddings": {"weight": wanted["embedding.word_embeddings.weight"]}}
    state = {
        "args": llama_config.megatron_arguments(model),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": {
            "language_model": {
                "embedding": embedding,
                "encoder": encoder,
                "output_layer": {"weight": wanted["output_layer.weight"]},
            }
        },
    }
    folder = tmp_path / "release" / "mp_rank_00"
    folder.mkdir(parents=True)
    torch.save(state, folder / legacy.FILE)
    with megatron.open_any(tmp_path / "release", like=model) as opened:
        assert opened.iteration == 7
        for name, tensor in wanted.items():
            assert torch.equal(opened.tensors.read(name), tensor), name
    state["checkpoint_version"] = 1.0
    torch.save(state, folder / legacy.FILE)
    with pytest.raises(RequestError, match="checkpoint_version 1, when query, key and value lay"):
        megatron.open_any(tmp_path / "release").__enter__()


def test_folders_are_told_apart(saved: Path, tmp_path: Path) -> None:
    def made(*names: str) -> Path:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir()
            else:
                path.write_text("")
        return root

    dist, torch_format = saved / "mcore-0.9.0", saved / "torch-0.9.0"
    for path in (dist, dist / ITERATION):
        assert megatron.identify(path) == megatron.Found("torch_dist", dist / ITERATION)
    for path in (torch_format, torch_format / ITERATION):
        assert megatron.identify(path) == megatron.Found("torch", torch_format / ITERATION)
    assert megatron.identify(made("config.json")).kind == "hf"
    assert megatron.identify(made("model_config.yaml")).kind == "nemo-1"
    nemo = made("weights/.metadata", "context/model.yaml")
    assert megatron.identify(nemo).kind == "nemo-2"
    with pytest.raises(RequestError, match="is a NeMo 2 checkpoint") as refused:
        megatron.open_any(nemo).__enter__()
    assert "nemo-to-hf" in refused.value.next_step
    run = made("plan.json", "checkpoints/iter_0000003/.metadata")
    (run / "checkpoints" / megatron.TRACKER).write_text("3")
    assert megatron.identify(run) == megatron.Found("run", run / "checkpoints" / "iter_0000003")
    release = made("release/.metadata")
    (release / megatron.TRACKER).write_text("release\n")
    assert megatron.identify(release) == megatron.Found("torch_dist", release / "release")


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no such folder"):
        megatron.identify(tmp_path / "nothing")
    (tmp_path / "iter_0000005").mkdir()
    with pytest.raises(RequestError, match="holds no checkpoint that is known") as refused:
        megatron.identify(tmp_path)
    assert "iter_0000005" in refused.value.next_step
    (tmp_path / megatron.TRACKER).write_text("6")
    with pytest.raises(RequestError, match="names iter_0000006, which is not there"):
        megatron.identify(tmp_path)
    (tmp_path / megatron.TRACKER).write_text("../etc")
    with pytest.raises(RequestError, match=r"holds '\.\./etc', and no iteration"):
        megatron.identify(tmp_path)
    for backend in ("zarr", "fsdp_dtensor"):
        (tmp_path / "metadata.json").write_bytes(orjson.dumps({"sharded_backend": backend}))
        with pytest.raises(RequestError, match=f"stored as {backend}, and torch_dist is read"):
            megatron.identify(tmp_path)
    (tmp_path / "metadata.json").write_text("[]")
    with pytest.raises(RequestError, match="does not say how the tensors are stored"):
        megatron.identify(tmp_path)


def test_a_checkpoint_of_another_program_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("mcore-0.9.0")
    torch.save({"iteration": 3}, folder / ITERATION / "common.pt")
    with pytest.raises(RequestError, match="does not say what model it holds"):
        megatron.open_any(folder).__enter__()
    torch.save({"lora": {"rank": 2}}, folder / ITERATION / "common.pt")
    with pytest.raises(RequestError, match="holds adapters alone"):
        megatron.open_any(folder).__enter__()


def test_a_hugging_face_folder_is_opened_as_well(tmp_path: Path) -> None:
    model = shape("mcore-0.12.0")
    wanted = weights(model)
    hf.write_tensors(tmp_path, llama.to_hf(model, Held(wanted)))
    hf.write_settings(tmp_path, model, torch.bfloat16, None, None)
    with megatron.open_any(tmp_path) as opened:
        assert opened.model == model.model_copy(update={"head_size": 4})
        found = opened.tensors.read("decoder.layers.mlp.linear_fc1.weight", 3)
        assert torch.equal(found, wanted["decoder.layers.mlp.linear_fc1.weight"][3])


@pytest.mark.parametrize("name", ["mcore-0.9.0", "mcore-0.15.0", "torch-0.9.0-tp2-pp2-vp2"])
def test_a_conversion_by_hand_takes_them(saved: Path, tmp_path: Path, name: str) -> None:
    said: list[str] = []
    made = interchange.mcore_to_hf(
        saved / name, tmp_path / "hf", interchange.Options(), said.append
    )
    assert said[0] == f"reading {saved / name / ITERATION}"
    assert made.parameters == shape(name).parameters
    wanted = llama.to_hf(shape(name), Held(weights(shape(name))))
    with hf.open_model(tmp_path / "hf") as found:
        assert found.stored == dict(wanted.stored)
        for key in wanted.stored:
            assert torch.equal(found.read(key), wanted.read(key)), key
    config = llama_config.model_of(hf.read_config(tmp_path / "hf"), "config.json")
    assert llama_config.differences(config, shape(name)) == []


def test_a_conversion_by_hand_trusts_when_it_is_told_to(
    copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied("mcore-0.11.0")
    path = folder / ITERATION / "common.pt"
    common = unpickle.load(path)
    torch.save(common | {"other": Runs()}, path)

    def convert(trust: bool) -> None:
        options = interchange.Options()
        interchange.mcore_to_hf(folder, tmp_path / "hf", options, lambda text: None, trust=trust)

    with pytest.raises(RequestError, match=r"names posix\.system"):
        convert(trust=False)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "hf").exists()
    convert(trust=True)
    assert (tmp_path / "ran").exists()
    assert (tmp_path / "hf" / "config.json").exists()
