"""Checkpoints in and out by hand: bit for bit, whatever the family and whoever saved them."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import interchange, llama, llama_config, mcore
from tanren.convert.interchange import Options
from tanren.convert.tensors import Held
from tests.conftest import REPOSITORY
from tests.convert import models
from tests.convert.held import whole
from tests.convert.models import FAMILIES, SHAPE

Made = interchange.Made


def into(source: Path, target: Path, **options: Any) -> Made:
    return interchange.hf_to_mcore(source, target, Options(**options), lambda text: None)


def out_of(source: Path, target: Path, like: Path | None = None, **options: Any) -> Made:
    return interchange.mcore_to_hf(source, target, Options(**options), lambda text: None, like=like)


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limit", [10**9, 5000])
def test_there_and_back_is_bit_exact(tmp_path: Path, family: str, limit: int) -> None:
    model, config = FAMILIES[family]
    source = models.write(tmp_path / "hf", model, config, max_shard_bytes=limit)
    made = into(source, tmp_path / "mcore")
    assert made.parameters == model.parameters
    back = out_of(tmp_path / "mcore", tmp_path / "back", max_shard_bytes=limit)
    assert back.size == 2 * model.parameters
    files = [path.name for path in sorted((tmp_path / "back").glob("*.safetensors"))]
    assert files == [path.name for path in sorted(source.glob("*.safetensors"))]
    assert (len(files) > 2) == (limit == 5000)
    equal(models.read(tmp_path / "back"), models.weights(model))
    before, after = (
        orjson.loads((folder / "config.json").read_bytes()) for folder in (source, back.folder)
    )
    assert after == before
    if limit == 5000:
        index = orjson.loads((back.folder / "model.safetensors.index.json").read_bytes())
        assert index == orjson.loads((source / "model.safetensors.index.json").read_bytes())
        assert index["metadata"]["total_size"] == back.size


def test_transformers_loads_what_comes_out(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, config = FAMILIES["mistral"]
    into(models.write(tmp_path / "hf", model, config), tmp_path / "mcore")
    out_of(tmp_path / "mcore", tmp_path / "back")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert type(loaded).__name__ == "MistralForCausalLM"
    equal(dict(loaded.named_parameters()), models.weights(model))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("direction", ["in", "out"])
def test_another_type_is_each_element_rounded_once(
    tmp_path: Path, name: str, dtype: torch.dtype, direction: str
) -> None:
    stored = torch.float32 if name == "bf16" else torch.bfloat16
    source = models.write(tmp_path / "hf", dtype=stored)
    into(source, tmp_path / "mcore", dtype=name if direction == "in" else None)
    out_of(tmp_path / "mcore", tmp_path / "back", dtype=name if direction == "out" else None)
    wanted = {key: one.to(dtype) for key, one in models.weights(SHAPE, stored).items()}
    equal(models.read(tmp_path / "back"), wanted)
    stated = orjson.loads((tmp_path / "back" / "config.json").read_bytes())["torch_dtype"]
    assert stated == str(dtype).removeprefix("torch.")


def test_the_checkpoint_is_what_torch_and_megatron_look_for(tmp_path: Path) -> None:
    model, config = FAMILIES["v4"]
    into(models.write(tmp_path / "hf", model, config), tmp_path / "mcore")
    # Megatron-LM refuses a tracker that says 0.
    assert (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").read_text() == "release"
    checkpoint = tmp_path / "mcore" / "release"
    wanted = whole(llama.to_mcore(model, Held(models.weights(model))))
    found = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    equal(found, wanted)
    padding = found["embedding.word_embeddings.weight"][203:]
    assert padding.shape[0] == 256 - 203
    assert not padding.any()
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    assert common["args"].num_query_groups == model.kv_groups


def test_what_torch_itself_saves_is_read(tmp_path: Path) -> None:
    """In one box a tensor, with its checksum; and an object beside the tensors."""
    tensors = whole(llama.to_mcore(SHAPE, Held(models.weights(SHAPE))))
    content = {**tensors, "optimizer.state.exp_avg.x": torch.ones(3), "rng": {"a": 1}}
    dcp.save(content, checkpoint_id=tmp_path / "theirs", no_dist=True)
    with mcore.open_checkpoint(tmp_path / "theirs") as found:
        equal(whole(found), tensors)
        name = "decoder.layers.mlp.linear_fc1.weight"
        for layer in range(SHAPE.layers):
            assert torch.equal(found.read(name, layer), tensors[name][layer])


@pytest.mark.parametrize("stated", ["hf beside it", "--like", "arguments alone"])
def test_the_shape_is_taken_from_what_says_it(tmp_path: Path, stated: str) -> None:
    model, config = FAMILIES["llama-3.2"]
    source = models.write(tmp_path / "hf", model, config)
    into(source, tmp_path / "mcore")
    checkpoint = tmp_path / "mcore" / "release"
    if stated != "hf beside it":
        checkpoint = checkpoint.rename(tmp_path / "iter_0000007")
    like = source if stated == "--like" else None
    out_of(checkpoint, tmp_path / "back", like=like)
    equal(models.read(tmp_path / "back"), models.weights(model))
    config = orjson.loads((tmp_path / "back" / "config.json").read_bytes())
    assert llama_config.model_of(config, "config.json") == llama_config.model_of(
        llama_config.config_of(model), "config.json"
    )


def test_the_newest_of_several_is_taken(tmp_path: Path) -> None:
    source = models.write(tmp_path / "hf")
    into(source, tmp_path / "mcore")
    folder = tmp_path / "mcore"
    (folder / "release").rename(folder / "iter_0000020")
    (folder / "iter_0000009").mkdir()
    (folder / "latest_checkpointed_iteration.txt").unlink()
    assert interchange.newest(folder) == folder / "iter_0000020"
    (folder / "latest_checkpointed_iteration.txt").write_text("9\n")
    with pytest.raises(RequestError, match=r"iter_0000009: is no torch_dist checkpoint"):
        interchange.newest(folder)
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "checkpoints")
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("20")
    assert interchange.newest(run) == run / "checkpoints" / "iter_0000020"


def test_tokenizer_and_generation_settings_are_carried(tmp_path: Path) -> None:
    from tanren.data.tokenizer import train

    model = SHAPE.model_copy(update={"vocabulary_size": 260})
    source = models.write(tmp_path / "hf", model, {"eos_token_id": 1})
    train(["The smith folds the steel."] * 20, 256, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [1, 9]}')
    into(source, tmp_path / "mcore")
    out_of(tmp_path / "mcore", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    generation = orjson.loads((tmp_path / "back" / "generation_config.json").read_bytes())
    assert (generation["temperature"], generation["eos_token_id"]) == (0.6, [1, 9])


def test_equal_weights_make_equal_files(tmp_path: Path) -> None:
    """A run knows by the sizes of the files what it was made from."""
    source = models.write(tmp_path / "hf")
    for name in ("one", "two"):
        into(source, tmp_path / name)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "release").iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    # A file a thread, and one of empty scales for Megatron-LM.
    assert len([name for name in one if name.endswith(".distcp")]) == 4 + 1


BIG = Model(
    layers=24, hidden_size=512, ffn_hidden_size=2048, attention_heads=4, kv_groups=2,
    vocabulary_size=8192, max_positions=64, rotary_base=5e5, norm_epsilon=1e-6,
)  # fmt: skip
PEAK = """
import resource, sys
from pathlib import Path
from tanren.convert import interchange
from tanren.convert.interchange import Options
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
root, before = Path(sys.argv[1]), peak()
interchange.hf_to_mcore(root / "hf", root / "mcore", Options(), lambda text: None)
interchange.mcore_to_hf(root / "mcore", root / "back", Options(), lambda text: None)
print(peak() - before)
"""


def test_memory_is_a_few_boxes_and_not_the_model(tmp_path: Path) -> None:
    """Mapped pages count: they are given back as soon as they are written."""
    models.write(tmp_path / "hf", BIG)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < BIG.parameters  # half of the model's bytes
    equal(models.read(tmp_path / "back"), models.weights(BIG))


def test_a_killed_conversion_leaves_nothing_under_the_name_and_is_made_anew(
    tmp_path: Path,
) -> None:
    models.write(tmp_path / "hf", BIG)
    words = [sys.executable, "-m", "tanren.cli", "convert", "hf-to-mcore",
             str(tmp_path / "hf"), str(tmp_path / "mcore")]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("mcore.partial/release.partial/*.distcp")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "mcore").exists()
    subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]
    out_of(tmp_path / "mcore", tmp_path / "back")
    equal(models.read(tmp_path / "back"), models.weights(BIG))


def test_arguments_of_another_model_are_refused(tmp_path: Path) -> None:
    source = models.write(tmp_path / "hf")
    into(source, tmp_path / "mcore")
    common = tmp_path / "mcore" / "release" / "common.pt"
    content = torch.load(common, weights_only=False)
    content["args"].rotary_base = 10000.0
    torch.save(content, common)
    (tmp_path / "mcore" / "release" / "files.json").unlink()
    with pytest.raises(RequestError, match=r"rotary_base 10000\.0 there, 500000\.0 here"):
        out_of(tmp_path / "mcore", tmp_path / "back")
    content["args"] = argparse.Namespace(num_layers=3)
    torch.save(content, common)
    (tmp_path / "mcore" / "hf" / "config.json").unlink()
    with pytest.raises(RequestError, match="release: does not say all of its shape"):
        out_of(tmp_path / "mcore", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_amounts_are_said_in_a_unit_of_their_size() -> None:
    assert interchange.amount(8_590_000_000) == "8.59 B"
    assert interchange.amount(2_361_024) == "2.4 M"
    assert interchange.amount(17_180_000_000, "G") == "17.18 G"
