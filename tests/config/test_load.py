"""Reading recipes: each mistake is one message with its place, its problem and what to do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tanren.config import load
from tanren.config.data import Preprocess
from tanren.config.errors import RequestError
from tanren.config.load import merge, parse_set, read_recipe, read_user
from tanren.config.schema import STAGES, Convert, Export, Recipe
from tanren.config.site import User
from tanren.config.training import Midtrain, Training

RECIPES = load.repository() / "recipes"
MIDTRAIN = """\
#!/usr/bin/env -S tanren midtrain
model: tiny
data: stage:preprocess
init: stage:convert
sequence_length: 128
global_batch: 8
steps: 320
optimizer:
  lr: 3.0e-3
  beta2: 0.99
checkpoints:
  every_steps: 80
"""
PREPROCESS = """\
tokenizer: {train: {vocabulary_size: 2048}}
sources:
  - name: reference
    python_documentation: topics
"""
FIELDS = (
    "model, init, sequence_length, global_batch, micro_batch, main_gradients, steps, precision, "
    "fp8, attention, linear, optimizer, schedule, layout, checkpoints, seed, job, tracking, "
    "measured, data, mix, resume, split, tokens, z_loss, evaluation"
)
OPTIMIZER = "lr, min_lr, beta1, beta2, epsilon, weight_decay, clip_grad, moments"
HINT = "YAML reads a number such as 5e-5 as text: write 5.0e-5"
fast = settings(max_examples=60, deadline=None, database=None)


@dataclass
class Folder:
    """A folder with recipes; what it refuses to read is told without the folder's name."""

    path: Path

    def write(self, **files: str) -> None:
        """`midtrain_100B=TEXT` is midtrain.100B.yaml."""
        for name, text in files.items():
            (self.path / f"{name.replace('_', '.')}.yaml").write_text(text, encoding="utf-8")

    def read(self, *sets: str, name: str = "midtrain", variant: str | None = None) -> Recipe:
        stage, recipe = read_recipe(self.path / f"{name}.yaml", variant, list(sets))
        assert stage == Path(name).stem
        assert type(recipe) is STAGES[stage]
        return recipe

    def midtrain(self, *sets: str, variant: str | None = None) -> Midtrain:
        recipe = self.read(*sets, variant=variant)
        assert isinstance(recipe, Midtrain)
        return recipe

    def refusal(self, *sets: str, name: str = "midtrain", variant: str | None = None) -> str:
        with pytest.raises(RequestError) as caught:
            self.read(*sets, name=name, variant=variant)
        assert caught.value.exit_code == 2
        return str(caught.value).replace(f"{self.path}/", "").replace(str(self.path), "FOLDER")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    found = Folder(tmp_path)
    found.write(midtrain=MIDTRAIN)
    return found


def recipes() -> Iterator[Path]:
    for path in sorted(RECIPES.glob("*/*.yaml")):
        if path.parent.name not in ("models", "sites"):
            yield path


def test_every_recipe_of_the_repository_is_read() -> None:
    found = list(recipes())
    assert found, f"no recipe under {RECIPES}"
    stages = set()
    for path in found:
        stage, recipe = read_recipe(path, None, [])
        stages.add(stage)
        if isinstance(recipe, Training | Convert):
            assert load.read_model(recipe.model).layers > 0
    assert stages == set(STAGES)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "steps: 320",
            "steps: 320\nstepps: 320",
            "midtrain.yaml:8: stepps: is not a field here (did you mean steps?); the fields are "
            f"{FIELDS}",
        ),
        (
            "  lr:",
            "  rate: 1.0\n  lr:",
            f"midtrain.yaml:9: optimizer.rate: is not a field here; the fields are {OPTIMIZER}",
        ),
        ("128", "big", "midtrain.yaml:5: sequence_length: 'big': input should be a valid integer"),
        ("128", "1.5", "midtrain.yaml:5: sequence_length: 1.5: input should be a valid integer"),
        ("128", "yes", "midtrain.yaml:5: sequence_length: True: input should be a valid integer"),
        ("128", "0", "midtrain.yaml:5: sequence_length: 0: input should be greater than 0"),
        ("tiny", "8", "midtrain.yaml:2: model: 8: input should be a valid string"),
        (
            "checkpoints:\n  every_steps: 80",
            "checkpoints: 80",
            "midtrain.yaml:11: checkpoints: 80: input should be an object",
        ),
        (
            "3.0e-3",
            "5e-5",
            f"midtrain.yaml:9: optimizer.lr: '5e-5': input should be a valid number. {HINT}",
        ),
        (
            "80",
            "24:00:00",
            "midtrain.yaml:12: checkpoints.every_steps: YAML reads 24:00:00 as 86400.\n"
            "  next: write hours as a number, such as walltime_hours: 24",
        ),
        (
            "steps: 320",
            "model: huge",
            "midtrain.yaml:7: model: is stated twice.\n  next: the first is at midtrain.yaml:2",
        ),
        (" 8\n", " [8\n", "midtrain.yaml:7: not YAML: expected ',' or ']', but got ':'"),
        ("model: tiny", "model: *tiny", "midtrain.yaml:2: not YAML: found undefined alias 'tiny'"),
        ("steps: 320", "---", "midtrain.yaml:7: not YAML: but found another document"),
        ("model: tiny\n", "", "midtrain.yaml:2: model: is missing"),
        ("  lr: 3.0e-3\n", "", "midtrain.yaml:8: optimizer.lr: is missing"),
        (
            "steps: 320",
            "steps: 320\ntokens: 9",
            "midtrain.yaml: state only one of steps, tokens",
        ),
        (
            "beta2: 0.99",
            "min_lr: 1.0",
            "midtrain.yaml: optimizer.min_lr 1.0 is over lr 0.003",
        ),
        (
            "init: stage:convert",
            "init: /bases/8b",
            "midtrain.yaml:4: init: '/bases/8b' is not of the form hf:FOLDER, hf:OWNER/NAME, "
            "checkpoint:FOLDER/iter_0000500, stage:NAME, scratch or given",
        ),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file(folder: Folder, old: str, new: str, message: str) -> None:
    """Unknown, wrong, misread, repeated and missing fields, each at its line."""
    assert old in MIDTRAIN
    folder.write(midtrain=MIDTRAIN.replace(old, new, 1))
    assert folder.refusal() == (message if "\n" in message else f"{message}.")


def test_a_nested_field_that_is_stated_twice_names_both_lines(folder: Folder) -> None:
    folder.write(midtrain=MIDTRAIN.replace("beta2", "lr"))
    refusal = folder.refusal()
    assert refusal.startswith("midtrain.yaml:10: ")
    assert refusal.endswith("lr: is stated twice.\n  next: the first is at midtrain.yaml:9")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "- model: tiny\n",
            "midtrain.yaml: holds a list, not fields with values.\n"
            "  next: write `field: value` lines",
        ),
        (
            "model\n",
            "midtrain.yaml: holds a str, not fields with values.\n"
            "  next: write `field: value` lines",
        ),
        (
            "12\n",
            "midtrain.yaml: holds a int, not fields with values.\n"
            "  next: write `field: value` lines",
        ),
    ],
)
def test_a_file_that_is_not_fields_with_values(folder: Folder, text: str, message: str) -> None:
    folder.write(midtrain=text)
    assert folder.refusal() == message


def test_an_empty_file_misses_every_field_that_has_no_default(folder: Folder) -> None:
    folder.write(midtrain="# nothing yet\n")
    fields = ("model", "init", "sequence_length", "global_batch", "optimizer", "checkpoints")
    lines = [f"midtrain.yaml: {field}: is missing" for field in (*fields, "data")]
    assert folder.refusal() == lines[0] + ".\n  next: also " + "\n        also ".join(lines[1:])


def test_bytes_that_are_not_text(folder: Folder) -> None:
    (folder.path / "midtrain.yaml").write_bytes("鍛錬".encode("euc_jp"))
    assert folder.refusal().startswith("midtrain.yaml: cannot be read: 'utf-8' codec can't decode")


def test_a_misspelled_field_comes_before_the_one_that_is_missing(folder: Folder) -> None:
    folder.write(midtrain=MIDTRAIN.replace("global_batch", "globl_batch"))
    first, *others = folder.refusal().splitlines()
    assert first.startswith("midtrain.yaml:6: globl_batch: is not a field here (did you mean glob")
    assert others == ["  next: also midtrain.yaml:2: global_batch: is missing"]


def test_several_mistakes_are_one_message(folder: Folder) -> None:
    text = MIDTRAIN.replace("global_batch: 8", "global_batch: 0").replace("3.0e-3", "5e-5")
    folder.write(midtrain=text.replace("80", "80\n  keep: 2"))
    assert folder.refusal() == (
        "midtrain.yaml:6: global_batch: 0: input should be greater than 0.\n"
        f"  next: also midtrain.yaml:9: optimizer.lr: '5e-5': input should be a valid number. "
        f"{HINT}\n"
        "        also midtrain.yaml:13: checkpoints.keep: is not a field here (did you mean "
        "keep_last?); the fields are every_steps, every_minutes, keep_last, keep_every"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "python_documentation: topics",
            "path: a.jsonl\n    kind: b",
            "preprocess.yaml:5: sources.0.kind: is not a field here; the fields are name, path, "
            "hf, files, python_documentation, text_key.",
        ),
        (
            "vocabulary_size: 2048",
            "vocabulary_size: 2048, size: 1",
            "preprocess.yaml:1: tokenizer.train.size: is not a field here; the fields are "
            "vocabulary_size.",
        ),
        (
            "topics\n",
            "topics\n  - name: other\n",
            "preprocess.yaml:5: sources.1: state exactly one of path, hf, python_documentation.",
        ),
        (
            "topics\n",
            "topics\n  - name: reference\n    path: a.jsonl\n",
            "preprocess.yaml: two sources are named reference.",
        ),
    ],
)
def test_places_in_lists_and_inner_mappings(
    folder: Folder, old: str, new: str, message: str
) -> None:
    """A field of a list's item, of an optional mapping, and the validators of both."""
    assert old in PREPROCESS
    folder.write(preprocess=PREPROCESS.replace(old, new))
    # What pydantic adds when an item falls out of its list is not ours to fix the words of.
    assert folder.refusal(name="preprocess").split("\n")[0] == message


def test_a_list_is_read_whole(folder: Folder) -> None:
    folder.write(preprocess=PREPROCESS + "  - {name: b, path: b.jsonl}\n")
    recipe = folder.read(name="preprocess")
    assert isinstance(recipe, Preprocess)
    assert [source.name for source in recipe.sources] == ["reference", "b"]


@pytest.mark.parametrize(
    ("name", "variant", "message"),
    [
        (
            "convert",
            None,
            "convert.yaml: there is no such file.\n"
            "  next: FOLDER has midtrain.100B.yaml, midtrain.yaml",
        ),
        (
            "midtrain",
            "100b",
            "midtrain.100b.yaml: there is no such file.\n"
            "  next: FOLDER has midtrain.100B.yaml, midtrain.yaml",
        ),
        (
            "other/midtrain",
            None,
            "other/midtrain.yaml: there is no such file.\n"
            "  next: the folder other does not exist either",
        ),
        (
            "void/midtrain",
            None,
            "void/midtrain.yaml: there is no such file.\n  next: void is empty",
        ),
        (
            "pretrain",
            None,
            "pretrain.yaml: the file's name is not that of a stage.\n"
            "  next: one of preprocess.yaml, convert.yaml, midtrain.yaml, sft.yaml, dpo.yaml, "
            "export.yaml, merge.yaml, eval.yaml",
        ),
    ],
)
def test_a_file_that_is_not_there(
    folder: Folder, name: str, variant: str | None, message: str
) -> None:
    """The message names the files that are."""
    folder.write(midtrain_100B="base: midtrain.yaml\n")
    if "/" in name:
        (folder.path / "void").mkdir()
    assert folder.refusal(name=name, variant=variant) == message


def test_a_variant_lies_over_its_base(folder: Folder) -> None:
    """A chain of three: the nearest file wins, field by field, and `base` itself is gone."""
    folder.write(
        midtrain_10B="base: midtrain.yaml\nsteps: 500\noptimizer:\n  lr: 1.0e-3\nseed: 1\n",
        midtrain_100B="base: midtrain.10B.yaml\noptimizer: {min_lr: 1.0e-5}\nseed: 2\n",
    )
    plain, variant = folder.midtrain(), folder.midtrain(variant="100B")
    assert (plain.steps, plain.optimizer.lr, plain.optimizer.min_lr) == (320, 3.0e-3, 0.0)
    assert (variant.steps, variant.seed) == (500, 2)
    assert variant.optimizer.model_dump(include={"lr", "min_lr", "beta2"}) == {
        "lr": 1.0e-3, "min_lr": 1.0e-5, "beta2": 0.99,
    }  # fmt: skip
    assert variant.checkpoints == plain.checkpoints
    assert folder.midtrain(variant="10B").seed == 1


def test_null_in_a_variant_takes_a_field_of_the_base_away(folder: Folder) -> None:
    folder.write(midtrain_100B="base: midtrain.yaml\nsteps: null\ntokens: 1000\n")
    recipe = folder.midtrain(variant="100B")
    assert (recipe.steps, recipe.tokens) == (None, 1000)


def test_a_base_in_another_folder(folder: Folder) -> None:
    inner = Folder(folder.path / "inner")
    inner.path.mkdir()
    inner.write(midtrain="base: ../midtrain.yaml\nsteps: 7\n")
    assert inner.midtrain() == folder.midtrain("steps=7")


@pytest.mark.parametrize(
    ("base", "variant", "message"),
    [
        (
            MIDTRAIN.replace("3.0e-3", "fast"),
            "base: midtrain.yaml\n\noptimizer:\n  beta2: 0.9\n",
            "midtrain.yaml:9: optimizer.lr: 'fast': input should be a valid number.",
        ),
        (
            MIDTRAIN,
            "base: midtrain.yaml\n\noptimizer:\n  lr: fast\n",
            "midtrain.100B.yaml:4: optimizer.lr: 'fast': input should be a valid number.",
        ),
        (
            MIDTRAIN.replace("beta2", "beta3"),
            "base: midtrain.yaml\noptimizer:\n  beta1: 0.5\n",
            "midtrain.yaml:10: optimizer.beta3: is not a field here (did you mean beta2?); the "
            "fields are "
            f"{OPTIMIZER}.",
        ),
        (
            MIDTRAIN.replace("3.0e-3", "1:30"),
            "base: midtrain.yaml\n",
            "midtrain.yaml:9: optimizer.lr: YAML reads 1:30 as 90.\n"
            "  next: write hours as a number, such as walltime_hours: 24",
        ),
        (
            MIDTRAIN,
            "seed: 1\nbase: [midtrain.yaml]\n",
            "midtrain.100B.yaml:2: base: ['midtrain.yaml'] is not the name of a recipe file."
            "\n  next: name one that lies beside it, such as base: midtrain.yaml",
        ),
        (
            MIDTRAIN,
            "seed: 1\nbase: midtrain.100B.yaml\n",
            "midtrain.100B.yaml:2: base: midtrain.100B.yaml is its own base in the end."
            "\n  next: take `base:` out of one of the files",
        ),
        (
            "base: midtrain.100B.yaml\n",
            "seed: 1\nbase: midtrain.yaml\n",
            "midtrain.100B.yaml:2: base: midtrain.100B.yaml is its own base in the end."
            "\n  next: take `base:` out of one of the files",
        ),
        (
            MIDTRAIN,
            "base: midtrain.1B.yaml\n",
            "midtrain.1B.yaml: there is no such file.\n"
            "  next: FOLDER has midtrain.100B.yaml, midtrain.yaml",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_placed_in_the_file_that_makes_it(
    folder: Folder, base: str, variant: str, message: str
) -> None:
    """The base's line for what the base says, the variant's line for what the variant says."""
    folder.write(midtrain=base, midtrain_100B=variant)
    assert folder.refusal(variant="100B") == message


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("steps=8", 8),
        ("optimizer.lr=1.0e-5", 1.0e-5),
        ("layout={tensor: 2, sequence_parallel: true}", 2),
        ("model=llmjp4-8b", "llmjp4-8b"),
        ("init=hf:a=b", "hf:a=b"),
        ("mix.ratios.wiki=2", 2.0),
        ("evaluation=null", None),
        ("evaluation=", None),
    ],
)
def test_set_changes_one_field(folder: Folder, assignment: str, value: object) -> None:
    folder.write(midtrain=MIDTRAIN + "evaluation: {sequences: 8}\nsplit: 9,1,0\n")
    recipe = folder.midtrain(assignment)
    before, after = folder.midtrain().model_dump(), recipe.model_dump()
    (changed,) = [key for key in after if after[key] != before[key]]
    assert assignment.startswith(changed)
    found: dict[str, list[Any]] = {
        "steps": [recipe.steps], "optimizer": [recipe.optimizer.lr], "model": [recipe.model],
        "layout": [recipe.layout.tensor], "init": [recipe.init],
        "mix": list((recipe.mix.ratios or {}).values()), "evaluation": [recipe.evaluation],
    }  # fmt: skip
    assert value in found[changed]
    assert recipe.optimizer.beta2 == 0.99, "what stands beside the field stays"


def test_set_comes_last_and_in_order(folder: Folder) -> None:
    folder.write(midtrain_100B="base: midtrain.yaml\nsteps: 5\n")
    assert folder.midtrain("steps=6", "seed=1", "steps=7", variant="100B").steps == 7


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps=many", "--set: steps: 'many': input should be a valid integer."),
        ("optimizer.lr=fast", "--set: optimizer.lr: 'fast': input should be a valid number."),
        (
            "optimizer.lr=5e-5",
            f"--set: optimizer.lr: '5e-5': input should be a valid number. {HINT}.",
        ),
        ("schedule=null", "--set: schedule: None: input should be an object."),
        (
            "stepps=3",
            f"--set: stepps: is not a field here (did you mean steps?); the fields are {FIELDS}.",
        ),
        (
            "optimiser.lr=3",
            f"--set: optimiser: is not a field here (did you mean optimizer?); the fields are "
            f"{FIELDS}.",
        ),
        (
            "optimizer.rate=3",
            f"--set: optimizer.rate: is not a field here; the fields are {OPTIMIZER}.",
        ),
        (
            "steps=24:00:00",
            "--set: steps: YAML reads 24:00:00 as 86400.\n"
            "  next: write hours as a number, such as walltime_hours: 24",
        ),
        *(
            (
                form,
                f"--set {form}: is not of the form field.subfield=value.\n"
                "  next: for example --set optimizer.lr=1.0e-4",
            )
            for form in ("steps", "=3", "optimizer.=3", ".lr=3", "optimizer..lr=3", "")
        ),
    ],
)
def test_a_mistake_in_set(folder: Folder, assignment: str, message: str) -> None:
    assert folder.refusal("seed=1", assignment) == message


def test_a_set_value_that_is_not_yaml(folder: Folder) -> None:
    first = folder.refusal("steps=[1").split("\n")[0]
    assert first.startswith("--set steps=[1: the value is not YAML: ")


def test_text_with_colons_is_not_a_number(folder: Folder) -> None:
    """What is refused is a number that YAML makes of colons, not colons."""
    folder.write(export="of: stage:midtrain\nprompt: '24:00:00'\n")
    for sets, prompt in ((), "24:00:00"), (("prompt='1:30'",), "1:30"), (("prompt=1:3a",), "1:3a"):
        recipe = folder.read(*sets, name="export")
        assert isinstance(recipe, Export)
        assert recipe.prompt == prompt


@pytest.mark.parametrize(
    "one_key",
    ["init: {hf: some/model}", "init:\n  hf: some/model", "init: hf:some/model"],
)
def test_one_key_mapping_says_the_same_as_text(folder: Folder, one_key: str) -> None:
    folder.write(midtrain=MIDTRAIN.replace("init: stage:convert", one_key))
    assert folder.midtrain().init == "hf:some/model"
    assert folder.midtrain("data={stage: other}") == folder.midtrain("data=stage:other")


def test_user_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent: nothing is yours. Present: read. Named by TANREN_USER: that one, or an error."""
    monkeypatch.setattr(load, "repository", lambda: tmp_path)
    monkeypatch.delenv("TANREN_USER", raising=False)
    assert read_user() == User(runs=None)
    (tmp_path / "user.toml").write_text('runs = "/mine"\n')
    assert read_user() == User(runs="/mine")
    named = tmp_path / "named.toml"
    monkeypatch.setenv("TANREN_USER", str(named))
    with pytest.raises(RequestError) as caught:
        read_user()
    assert str(caught.value) == (
        f"{named}: TANREN_USER names a file that is not there.\n"
        "  next: name one that is, or unset TANREN_USER"
    )
    named.write_text('runs = "/disk"\n')
    assert read_user() == User(runs="/disk")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rums = 'a'",
            "user.toml: rums: is not a field here (did you mean runs?); the fields are site, "
            "group, runs, data, images, cache, binds, debian_mirror, tracking.",
        ),
        ("runs = 3", "user.toml: runs: 3: input should be a valid string."),
        (
            "runs = /disk",
            "user.toml: not TOML: Invalid value (at line 1, column 8).\n"
            "  next: mend that line; fields are site, group, runs, data, "
            "images, cache, binds, debian_mirror, tracking",
        ),
    ],
)
def test_a_mistake_in_user_toml(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    path = folder.path / "user.toml"
    path.write_text(text)
    monkeypatch.setenv("TANREN_USER", str(path))
    with pytest.raises(RequestError) as caught:
        read_user()
    assert str(caught.value).replace(f"{folder.path}/", "") == message


def test_a_model_that_is_not_there_names_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = tmp_path / "recipes" / "models"
    shelf.mkdir(parents=True)
    (shelf / "b.yaml").touch()
    (shelf / "a.yaml").touch()
    monkeypatch.setattr(load, "repository", lambda: tmp_path)
    with pytest.raises(RequestError) as caught:
        load.read_model("c")
    assert str(caught.value) == (
        f"{shelf}/c.yaml: there is no such file.\n  next: {shelf} has a.yaml, b.yaml"
    )


names = st.text("abcd_", min_size=1, max_size=2)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(min_codepoint=32, max_codepoint=126))
)
leaves = scalars | st.lists(scalars, max_size=2)
trees = st.recursive(
    st.dictionaries(names, leaves, min_size=1, max_size=3),
    lambda inner: st.dictionaries(names, leaves | inner, min_size=1, max_size=3),
    max_leaves=6,
)


def flat(tree: dict[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    result: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        here = (*above, key)
        result |= flat(value, here) if isinstance(value, dict) else {here: value}
    return result


@fast
@given(base=trees, changes=trees)
def test_merge_keeps_what_the_changes_do_not_touch(
    base: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Said again over leaves with their paths, where no mapping is walked."""
    before = copy.deepcopy((base, changes))
    new = flat(changes)
    kept = {
        path: value
        for path, value in flat(base).items()
        if not any(path[: len(other)] == other[: len(path)] for other in new)
    }
    merged = merge(base, changes)
    assert flat(merged) == kept | new
    assert merge(merged, changes) == merged
    assert merge(base, {}) == base == merge({}, base)
    assert (base, changes) == before, "the arguments stay as they were"


@fast
@given(keys=st.lists(names, min_size=1, max_size=3), value=leaves | trees)
def test_set_reads_back_what_yaml_writes(keys: list[str], value: Any) -> None:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    assignment = f"{'.'.join(keys)}={text}"
    expected = (tuple(keys), value)
    assert parse_set([assignment, "last=1"]) == [expected, (("last",), 1)]


@fast
@given(text=st.text(st.characters(min_codepoint=32, exclude_characters="=")))
def test_set_without_an_equals_sign_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is not of the form"):
        parse_set([text])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("3.0e-3", "1:30.5", "midtrain.yaml:9: optimizer.lr: YAML reads 1:30.5 as 90.5."),
        ("tiny", '"\x07"', "midtrain.yaml:2: not YAML: holds the control character 0x07."),
        ("tiny", "2020-13-45", "midtrain.yaml:2: model: 2020-13-45: month must be in 1..12."),
        ("320", "9" * 20, f"midtrain.yaml:7: steps: {'9' * 20} is not a number that can be used."),
        ("320", ".inf", "midtrain.yaml:7: steps: .inf is not a number that can be used."),
        (
            "init: stage:convert",
            "init:\n  hf:",
            "midtrain.yaml:4: init: {'hf': None}: input should be a valid string.",
        ),
        ("beta2", "lr", "midtrain.yaml:10: optimizer.lr: is stated twice."),
    ],
)
def test_values_that_yaml_allows_and_a_recipe_does_not(
    folder: Folder, old: str, new: str, message: str
) -> None:
    folder.write(midtrain=MIDTRAIN.replace(old, new, 1))
    assert folder.refusal().split("\n")[0] == message


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer={lr: fast}", "--set: optimizer.lr: 'fast': input should be a valid number."),
        (
            "checkpoints={every_steps: 1:00}",
            "--set: checkpoints.every_steps: YAML reads 1:00 as 60.",
        ),
        ("optimizer.lr=1:30.5", "--set: optimizer.lr: YAML reads 1:30.5 as 90.5."),
        ("layout={tensor: 2, tensor: 3}", "--set: layout.tensor: is stated twice."),
        ("layout.data=.inf", "--set: layout.data: .inf is not a number that can be used."),
        ("model=2020-13-45", "--set: model: 2020-13-45: month must be in 1..12."),
    ],
)
def test_a_mistake_inside_a_set_value(folder: Folder, assignment: str, message: str) -> None:
    assert folder.refusal(assignment).split("\n")[0] == message


def test_names_of_sources_are_what_is_written(folder: Folder) -> None:
    mix = "{ratios: {no: 1, 2024_01: 1, 1.10: 1}}"
    names = ["no", "2024_01", "1.10"]
    assert list(folder.midtrain(f"mix={mix}").mix.ratios or {}) == names
    folder.write(midtrain=MIDTRAIN + f"mix: {mix}\n")
    assert list(folder.midtrain().mix.ratios or {}) == names


def test_a_replaced_list_forgets_the_lines_of_the_old_one(folder: Folder) -> None:
    folder.write(
        preprocess=PREPROCESS, preprocess_b="base: preprocess.yaml\nsources:\n  - path: a.jsonl\n"
    )
    first = folder.refusal(name="preprocess", variant="b").split("\n")[0]
    assert first == "preprocess.b.yaml:3: sources.0.name: is missing."
    first = folder.refusal("sources=[{path: a}]", name="preprocess").split("\n")[0]
    assert first == "--set: sources.0.name: is missing."


def test_a_wrong_iteration_is_shown_with_its_value(folder: Folder) -> None:
    folder.write(export="of: stage:midtrain\niteration: newest\n")
    first = folder.refusal(name="export").split("\n")[0]
    assert first == "export.yaml:2: iteration: 'newest': input should be a valid integer."


def test_an_empty_tanren_user_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "repository", lambda: tmp_path)
    monkeypatch.setenv("TANREN_USER", "")
    assert read_user() == User()
    monkeypatch.setenv("TANREN_USER", str(tmp_path))
    with pytest.raises(RequestError):
        read_user()
