"""Every recipe is read, runs as a program, is in recipes/README.md, and plans on every site."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tanren.config.data import Preprocess
from tanren.config.errors import RequestError
from tanren.config.load import read_recipe, read_user, sites
from tanren.config.training import Midtrain
from tanren.data import hub
from tanren.launch import fetching, inputs, orders, queue, reading
from tanren.launch.mix import compile_mix
from tanren.launch.orders import Order
from tanren.launch.preview import Preview
from tanren.plan.make import make_plan
from tanren.plan.plan import MidtrainPlan, Plan, TrainingPlan
from tanren.plan.site import Wish
from tanren.report.plan import print_plan
from tests.conftest import REPOSITORY, tracked

ROOT = REPOSITORY / "recipes"
# Those of the repository: a user's own are none of them.
FILES = sorted(
    path
    for path in map(REPOSITORY.joinpath, tracked(":(glob)recipes/*/*.yaml"))
    if path.parent.name not in ("models", "sites")
)
TASKS = sorted({path.parent.name for path in FILES})
SITES = ["local", *sites()]
README = (ROOT / "README.md").read_text()
# The recipes that were not run: their figures are the plan's.
PLANNED = [path for path in FILES if path.stem.startswith("midtrain")
           and path.parent.name not in ("tiny", "llmjp4-8b-4layers")]  # fmt: skip

# What does not plan there, and why. Whoever runs it changes the layout, the hours or the nodes.
REFUSED = {
    # Longer than one job may take there: HOURS=24 and CHAIN=.
    ("v4-dolmino/midtrain.100B", "tsubame4"): "HOURS=48: a job of node_f on tsubame4 may take 24",
    ("v4-dolmino/midtrain.300B", "tsubame4"): "HOURS=120: a job of node_f on tsubame4 may take 24",
    ("v4-megamath/midtrain", "tsubame4"): "HOURS=36: a job of node_f on tsubame4 may take 24",
    ("tanuki-8b/midtrain.fp8", "local"): "fp8: delayed needs a GPU",
    ("llmjp4-8b/midtrain.fp8", "local"): "fp8: tensorwise needs a GPU",
    ("llmjp4-8b/sft.fp8", "local"): "fp8: tensorwise needs a GPU",
    # Text and a tokenizer that a user puts there.
    **{("swallow-8b/preprocess", site): "no file of source text is there" for site in SITES},
    **{("tanuki-8b/preprocess", site): "no file of source text is there" for site in SITES},
    **{("v4-megamath/preprocess", site): "tokenizer: there is no such folder" for site in SITES},
}  # fmt: skip
# What those need to plan all the same.
HELPED = [
    ("v4-dolmino/midtrain.300B", "tsubame4", (), Wish(hours=24)),
    ("v4-megamath/midtrain", "tsubame4", (), Wish(hours=24)),
]


@pytest.fixture(autouse=True)
def nothing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No runs, nothing fetched, no user.toml of one's own, no GPU."""
    (tmp_path / "user.toml").write_text('group = "g"\n')
    for name, value in (
        ("TANREN_USER", tmp_path / "user.toml"), ("RUNS", tmp_path / "runs"),
        ("DATA", tmp_path / "data"), ("CUDA_VISIBLE_DEVICES", ""), ("RUNTIME", "native"),
    ):  # fmt: skip
        monkeypatch.setenv(name, str(value))


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def order_of(path: Path, *sets: str) -> Order:
    stage, _, variant = path.stem.partition(".")
    return Order(path.with_name(f"{stage}.yaml"), variant or None, assignments=sets)


def planned(path: Path, site: str, *sets: str, wish: Wish | None = None) -> Plan:
    """The plan of a recipe on a site with nothing on disk; site `local` is a CPU."""
    order = order_of(path, *sets)
    if site == "local":
        return make_plan(reading.read_request(order))
    stage, recipe = orders.recipe_of(order)
    place = queue.place_of(site, recipe, stage, wish or Wish(), read_user())
    return make_plan(reading.read_request(order, queue.machine_of(place)))


def midtrain(name: str, site: str = "abci3", *sets: str, wish: Wish | None = None) -> MidtrainPlan:
    plan = planned(ROOT / f"{name}.yaml", site, *sets, wish=wish)
    assert isinstance(plan, MidtrainPlan)
    return plan


def without_ones_own(path: Path, tmp_path: Path) -> Path:
    """A copy of a recipe without the text and the tokenizer that a user may have put beside it.

    There are conversations, which a plan does not read.
    """
    folder = tmp_path / path.parent.name
    own = shutil.ignore_patterns("text", "tokenizer", "sft", "dpo")
    shutil.copytree(path.parent, folder, ignore=own)
    for stage in ("sft", "dpo"):
        (folder / stage).mkdir()
        (folder / stage / "one.jsonl").write_text("{}\n")
    return folder / path.name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_recipe_is_read_and_is_a_program(path: Path) -> None:
    stage, _ = read_recipe(path, None, [])
    assert path.read_text().splitlines()[0] == f"#!/usr/bin/env -S tanren {stage}"
    assert path.stat().st_mode & 0o111 == 0o111


def test_every_task_and_every_variant_is_in_the_readme() -> None:
    """And nothing else: the first cell of a row is a task, after it a variant."""
    rows = re.findall(r"^\| `([^`]+)`(?: `([^`]+)`)? \|", README, re.MULTILINE)
    assert sorted({task for task, _ in rows}) == TASKS
    variants = {
        (path.parent.name, path.stem.partition(".")[2]) for path in FILES if "." in path.stem
    }
    assert {(task, variant) for task, variant in rows if variant} == variants


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_the_stages_of_its_road(task: Path) -> None:
    there = {path.stem for path in FILES if path.parent.name == task}
    assert {"preprocess", "midtrain", "export"} <= there
    _, recipe = read_recipe(ROOT / task / "midtrain.yaml", None, [])
    assert isinstance(recipe, Midtrain)
    assert ("convert" in there) == (recipe.init == "stage:convert")


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_recipe_plans_on_a_site_or_is_refused_for_a_good_reason(
    tmp_path: Path, path: Path, site: str
) -> None:
    there = without_ones_own(path, tmp_path)
    reason = REFUSED.get((name_of(path), site))
    if reason is None:
        assert planned(there, site).folder.root.parent.name == path.parent.name
        return
    with pytest.raises(RequestError) as refused:
        planned(there, site)
    assert reason in refused.value.text()
    assert refused.value.next_step


def test_the_table_of_refusals_names_recipes() -> None:
    assert {name for name, _ in REFUSED} <= {name_of(path) for path in FILES}


@pytest.mark.parametrize(("name", "site", "sets", "wish"), HELPED)
def test_what_is_refused_plans_with_what_it_needs(
    tmp_path: Path, name: str, site: str, sets: tuple[str, ...], wish: Wish
) -> None:
    assert (name, site) in REFUSED
    plan = planned(without_ones_own(ROOT / f"{name}.yaml", tmp_path), site, *sets, wish=wish)
    assert isinstance(plan, TrainingPlan)
    assert plan.memory is not None


@pytest.mark.parametrize("task", ["swallow-8b", "tanuki-8b"])
def test_text_beside_a_recipe_is_found_and_never_committed(task: str) -> None:
    _, recipe = read_recipe(ROOT / task / "preprocess.yaml", None, [])
    assert isinstance(recipe, Preprocess)
    (source,) = recipe.sources
    assert source.path == "text/**/*.jsonl.gz"
    ignored = (REPOSITORY / ".gitignore").read_text().splitlines()
    assert {"/recipes/*/text", "/recipes/*/tokenizer"} <= set(ignored)


@pytest.mark.parametrize(
    ("name", "tokens", "steps"),
    [
        ("v4-dolmino/midtrain.50B", 55_797_411_281, 6_652),
        ("v4-dolmino/midtrain.100B", 113_460_356_693, 13_526),
        ("v4-dolmino/midtrain.300B", 337_681_167_151, 40_255),
        ("v4-megamath/midtrain", 83_527_699_000, 9_958),
        ("llmjp4-8b/midtrain", 500 * 512 * 4096, 500),
    ],
)
def test_the_runs_that_are_reproduced_have_their_tokens_and_steps(
    name: str, tokens: int, steps: int
) -> None:
    plan = midtrain(name)
    assert plan.mix is not None
    assert (plan.mix.tokens, plan.batch.steps) == (tokens, steps)
    _, mixture, _ = compile_mix(order_of(ROOT / f"{name}.yaml"), None)
    assert (mixture.tokens, mixture.steps) == (tokens, steps)


def test_the_plan_of_many_sources_reads_in_a_few_lines() -> None:
    text = io.StringIO()
    plan = midtrain("v4-dolmino/midtrain.300B")
    print_plan(Preview(plan), Console(file=text, soft_wrap=True))
    lines = text.getvalue().splitlines()
    assert [" ".join(line.split()) for line in lines[-9:]] == [
        "source tokens there ratio used epochs of the run",
        "dclm/* (25) 821,700,082,246 0.2078 170,749,277,101 0.21 50.57%",
        "flan/flan-all 18,485,484,042 2 36,970,968,084 2.00 10.95%",
        "math/* (7) 11,415,049,655 4 45,660,198,620 4.00 13.52%",
        "pes2o/pes2o-all 62,853,772,802 1 62,853,772,802 1.00 18.61%",
        "stackexchange/stackexchange-all 1,464,772,187 4 5,859,088,748 4.00 1.74%",
        "wiki/wiki-all 3,896,965,449 4 15,587,861,796 4.00 4.62%",
        "total 919,816,126,381 337,681,167,151",
        "337,681,167,151 tokens in 40,255 steps of 8,192 x 1,024 tokens",
    ]
    rows = {line[:15].strip(): line[15:] for line in lines[:-9]}
    assert rows["starts from"] == "given"
    assert rows["learning rate"] == "3e-05, constant, warm-up 0"
    assert rows["memory"].startswith("72 of 140 GiB a GPU")
    assert "tokens are those of dolmino_token_counts.tsv: preprocess has not run" in rows["note"]


def test_the_sources_of_dolmino_are_those_that_were_counted() -> None:
    """The first file that is known of each source is among its files, and of no other source."""
    _, recipe = read_recipe(ROOT / "v4-dolmino" / "preprocess.yaml", None, [])
    assert isinstance(recipe, Preprocess)
    table = inputs.read_counts(ROOT / "v4-dolmino" / "dolmino_token_counts.tsv")
    assert {source.name for source in recipe.sources} == set(table)
    assert len(table) == 36
    known = {
        "dclm/0000/dclm-0000.json.zst": "dclm/dclm-0000-0009",
        "dclm/0009/dclm-0007.json.zst": "dclm/dclm-0000-0009",
        "dclm/0010/dclm-0000.json.zst": "dclm/dclm-0010-0019",
        "dclm/0109/dclm-0000.json.zst": "dclm/dclm-0100-0109",
        "dclm/0239/dclm-0000.json.zst": "dclm/dclm-0230-0239",
        "dclm/0246/dclm-0000.json.zst": "dclm/dclm-0240-0246",
        "flan/tulu_flan-0000.json.gz": "flan/flan-all",
        "pes2o/pes2o-0000.json.gz": "pes2o/pes2o-all",
        "stackexchange/stackexchange-0000.json.gz": "stackexchange/stackexchange-all",
        "wiki/wiki-0000.json.gz": "wiki/wiki-all",
        "math/codesearchnet-owmfilter/go/0000.jsonl.gz": "math/codesearchnet-owmfilter-all",
        "math/gsm8k/main/train/0.jsonl.zst": "math/gsm8k-all",
        "math/gsm8k/socratic/train/0.jsonl.zst": "math/gsm8k-all",
        "math/gsm8k/main/test/0.jsonl.zst": None,
        "math/gsm8k/socratic/test/0.jsonl.zst": None,
        "math/metamath-owmfilter/0000.jsonl.gz": "math/metamath-owmfilter-all",
        "math/tulu_math/personahub_math_v5/train_0000.jsonl": "math/tulu_math-all",
        "math/dolmino_math_synth/gsm_mind/probem-solving/a.jsonl": "math/dolmino_math_synth-all",
        "math/dolmino_math_synth/basic_math/a.jsonl": "math/dolmino_math_synth-all",
        "math/mathcoder2-synthmath/ajibawa-2023/Maths-College-0-Final.jsonl":
            "math/mathcoder2-synthmath-all",
        "math/tinyGSM-MIND/2students/part000.jsonl.gz": "math/tinyGSM-MIND-all",
        "dclm/0247/dclm-0000.json.zst": None,
    }  # fmt: skip
    for path, wanted in known.items():
        takes = [
            source.name
            for source in recipe.sources
            if any(hub.matches(f"data/{path}", glob) for glob in source.files)
        ]
        assert takes == ([wanted] if wanted else []), path
    named = {name for name in known.values() if name is not None and not name.startswith("dclm")}
    assert named == {name for name in table if not name.startswith("dclm")}
    assert {source.hf for source in recipe.sources} == {recipe.sources[0].hf}


def test_a_recipe_of_many_sources_has_one_note_a_repository() -> None:
    _, recipe = read_recipe(ROOT / "v4-dolmino" / "preprocess.yaml", None, [])
    data, *tokenizer = sorted(fetching.notes(recipe, "v4-dolmino"))
    assert "(dclm/dclm-0000-0009, dclm/dclm-0010-0019, " in data
    assert ", ... (36 in all)) is not fetched yet: make fetch TASK=v4-dolmino" in data
    assert all("(tokenizer)" in note for note in tokenizer)
    assert len(tokenizer) == 2


@pytest.mark.parametrize("path", PLANNED, ids=name_of)
def test_the_readme_says_the_hours_that_the_plan_estimates(path: Path) -> None:
    task, _, variant = name_of(path).replace("/midtrain", "").partition(".")
    plan = midtrain(name_of(path), "tsubame4" if task == "swallow-8b" else "abci3")
    assert plan.hours is not None
    hours, _ = plan.hours
    cell = f"| `{task}` `{variant}` |" if variant else f"| `{task}` |"
    (row,) = [line for line in README.splitlines() if line.startswith(cell)]
    nodes = f"{plan.launch.nodes} x "
    assert f"| {nodes}" in row
    assert f", {hours:.2g} h" in row or f", {hours:.0f} h" in row
