"""Preprocess on several nodes: a job a part and one that joins; what is done is not done again."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from tanren import runs
from tanren.config.errors import RequestError
from tanren.data import indexed
from tanren.data import tokenizer as tokenizers
from tanren.launch import inputs, order_file, orders, reading, submit
from tanren.plan.make import make_plan
from tanren.plan.paths import Part, RunFolder
from tanren.plan.plan import PreprocessPlan, read_plan
from tanren.stages import preprocess
from tests.conftest import RECIPES, REPOSITORY, Finished, Tanren
from tests.launch.test_queue import Cluster

FAKE = Path(__file__).with_name("fake_qsub.py")
TEXTS = [f"{number}: 鍛錬 " + "the smith folds the steel " * (number % 5) for number in range(90)]
RECIPE = """\
tokenizer: {path: ../tokenizer}
sources:
  - {name: one, path: "../text/a*.jsonl"}
  - {name: two, path: "../text/*.jsonl"}
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizers.train(TEXTS, 320, tmp_path_factory.mktemp("tokenizer")).folder


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Path) -> Path:
    """Two sources over three files: five units, of which two have the same text."""
    tokenizers.copy(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    for number, name in enumerate(("a1", "a2", "b")):
        lines = [orjson.dumps({"text": text}) for text in TEXTS[number::3]]
        (tmp_path / "text" / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "preprocess.yaml").write_text(RECIPE)
    return tmp_path / "mine" / "preprocess.yaml"


class Site(Cluster):
    """A site of the repository before a scheduler that keeps a queue, and a recipe of its own."""

    def __init__(self, folder: Path, name: str, recipe: Path) -> None:
        super().__init__(folder, None)
        self.name, self.recipe = name, recipe
        if name != "slurm":
            for tool in ("qsub", "qstat", "qdel"):
                (folder / "tools" / tool).symlink_to(FAKE)
            self.environment["FAKE_QUEUE"] = str(self.queue)
            (folder / "user.toml").write_text(f'site = "{name}"\ngroup = "g"\n')

    def preprocess(self, *words: str, sets: tuple[str, ...] = ()) -> Finished:
        return self.tanren("preprocess", str(self.recipe), *words, sets=sets)

    def sent(self, *words: str) -> str:
        done = self.preprocess(*words)
        assert done.code == 0, done.text
        return done.out

    @property
    def whole(self) -> RunFolder:
        return RunFolder(self.runs / "mine" / "preprocess")

    def part(self, number: int, of: int = 3) -> RunFolder:
        return self.whole.part(Part(number, of))

    @property
    def folders(self) -> list[str]:
        return [str(Path(job["words"][-1]).parent.relative_to(self.runs)) for job in self.jobs]

    def states(self) -> dict[str, str]:
        lines = self.tanren("status").out.splitlines()
        begin, end = lines[0].index("state"), lines[0].index("job ")
        return {line.split()[0]: line[begin:end].strip() for line in lines[1:]}

    def finish(self, number: int, of: int = 3) -> None:
        """Leave what a part's job leaves when it is done."""
        folder = self.part(number, of)
        _, request = order_file.read(folder)
        request = replace(request, inputs=inputs.marks(request.recipe))
        runs.write_json(folder.plan, orjson.loads(make_plan(request).model_dump_json()))
        folder.shards.mkdir(exist_ok=True)
        runs.mark_done(folder, {"shards": 1})
        [job] = [n for n, path in enumerate(self.folders) if path.endswith(folder.root.name)][-1:]
        self.mark(job, "COMPLETED")


@pytest.fixture
def slurm(tmp_path: Path, recipe: Path) -> Site:
    return Site(tmp_path, "slurm", recipe)


@pytest.fixture
def gridengine(tmp_path: Path, recipe: Path) -> Site:
    return Site(tmp_path, "tsubame4", recipe)


@pytest.mark.parametrize(
    ("name", "dependency"),
    [
        ("slurm", ["--dependency=afterok:100:101:102", "--kill-on-invalid-dep=yes"]),
        ("abci3", ["-W", "depend=afterok:100.pbs1:101.pbs1:102.pbs1"]),
        ("tsubame4", ["-hold_jid", "100,101,102"]),
    ],
)
def test_every_site_gets_a_job_a_part_and_one_that_waits_for_all(
    tmp_path: Path, recipe: Path, name: str, dependency: list[str]
) -> None:
    site = Site(tmp_path, name, recipe)
    said = site.sent("--parts", "3", "--hours", "2")
    parts = [f"mine/preprocess/parts/{number}of3" for number in (1, 2, 3)]
    assert site.folders == [*parts, "mine/preprocess"]
    *makers, joiner = [job["words"][:-1] for job in site.jobs]
    for words in makers:
        assert not {"-W", "-hold_jid"} & set(words)
        assert "dependency" not in " ".join(words)
    assert joiner[-2:] == dependency
    assert len({job["name"] for job in site.jobs}) == 4
    assert site.jobs[1]["name"].startswith("mine-preprocess-2of3-")
    assert "3 parts; 3 submitted: job 100" in said
    assert f"preprocess submitted: job {site.jobs[3]['id']} on" in said
    # The joining job looks itself, too: Grid Engine starts it after any end of the parts.
    order, whole = order_file.read(site.whole)
    assert order.needs == tuple(str(site.part(number).root) for number in (1, 2, 3))
    assert whole.part is None
    _, part = order_file.read(site.part(2))
    assert (part.part, part.folder) == (Part(2, 3), site.part(2))
    script = site.part(2).job.read_text()
    assert f"export RUNS={site.runs}\n" in script
    assert f"exec >>{site.part(2).root}/log/job.log" in script
    again = site.sent("--parts", "3")
    assert "3 parts; 3 in the queue already: job 100" in again
    assert f"preprocess is in the queue already: job {site.jobs[3]['id']}" in again
    assert len(site.jobs) == 4


def test_jobs_make_what_one_machine_makes(slurm: Site, tmp_path: Path) -> None:
    slurm.sent("--parts", "2")
    for number in (0, 1):
        done = slurm.run(number)
        assert done.code == 0, done.text
        assert not slurm.whole.tokens.exists()
    shards = {path.name: path.stat().st_mtime_ns for path in slurm.whole.shards.glob("*.bin")}
    assert len(shards) == 3, "a1, a2, b: each once, though two sources have the first two"
    assert slurm.states() == {"mine/preprocess": "queued, parts 2/2"}
    joined = slurm.run(2)
    assert joined.code == 0, joined.text
    assert slurm.states() == {"mine/preprocess": "done"}
    assert not slurm.whole.shards.exists()
    one = Tanren(tmp_path / "one", slurm.environment)
    assert one("preprocess", str(slurm.recipe), "--site", "local").code == 0
    alone = RunFolder(one.runs / "mine" / "preprocess")
    for source in ("one", "two"):
        for path in (indexed.bin_path, indexed.idx_path):
            made, wanted = path(slurm.whole.tokens_of(source)), path(alone.tokens_of(source))
            assert made.read_bytes() == wanted.read_bytes()
    results = [runs.result_of(folder) for folder in (slurm.whole, alone)]
    assert results[0] and results[1]
    assert results[0]["identity"] == results[1]["identity"]
    settings = [
        read_plan(folder.plan).settings for folder in (slurm.whole, alone, slurm.part(1, 2))
    ]
    assert settings[0] == settings[1] == settings[2], "the number of parts is not in them"
    assert "preprocess is done" in slurm.sent("--parts", "5")
    assert len(slurm.jobs) == 3


def test_a_part_that_failed_is_submitted_alone_with_a_new_joining_job(slurm: Site) -> None:
    slurm.sent("--parts", "3")
    slurm.finish(1)
    runs.mark_failed(slurm.part(2), RequestError("b.jsonl:3", "is not JSON", "mend it"))
    slurm.mark(1, "FAILED")
    slurm.mark(2, "RUNNING")
    assert slurm.states() == {
        "mine/preprocess": "queued, parts 1/3", "mine/preprocess/parts/2of3": "failed",
        "mine/preprocess/parts/3of3": "running",
    }  # fmt: skip
    said = slurm.sent("--parts", "3")
    assert "job 103, which was to join the parts, is replaced" in said
    assert "3 parts; 1 done; 1 in the queue already: job 102; 1 submitted: job 104" in said
    assert slurm.jobs[3]["state"] == "CANCELLED"
    assert slurm.folders[4:] == ["mine/preprocess/parts/2of3", "mine/preprocess"]
    assert "--dependency=afterok:102:104" in slurm.jobs[5]["words"]
    assert runs.failure_of(slurm.part(2)) is None
    slurm.finish(3)
    slurm.finish(2)
    # Slurm took the joining job away, say: it may run at once.
    slurm.mark(5, "CANCELLED")
    said = slurm.sent("--parts", "3")
    assert "3 parts; 3 done\n" in said
    assert slurm.folders[6:] == ["mine/preprocess"]
    assert not [word for word in slurm.jobs[6]["words"] if "dependency" in word]
    slurm.mark(6, "RUNNING")
    (slurm.recipe.parent.parent / "text" / "a1.jsonl").write_text('{"text": "other"}\n')
    assert "preprocess is in the queue already: job 106" in slurm.sent("--parts", "3")
    assert len(slurm.jobs) == 7


def test_a_part_of_other_text_or_without_its_shards_is_made_again(slurm: Site) -> None:
    slurm.sent("--parts", "2")
    slurm.finish(1, 2)
    slurm.finish(2, 2)
    slurm.mark(2, "CANCELLED")
    (slurm.recipe.parent.parent / "text" / "b.jsonl").write_text('{"text": "other"}\n')
    assert "2 parts; 2 submitted: job 103, 104" in slurm.sent("--parts", "2")
    assert not slurm.part(1, 2).done.exists()
    slurm.finish(1, 2)
    slurm.finish(2, 2)
    slurm.mark(5, "CANCELLED")
    slurm.whole.shards.rmdir()
    assert "2 parts; 2 submitted: job 106, 107" in slurm.sent("--parts", "2")


def test_another_number_waits_until_these_are_gone(slurm: Site) -> None:
    slurm.sent("--parts", "2")
    slurm.mark(2, "CANCELLED")
    for words in (("--parts", "3"), (), ("--site", "local")):
        refused = slurm.preprocess(*words)
        assert refused.code == 2, refused.text
        assert "parts/1of2: is at work, or waits for it: job 100" in refused.err
        assert "PARTS=2 joins it with the others when they are done; or make cancel" in refused.err
    assert len(slurm.jobs) == 3
    slurm.finish(1, 2)
    slurm.mark(1, "CANCELLED")
    assert "3 parts; 3 submitted: job 103" in slurm.sent("--parts", "3")
    assert [path.name for path in sorted(slurm.whole.parts.iterdir())] == ["1of3", "2of3", "3of3"]
    assert slurm.whole.shards.is_dir()


def test_shards_are_not_made_beside_a_command_that_will_remove_them(slurm: Site) -> None:
    with runs.locked(slurm.whole.lock):
        refused = slurm.preprocess("--parts", "2")
    assert refused.code == 2
    assert "mine/preprocess: is being made on this machine" in refused.err
    assert not slurm.queue.exists()


def test_cancel_and_logs_know_the_parts(slurm: Site) -> None:
    slurm.sent("--parts", "2")
    assert "has no log yet" in slurm.tanren("logs", "mine/preprocess").err
    (slurm.part(2, 2).root / "log" / "1.log").write_text("one 2/5  3,000 tokens\n")
    for name in ("mine/preprocess", "mine/preprocess/parts/2of2"):
        assert slurm.tanren("logs", name).out == "one 2/5  3,000 tokens\n"
    assert "has no log yet" in slurm.tanren("logs", "mine/preprocess/parts/1of2").err
    slurm.mark(0, "RUNNING")
    one = slurm.tanren("cancel", "mine/preprocess/parts/2of2")
    assert one.out.strip() == "cancelled 101"
    rest = slurm.tanren("cancel", "mine/preprocess")
    assert rest.out.strip() == "cancelled 100, 102"
    assert {job["state"] for job in slurm.jobs} == {"CANCELLED"}


def test_on_grid_engine_the_joining_job_sees_that_a_part_failed(gridengine: Site) -> None:
    gridengine.sent("--parts", "3", "--type", "cpu_4")
    gridengine.finish(1)
    gridengine.finish(3)
    runs.mark_failed(gridengine.part(2), RequestError("b.jsonl:3", "is not JSON", "mend it"))
    gridengine.mark(1, "FAILED")
    job = gridengine.jobs[3]
    environment = {"PATH": gridengine.environment["PATH"], "HOME": "/root", "JOB_ID": job["id"],
                   "HOSTNAME": "r1n1", "RUNTIME": "native",
                   "FAKE_QUEUE": str(gridengine.queue)}  # fmt: skip
    done = subprocess.run([job["words"][-1]], env=environment, check=False, timeout=60)
    assert done.returncode == 2
    log = gridengine.whole.job_log.read_text()
    assert "parts/2of3: is not done, and this stage stands on it: is not JSON." in log
    assert "the same command again submits the parts that are not done, and this job" in log
    assert not gridengine.whole.tokens.exists()
    gridengine.mark(3, "FAILED")
    assert gridengine.states() == {
        "mine/preprocess": "unfinished, parts 2/3", "mine/preprocess/parts/2of3": "failed",
    }  # fmt: skip
    assert "3 parts; 2 done; 1 submitted: job 104" in gridengine.sent("--parts", "3")
    assert gridengine.jobs[5]["words"][:-1] == ["-g", "g", "-hold_jid", "104"]


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        ("midtrain", (), "PARTS=8: gives each of several nodes a share of the text, and midtrain"),
        ("preprocess", ("--chain", "2"), "PARTS=8 CHAIN=2: do not go together: a part that"),
        ("preprocess", ("--site", "local"), "PARTS=8: asks for nodes of a cluster; on one machine"),
        ("preprocess", (), "tokenizer.train: would train a tokenizer in each of 8 parts"),
    ],
)
def test_parts_are_refused_where_they_mean_nothing(
    slurm: Site, stage: str, words: tuple[str, ...], message: str
) -> None:
    done = slurm.tanren(stage, str(RECIPES / f"{stage}.yaml"), "--parts", "8", *words)
    assert done.code == 2, done.text
    assert message in done.err
    assert not slurm.queue.exists()


def test_the_plan_says_how_many_jobs_and_what_they_cost(tmp_path: Path, recipe: Path) -> None:
    site = Site(tmp_path, "abci3", recipe)
    words = ("plan", str(recipe), "--parts", "8", "--hours", "2")
    done = site.tanren(*words)
    assert done.code == 0, done.text
    found = (line.partition("  ") for line in done.out.splitlines())
    rows = {name: value.strip() for name, _, value in found}
    assert rows["jobs"] == (
        "8 + 1, each 1 x rt_HC on abci3 for at most 2 hours, group g: 8 make their parts of the "
        "shards, one joins them"
    )
    assert rows["cost"].startswith("18.0 node-hours; 18 points for the whole time (1 a node")
    assert rows["state"] == "new"
    assert "job script for pbs, part 1 of 8\n" in done.out
    assert f"bin/tanren job {site.part(1, 8).root}\n" in done.out
    assert f"bin/tanren job {site.whole.root}\n" in done.out
    assert not site.queue.exists()
    site.sent("--parts", "8")
    site.finish(3, 8)
    assert "; 1 of 8 parts are done" in site.tanren(*words).out


def test_make_passes_the_parts_on() -> None:
    for target in ("preprocess", "plan", "midtrain"):
        done = subprocess.run(
            ["make", "-n", target, "PARTS=8", "SITE=abci3"], cwd=REPOSITORY, capture_output=True,
            text=True, check=True, env={"PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert "--parts 8" in done.stdout


def test_a_part_of_the_stage_makes_its_share_in_the_folder_of_all(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RUNTIME", "native")
    request = reading.read_request(orders.Order(recipe))
    whole = RunFolder(tmp_path / "runs" / "mine" / "preprocess")
    made = []
    for number in (1, 2):
        plan = make_plan(replace(request, part=Part(number, 2)))
        assert isinstance(plan, PreprocessPlan)
        folder = plan.folder
        assert folder == whole.part(Part(number, 2))
        folder.root.mkdir(parents=True)
        assert not submit.look(plan).done
        runs.write_json(folder.plan, orjson.loads(plan.model_dump_json()))
        preprocess.run(read_plan(folder.plan), 1)  # type: ignore[arg-type]
        assert submit.look(plan).done
        assert (folder.tokenizer / "tokenizer.json").exists()
        assert not folder.tokens.exists()
        made.append(runs.result_of(folder))
    # a1, a2 of the first source and a1, a2, b of the second; every other one.
    assert [part and part["shards"] for part in made] == [3, 2]
    assert len(list(whole.shards.glob("*.bin"))) == 3
    assert not whole.tokens.exists()
    assert [part for part, _ in runs.parts(whole)] == [Part(1, 2), Part(2, 2)]
