"""Soups: what goes in is looked at, what comes out is whole, and its weights are what is meant."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tanren.config.errors import RequestError
from tanren.config.merge import Method
from tanren.config.model import Model
from tanren.convert import hf
from tanren.data import tokenizer as tokenizers
from tanren.environments import MERGE
from tanren.launch import reading
from tanren.launch.orders import Order
from tanren.plan.make import make_plan
from tanren.plan.paths import RunFolder
from tanren.plan.plan import MergePlan
from tanren.stages import merge
from tests.conftest import REPOSITORY, Tanren

FAKE = REPOSITORY / "tests" / "stages" / "fake_mergekit"
SHAPE = Model(
    layers=4, hidden_size=32, ffn_hidden_size=48, attention_heads=4, kv_groups=2, head_size=8,
    vocabulary_size=300, max_positions=64, rotary_base=5e5, norm_epsilon=1e-6,
)  # fmt: skip


def by_mergekit(test: Any) -> Any:
    """A test with the real one, where its environment is."""
    absent = not os.access(MERGE.python(), os.X_OK)
    return pytest.mark.merge(pytest.mark.skipif(absent, reason="bin/setup merge")(test))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `one`, `two` and `three` of one shape, and `deep`, `wide` and `foreign` of others."""
    root = tmp_path_factory.mktemp("models")
    tokenizers.train(["the smith folds the steel"] * 9, 270, root / "pieces")
    tokenizers.train(["a hammer on an anvil rings"] * 9, 270, root / "others")
    shapes = {"deep": {"layers": 5}, "wide": {"ffn_hidden_size": 64}}
    for seed, name in enumerate(("one", "two", "three", "deep", "wide", "foreign")):
        pieces = root / ("others" if name == "foreign" else "pieces")
        shape = SHAPE.model_copy(update=shapes.get(name, {}))
        hf.write_random(root / name, shape, pieces, seed)
    (root / "two" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    generation = orjson.loads((root / "two" / "generation_config.json").read_bytes())
    (root / "two" / "generation_config.json").write_bytes(
        orjson.dumps(generation | {"temperature": 0.6})
    )
    return root


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "models"))


def recipe_of(models: Path, /, *names: str, **fields: Any) -> Path:
    """A task with a soup of these."""
    folder = models.parent / "soup"
    folder.mkdir(exist_ok=True)
    values = {"merge_method": "linear", "dtype": "float32", "out_dtype": "bfloat16",
              "parameters": {"weight": 1.0}} | fields  # fmt: skip
    if names:
        values["models"] = [{"model": str(models / name)} for name in names]
    text = yaml.safe_dump(values).replace("ONE", str(models / "one"))
    (folder / "merge.yaml").write_text(text)
    return folder / "merge.yaml"


def planned(recipe: Path, monkeypatch: pytest.MonkeyPatch, *sets: str) -> MergePlan:
    monkeypatch.setenv("RUNS", str(recipe.parents[1] / "runs"))
    monkeypatch.setenv("RUNTIME", "native")
    plan = make_plan(reading.read_request(Order(recipe, assignments=sets)))
    assert isinstance(plan, MergePlan)
    return plan


@pytest.fixture
def mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mergekit of these tests, in this process."""
    monkeypatch.syspath_prepend(str(FAKE))


def run(plan: MergePlan) -> dict[str, Any]:
    plan.folder.root.mkdir(parents=True)
    merge.run(plan, 1)
    found: dict[str, Any] = orjson.loads(plan.folder.done.read_bytes())
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def read(path: Path) -> Any:
    return orjson.loads(path.read_bytes())


@pytest.mark.usefixtures("mean")
def test_a_soup_is_a_whole_model_with_the_tokenizer_that_has_a_template(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models / "one" / "config.json").write_bytes(
        orjson.dumps(read(models / "one" / "config.json") | {"use_cache": False})
    )
    plan = planned(recipe_of(models, "one", "two"), monkeypatch)
    result = run(plan)
    merged = RunFolder(plan.folder.root).hf_merged
    assert result["hf"] == str(merged)
    assert (result["chat"], result["tokenizer_of"]) == (True, str(models / "two"))
    assert result["models"] == {str(models / name): str(models / name) for name in ("one", "two")}
    assert Model.model_validate(result["model"]) == SHAPE
    # Of the first, with the type of the tensors, and nothing that mergekit wrote.
    assert read(merged / "config.json") == read(models / "one" / "config.json")
    assert read(merged / "generation_config.json")["temperature"] == 0.6
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged / file).read_bytes() == (models / "two" / file).read_bytes()
    assert (merged / "model.safetensors").stat().st_mode & 0o044
    assert sorted(path.name for path in merged.parent.iterdir()) == ["merged"]
    asked = read(plan.folder.mergekit)
    assert asked["models"][0] == {"model": {"model": {"path": str(models / "one")}}}
    assert "seed" not in asked


@pytest.mark.usefixtures("mean")
def test_a_soup_that_is_not_finite_gets_no_name(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models / "one", models / "broken")
    plan = planned(recipe_of(models, "broken", "two"), monkeypatch)
    with pytest.raises(RequestError, match=r"model\.norm\.weight holds nan at \[3\]"):
        run(plan)
    assert not plan.folder.done.exists()
    assert list(plan.folder.hf.iterdir()) == []


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.usefixtures("mean")
@pytest.mark.parametrize(
    ("names", "fields", "place", "problem", "step"),
    [
        (("one", "wide"), {}, "wide", "is of another shape than {one}: ffn_hidden_size 64 instead "
         "of 48", "one base"),
        (("one", "deep"), {}, "deep", "layers 5 instead of 4", "one base"),
        (("one", "foreign"), {}, "foreign", "has another tokenizer than {one}: ",
         "tokenizer_source: union"),
        (("one", "cut"), {}, "model.safetensors", "is not whole", "again"),
        (("one", "bare"), {}, "config.json", "is missing", "a model"),
        (("one", "two"), {"parameters": {"normalize": False}}, "merge_method linear",
         "mergekit refuses it: Unknown parameter normalize", "documentation"),
        ((), {"slices": [{"sources": [{"model": "ONE", "layer_range": [0, 5]}]}]},
         "layer_range [0, 5]", "goes beyond the 4 layers of {one}", "at most 4"),
        (("mute", "mute"), {}, "models", "none of them carries a tokenizer", "tokenizer's files"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(
    models: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...],
    fields: dict[str, Any], place: str, problem: str, step: str,
) -> None:  # fmt: skip
    for name in ("cut", "bare", "mute"):
        shutil.copytree(models / "two", models / name)
    cut(models / "cut" / "model.safetensors")
    (models / "bare" / "config.json").unlink()
    for path in models.glob("mute/token*"):
        path.unlink()
    plan = planned(recipe_of(models, *names, **fields), monkeypatch)
    with pytest.raises(RequestError) as caught:
        run(plan)
    error = caught.value
    assert place in error.place
    assert problem.format(one=models / "one") in error.problem
    assert "\n" not in error.problem
    assert step in error.next_step
    assert not plan.folder.done.exists()
    assert not plan.folder.hf_merged.exists()


def test_special_tokens_are_found_again_under_other_ids() -> None:
    values = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None, "top_k": 2}
    merge._renumber(values, {"<s>": 1, "</s>": 2, "gone": 7}, {"<s>": 0, "</s>": 9})
    assert values == {"bos_token_id": 0, "eos_token_id": [9, 7], "pad_token_id": None, "top_k": 2}


def real(models: Path, recipe: Path, *words: str, variant: str = "") -> Path:
    """The command with mergekit in its own environment; the folder of the soup."""
    tanren = Tanren(models.parent / "runs")
    done = tanren("merge", str(recipe), *words)
    assert (done.code, done.err) == (0, ""), done.text
    return tanren.runs / "soup" / f"merge{variant}" / "hf" / "merged"


@by_mergekit
def test_a_linear_soup_is_the_mean_of_the_weights(models: Path) -> None:
    merged = real(models, recipe_of(models, "one", "two"))
    one, two, soup = (tensors(folder) for folder in (models / "one", models / "two", merged))
    assert len(soup) == len(one) == len(two)
    for name, tensor in soup.items():
        assert tensor.dtype == torch.bfloat16
        mean = (one[name].double() + two[name].double()) / 2
        assert torch.equal(tensor, mean.float().bfloat16()), name
    assert read(merged / "config.json") == read(models / "one" / "config.json")
    assert (merged / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    assert not (merged / "README.md").exists()


@by_mergekit
def test_a_soup_in_fp32_is_the_weighted_sum(models: Path) -> None:
    weighted = [{"model": str(models / name), "parameters": {"weight": weight}}
                for name, weight in (("one", 0.2), ("two", 0.5), ("three", 0.3))]  # fmt: skip
    merged = real(models, recipe_of(models, models=weighted, parameters={"normalize": False},
                                    out_dtype="float32"))  # fmt: skip
    one, two, three, soup = (
        tensors(folder) for folder in (*(models / n for n in ("one", "two", "three")), merged)
    )
    assert read(merged / "config.json")["torch_dtype"] == "float32"
    for name, tensor in soup.items():
        wanted = 0.2 * one[name].double() + 0.5 * two[name].double() + 0.3 * three[name].double()
        assert torch.allclose(tensor.double(), wanted, rtol=1e-6, atol=1e-8), name


TASK_VECTORS = {"parameters": {"weight": 0.5, "density": 0.5}}


@by_mergekit
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("slerp", {"parameters": {"t": 0.5}}),
        ("ties", TASK_VECTORS),
        ("dare_ties", TASK_VECTORS),
        ("passthrough", {"parameters": {}}),
    ],
)
def test_other_methods_make_whole_models_and_the_same_ones_again(
    models: Path, method: str, fields: dict[str, Any]
) -> None:
    names, base = ("two", "three"), {"base_model": str(models / "one")}
    if method == "slerp":
        names = ("one", "two")
    if method == "passthrough":
        names, base = ("two",), {}
    recipe = recipe_of(models, *names, merge_method=method, **base, **fields)
    first, second = (tensors(real(models, recipe, "--name", name, variant=f"-{name}"))
                     for name in ("a", "b"))  # fmt: skip
    one, two = tensors(models / "one"), tensors(models / "two")
    assert len(first) == len(one)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        if name.endswith("proj.weight"):
            assert not torch.equal(tensor, one[name])
            assert torch.equal(tensor, two[name]) == (method == "passthrough")


@by_mergekit
def test_slices_make_a_deeper_model(models: Path) -> None:
    slices = [{"sources": [{"model": str(models / name), "layer_range": [start, end]}]}
              for name, start, end in (("one", 0, 4), ("two", 1, 4))]  # fmt: skip
    merged = real(models, recipe_of(models, merge_method="passthrough", parameters={},
                                    slices=slices))  # fmt: skip
    assert read(merged / "config.json")["num_hidden_layers"] == 7
    soup, two = tensors(merged), tensors(models / "two")
    for part in ("mlp.up_proj", "self_attn.q_proj"):
        assert torch.equal(
            soup[f"model.layers.4.{part}.weight"], two[f"model.layers.1.{part}.weight"]
        )


@by_mergekit
def test_tokenizers_may_differ_when_it_is_said_whose_it_is(models: Path) -> None:
    foreign, one = (tokenizers.read(models / name).backend.pieces() for name in ("foreign", "one"))
    assert foreign != one
    recipe = recipe_of(models, "one", "foreign", tokenizer_source="union")
    merged = real(models, recipe, "--name", "union", variant="-union")
    both = tokenizers.read(merged).backend.pieces()
    assert set(both) == {*foreign, *one}
    rows = tensors(merged)["model.embed_tokens.weight"]
    assert len(rows) == len(both) == read(merged / "config.json")["vocab_size"]
    for key in ("bos_token_id", "eos_token_id"):
        piece = {"bos_token_id": "<s>", "eos_token_id": "</s>"}[key]
        assert read(merged / "config.json")[key] == both[piece]
    # A piece that one of them alone has is not mixed with anything.
    piece = next(piece for piece in foreign if piece not in one)
    theirs = tensors(models / "foreign")["model.embed_tokens.weight"]
    assert torch.equal(rows[both[piece]], theirs[foreign[piece]])
    recipe = recipe_of(models, "one", "foreign", tokenizer_source=str(models / "foreign"))
    merged = real(models, recipe, "--name", "theirs", variant="-theirs")
    assert tokenizers.read(merged).backend.pieces() == foreign
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (merged / file).read_bytes() == (models / "foreign" / file).read_bytes()


@by_mergekit
def test_what_mergekit_refuses_is_one_message(models: Path) -> None:
    recipe = recipe_of(models, "one", "two", merge_method="slerp", parameters={})
    done = Tanren(models.parent / "runs")("merge", str(recipe))
    assert done.code == 2
    assert "merge_method slerp: mergekit refuses it: " in done.err
    assert done.err.count("\n") == 2


@by_mergekit
def test_the_methods_are_those_of_mergekit() -> None:
    code = ("from mergekit.merge_methods import registered_methods as all\n"
            "print(*sorted(one.spec.name for one in all()))")  # fmt: skip
    found = subprocess.run(
        [MERGE.require(), "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == sorted(get_args(Method))


@by_mergekit
def test_a_soup_is_made_again_bit_for_bit(models: Path) -> None:
    recipe = recipe_of(models, "two", "three", merge_method="dare_ties",
                       base_model=str(models / "one"), **TASK_VECTORS)  # fmt: skip
    merged = real(models, recipe)
    tanren = Tanren(models.parent / "runs")
    done = tanren("reproduce", "soup/merge")
    assert (done.code, done.err) == (0, ""), done.text
    again = tanren.runs / "replays" / "1" / "soup" / "merge" / "hf" / "merged"
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / file).read_bytes() == (merged / file).read_bytes()
