"""Conversions to and from NeMo's folders and archives, by fixtures; tests/nemo asks NeMo itself."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tanren.config.errors import RequestError
from tanren.convert import hf, llama_config, mcore, nemo, nemo_config, torch_dist
from tanren.convert.interchange import Made, Options
from tanren.convert.tensors import Held
from tanren.plan.paths import PARTIAL
from tests.convert.compare import SCALING
from tests.convert.nemo_fixtures import write_hf

KINDS: tuple[nemo.Format, ...] = ("nemo1", "nemo2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    write_hf(folder, vocabulary_size=203, tokenizer_class="TokenizersBackend")
    return folder


@pytest.fixture
def there(base: Path, tmp_path: Path) -> dict[str, Path]:
    """The base in both of NeMo's formats."""
    for kind in KINDS:
        into(base, tmp_path / kind, kind=kind)
    return {kind: tmp_path / kind for kind in KINDS}


def into(source: Path, target: Path, kind: nemo.Format = "nemo2", **options: Any) -> Made:
    return nemo.hf_to_nemo(source, target, Options(**options), lambda text: None, kind=kind)


def out_of(source: Path, target: Path, like: Path | None = None, **options: Any) -> Made:
    return nemo.nemo_to_hf(source, target, Options(**options), lambda text: None, like=like)


def same(one: Path, other: Path) -> None:
    here, there = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    shapes = [llama_config.model_of(hf.read_config(folder), folder) for folder in (one, other)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_embeddings": True}, {"head_size": 24}, {"vocabulary_size": 203},
     {"dtype": torch.bfloat16}, {"rope_scaling": SCALING}],
    ids=["plain", "tied", "head-size", "vocabulary", "bf16", "scaled-rope"],
)  # fmt: skip
def test_there_and_back_is_bit_exact(
    tmp_path: Path, kind: nemo.Format, changes: dict[str, Any]
) -> None:
    write_hf(tmp_path / "hf", **changes)
    if kind == "nemo1" and "rope_scaling" in changes:
        with pytest.raises(RequestError, match=r"no other factors of a scaled rope"):
            into(tmp_path / "hf", tmp_path / "nemo", kind=kind)
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]
        return
    into(tmp_path / "hf", tmp_path / "nemo", kind=kind)
    out_of(tmp_path / "nemo", tmp_path / "back")
    same(tmp_path / "hf", tmp_path / "back")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).is_file()
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["torch_dtype"] == ("bfloat16" if "dtype" in changes else "float32")


def test_names_and_files_are_nemos(there: dict[str, Path], base: Path) -> None:
    for kind, weights, prefix in (
        ("nemo1", "model_weights", "model."), ("nemo2", "weights", "module."),
    ):  # fmt: skip
        stored = mcore.Checkpoint(there[kind] / weights).stored
        assert len(stored) == 9
        assert all(name.startswith(prefix) for name in stored)
        assert stored[f"{prefix}embedding.word_embeddings.weight"].shape == (203, 64)
        states = [
            name
            for name in torch_dist.read_metadata(there[kind] / weights).state_dict_metadata
            if "_extra_state" in name
        ]
        # Five parts of each of three layers, and the last norm.
        assert len(states) == 16
        assert f"{prefix}decoder.layers.mlp.linear_fc2._extra_state/shard_2_3" in states
    files = {str(path.relative_to(there["nemo2"])) for path in there["nemo2"].rglob("*.json")}
    assert {"context/io.json", "context/artifacts/generation_config.json", "weights/metadata.json",
            "context/nemo_tokenizer/tokenizer.json"} <= files  # fmt: skip
    config = yaml.safe_load((there["nemo1"] / "model_config.yaml").read_text())
    assert config["tokenizer"]["type"] == str(there["nemo1"] / "tokenizer")
    assert config["override_vocab_size"] == 203


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_class_is_one_that_transformers_4_has(
    there: dict[str, Path], base: Path, kind: str
) -> None:
    about = json.loads((base / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "TokenizersBackend"
    (found,) = there[kind].rglob("tokenizer_config.json")
    assert json.loads(found.read_text()) == about | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_relative_paths_are_taken(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "hf")
    for name, kind in (("one", "nemo1"), ("two", "nemo2"), ("three.nemo", "nemo1")):
        into(Path("hf"), Path(name), kind=kind)  # type: ignore[arg-type]
        out_of(Path(name), Path(f"back-{name}"))
        same(Path("hf"), Path(f"back-{name}"))


def test_an_archive_holds_what_the_folder_does_and_leaves_nothing_beside_it(
    base: Path, tmp_path: Path, there: dict[str, Path]
) -> None:
    into(base, tmp_path / "model.nemo", kind="nemo1")
    with tarfile.open(tmp_path / "model.nemo") as tar:
        packed = {name.removeprefix("./") for name in tar.getnames()}
    unpacked = {str(one.relative_to(there["nemo1"])) for one in there["nemo1"].rglob("*")}
    assert packed == unpacked
    out_of(tmp_path / "model.nemo", tmp_path / "back")
    same(base, tmp_path / "back")
    assert {one.name for one in tmp_path.iterdir()} == {"model.nemo", "back", "nemo1", "nemo2"}


def test_nemo_2_has_no_archives(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"NeMo 2 has no archives") as error:
        into(base, tmp_path / "model.nemo")
    assert "--format nemo1" in str(error.value.next_step)


def test_an_archive_that_is_cut_off_is_refused_and_nothing_stays(
    base: Path, tmp_path: Path
) -> None:
    into(base, tmp_path / "model.nemo", kind="nemo1")
    whole = (tmp_path / "model.nemo").read_bytes()
    (tmp_path / "model.nemo").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=r"model\.nemo: is no whole archive"):
        out_of(tmp_path / "model.nemo", tmp_path / "back")
    assert [one.name for one in tmp_path.iterdir()] == ["model.nemo"]


def test_an_archive_writes_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "evil").write_text("x")
    with tarfile.open(tmp_path / "in" / "model.nemo", "w") as tar:
        tar.add(tmp_path / "evil", arcname="../escaped")
    with pytest.raises(RequestError, match="no whole archive"):
        out_of(tmp_path / "in" / "model.nemo", tmp_path / "back")
    assert not (tmp_path / "escaped").exists()


def test_a_run_of_nemo_1_has_its_weights_under_step_last(
    base: Path, tmp_path: Path, there: dict[str, Path]
) -> None:
    run = there["nemo1"]
    (run / "model_weights").rename(run / "step=100-consumed_samples=1600-last")
    out_of(run, tmp_path / "back")
    same(base, tmp_path / "back")
    shutil.copytree(run / "step=100-consumed_samples=1600-last", run / "step=200-last")
    with pytest.raises(RequestError, match=r"holds several: step=100.*step=200-last"):
        out_of(run, tmp_path / "again")
    # As the step before DPO has it: a link says which.
    (run / "model_weights").symlink_to("step=200-last")
    out_of(run, tmp_path / "again")
    same(base, tmp_path / "again")


def test_a_run_of_nemo_2_has_its_checkpoint_below(
    base: Path, tmp_path: Path, there: dict[str, Path]
) -> None:
    below = tmp_path / "run" / "checkpoints"
    below.mkdir(parents=True)
    there["nemo2"].rename(below / "sft--step=9-last")
    for source in (tmp_path / "run", below, below / "sft--step=9-last"):
        out_of(source, tmp_path / "back")
        same(base, tmp_path / "back")
        shutil.rmtree(tmp_path / "back")


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("nemo1", "model."), ("nemo1", "model.module."), ("nemo2", "module.")],
)
def test_padding_of_any_size_is_left_out(
    base: Path, tmp_path: Path, there: dict[str, Path], kind: nemo.Format, prefix: str
) -> None:
    """NeMo pads to what its layout asks for, and may hold an optimizer's state beside."""
    weights = there[kind] / nemo._WEIGHTS[kind]
    stored = mcore.Checkpoint(weights)
    tensors = {name: stored.read(name).clone() for name in stored.stored}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padded = nemo.PREFIX[kind] + name
        tensors[padded] = torch.cat([tensors[padded], torch.full((309, 64), 9.0)])
    tensors = {prefix + name.removeprefix(nemo.PREFIX[kind]): one for name, one in tensors.items()}
    tensors["optimizer.state.exp_avg.x"] = torch.ones(4)
    shutil.rmtree(weights)
    weights.mkdir()
    torch_dist.write(weights, Held(tensors))
    # With no size stated the tokenizer's counts: 203 pieces.
    for file, key in (("model_config.yaml", "override_vocab_size"), ("context/model.yaml", "")):
        if (place := there[kind] / file).is_file():
            fields = yaml.safe_load(place.read_text())
            (fields if key else fields["config"]).pop(key or "vocab_size")
            place.write_text(yaml.safe_dump(fields))
    out_of(there[kind], tmp_path / "back")
    same(base, tmp_path / "back")


def test_only_torch_dist_is_read(there: dict[str, Path], tmp_path: Path) -> None:
    weights = there["nemo1"] / "model_weights"
    (weights / ".metadata").unlink()
    with pytest.raises(RequestError, match=r"\.metadata: is missing"):
        out_of(there["nemo1"], tmp_path / "back")
    (weights / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(RequestError, match=r"the format is zarr") as error:
        out_of(there["nemo1"], tmp_path / "back")
    assert "only torch_dist" in str(error.value.next_step)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("nemo1", {"bias": True}, r"bias is True"),
        ("nemo1", {"normalization": "layernorm1p"}, r"normalization is 'layernorm1p'"),
        ("nemo1", {"activation": "gelu"}, r"activation is 'gelu'"),
        ("nemo1", {"mcore_gpt": False}, r"mcore_gpt is False"),
        ("nemo1", {"num_layers": None}, r"states no layers"),
        ("nemo1", {"num_layers": 4}, r"is \[3, .* the model's is \[4, "),
        ("nemo1", {"hidden_size": "wide"}, r"hidden_size: Input should be"),
        ("nemo2", {"add_qkv_bias": True}, r"add_qkv_bias is True"),
        ("nemo2", {"window_size": [4096, 0]}, r"window_size is \[4096, 0\]"),
        ("nemo2", {"activation_func": {"_target_": "torch.nn.gelu"}}, r"is torch\.nn\.gelu"),
        ("nemo2", {"num_query_groups": 3}, r"attention_heads 4 is not a multiple of kv_groups 3"),
        ("nemo2", {"vocab_size": 300}, r"203 rows of embeddings, and the vocabulary is 300"),
    ],
)  # fmt: skip
def test_what_is_no_llama_or_does_not_fit_is_refused(
    there: dict[str, Path], tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    place = there[kind] / ("model_config.yaml" if kind == "nemo1" else "context/model.yaml")
    fields = yaml.safe_load(place.read_text())
    (fields if kind == "nemo1" else fields["config"]).update(change)
    place.write_text(yaml.safe_dump(fields))
    with pytest.raises(RequestError, match=message):
        out_of(there[kind], tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_folder_that_is_none_of_nemos_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"is no checkpoint of NeMo"):
        out_of(base, tmp_path / "back")
    with pytest.raises(RequestError, match=r"nothing: there is no such folder"):
        out_of(tmp_path / "nothing", tmp_path / "back")


def test_yaml_and_pickles_are_never_executed(there: dict[str, Path], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    context = there["nemo2"] / "context"
    (context / "io.pkl").write_bytes(pickle.dumps(Evil()))
    out_of(there["nemo2"], tmp_path / "back")
    assert not (tmp_path / "executed").exists()
    (context / "model.yaml").write_text(
        f"config: !!python/object/apply:os.mkdir ['{tmp_path / 'executed'}']"
    )
    with pytest.raises(RequestError, match=r"model\.yaml: is no YAML"):
        out_of(there["nemo2"], tmp_path / "again")
    assert not (tmp_path / "executed").exists()


def test_without_model_yaml_the_graph_states_the_shape(there: dict[str, Path]) -> None:
    context = there["nemo2"] / "context"
    whole = nemo_config.read_nemo2(context, 0)
    (context / "model.yaml").unlink()
    assert nemo_config.read_nemo2(context, 0) == whole
    graph = (context / "io.json").read_text()
    (context / "io.json").write_text(graph.replace('"LlamaConfig"', '"Llama3Config8B"'))
    with pytest.raises(RequestError, match=r"model\.yaml: is missing.*is a Llama3Config8B"):
        nemo_config.read_nemo2(context, 0)
    (context / "io.json").write_text('{"objects": {}}')
    with pytest.raises(RequestError, match=r"describes no model"):
        nemo_config.read_nemo2(context, 0)


def test_a_tokenizer_of_ones_own_is_taken(
    base: Path, there: dict[str, Path], tmp_path: Path
) -> None:
    shutil.rmtree(there["nemo1"] / "tokenizer")
    config = there["nemo1"] / "model_config.yaml"
    fields = yaml.safe_load(config.read_text())
    fields["tokenizer"]["type"] = "/nowhere"
    config.write_text(yaml.safe_dump(fields))
    out_of(there["nemo1"], tmp_path / "without")
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    del fields["override_vocab_size"]
    config.write_text(yaml.safe_dump(fields))
    with pytest.raises(RequestError, match=r"states no size of the vocabulary") as error:
        out_of(there["nemo1"], tmp_path / "back")
    assert "--like" in str(error.value.next_step)
    out_of(there["nemo1"], tmp_path / "back", like=base)
    same(base, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_another_type_is_written_when_it_is_asked_for(
    base: Path, tmp_path: Path, kind: nemo.Format
) -> None:
    into(base, tmp_path / "nemo", kind=kind, dtype="bf16")
    with nemo.open_checkpoint(tmp_path / "nemo", tmp_path) as there:
        assert {one.dtype for one in there.tensors.stored.values()} == {torch.bfloat16}
    out_of(tmp_path / "nemo", tmp_path / "back", dtype="fp32")
    here, back = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "back"))
    assert len(back) == 30
    for name, tensor in back.items():
        assert torch.equal(tensor, here[name].bfloat16().float())


def test_what_fails_leaves_the_old_folder(base: Path, tmp_path: Path) -> None:
    into(base, tmp_path / "nemo")
    before = (tmp_path / "nemo" / "context" / "io.json").read_bytes()
    broken = shutil.copytree(base, tmp_path / "broken")
    config = orjson.loads((broken / "config.json").read_bytes())
    (broken / "config.json").write_bytes(orjson.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(RequestError, match=r"holds no tensor model\.layers\.3"):
        into(broken, tmp_path / "nemo", force=True)
    assert (tmp_path / "nemo" / "context" / "io.json").read_bytes() == before
    assert not (tmp_path / ("nemo" + PARTIAL)).exists()


def test_what_is_there_is_replaced_only_by_force(base: Path, tmp_path: Path) -> None:
    for target, kind in ((tmp_path / "model.nemo", "nemo1"), (tmp_path / "nemo", "nemo2")):
        into(base, target, kind)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="is there already") as error:
            into(base, target, kind)  # type: ignore[arg-type]
        assert "--force" in str(error.value.next_step)
        into(base, target, kind, dtype="bf16", force=True)  # type: ignore[arg-type]
        back = out_of(target, tmp_path / "back", force=True)
        assert hf.read_config(back.folder)["torch_dtype"] == "bfloat16"
    (tmp_path / "folder.nemo").mkdir()
    with pytest.raises(RequestError, match=r"folder\.nemo: is a folder"):
        into(base, tmp_path / "folder.nemo", "nemo1", force=True)
    with pytest.raises(RequestError, match="is the folder that is read"):
        out_of(tmp_path / "nemo", tmp_path / "nemo", force=True)


def test_a_folder_of_the_model_says_its_vocabulary_and_settings(
    there: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    """NeMo 1 states no vocabulary, and a tokenizer may have fewer pieces than there are rows."""
    like = shutil.copytree(base, tmp_path / "like")
    config = hf.read_config(like)
    (like / "config.json").write_bytes(orjson.dumps(config | {"pad_token_id": 5}))
    tokenizer = orjson.loads((like / "tokenizer.json").read_bytes())
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    del tokenizer["model"]["vocab"][last]
    (like / "tokenizer.json").write_bytes(orjson.dumps(tokenizer))
    place = there["nemo1"] / "model_config.yaml"
    fields = yaml.safe_load(place.read_text())
    del fields["override_vocab_size"]
    place.write_text(yaml.safe_dump(fields))
    shutil.copyfile(like / "tokenizer.json", there["nemo1"] / "tokenizer" / "tokenizer.json")
    rows = {}
    for name, given in (("without", None), ("with", like)):
        out_of(there["nemo1"], tmp_path / name, like=given)
        rows[name] = load_file(tmp_path / name / "model.safetensors")["lm_head.weight"].shape[0]
    assert rows == {"without": 202, "with": 203}
    same(base, tmp_path / "with")
    assert hf.read_config(tmp_path / "with")["pad_token_id"] == 5
    (like / "config.json").write_bytes(orjson.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(RequestError, match=r"rotary_base 5\.0 there, 10000\.0 here"):
        out_of(there["nemo1"], tmp_path / "back", like=like)


def test_the_command_converts_there_and_back(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tanren.cli import app

    monkeypatch.chdir(tmp_path)
    # The command's own handler of SIGTERM is not to stay in this process.
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    shutil.copytree(base, "hf")
    for words in (
        "hf-to-nemo hf model.nemo --format nemo1 --dtype bf16",
        "nemo-to-hf model.nemo back --max-shard-size 100KB --like hf",
    ):
        done = CliRunner().invoke(app, ["convert", *words.split()])
        assert done.exit_code == 0, done.exception
    assert len(list(Path("back").glob("*.safetensors"))) > 2
    assert hf.read_config(Path("back"))["torch_dtype"] == "bfloat16"


def test_a_tensor_that_is_not_finite_ends_a_conversion_either_way(
    base: Path, tmp_path: Path, there: dict[str, Path]
) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    broken = shutil.copytree(base, tmp_path / "broken")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(RequestError, match=r"linear_fc2.*nan at \[3, 5\]"):
        into(broken, tmp_path / "nemo")
    weights = there["nemo2"] / "weights"
    stored = mcore.Checkpoint(weights)
    held = {name: stored.read(name).clone() for name in stored.stored}
    held["module.decoder.final_layernorm.weight"][7] = torch.inf
    shutil.rmtree(weights)
    weights.mkdir()
    torch_dist.write(weights, Held(held))
    with pytest.raises(RequestError, match=r"model\.norm\.weight holds inf at \[7\]"):
        out_of(there["nemo2"], tmp_path / "back")
    assert {one.name for one in tmp_path.iterdir()} == {"broken", "nemo1", "nemo2"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("module.decoder.layers.mlp.linear_fc1.adapter.linear_in.weight", "holds adapters"),
        ("module.decoder.layers.mlp.router.weight", "a LLaMA of this shape has not: .*router"),
        ("module.decoder.layers.self_attention.linear_qkv.bias", "has not: .*linear_qkv.bias"),
    ],
)
def test_tensors_that_a_llama_has_not_are_named(
    tmp_path: Path, there: dict[str, Path], name: str, message: str
) -> None:
    weights = there["nemo2"] / "weights"
    stored = mcore.Checkpoint(weights)
    held = {one: stored.read(one).clone() for one in stored.stored} | {name: torch.ones(3, 4)}
    shutil.rmtree(weights)
    weights.mkdir()
    torch_dist.write(weights, Held(held))
    with pytest.raises(RequestError, match=message):
        out_of(there["nemo2"], tmp_path / "back")
