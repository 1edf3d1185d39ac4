"""Stages through real schedulers: Slurm, Grid Engine, and an imitation of PBS in front of Slurm.

`make test-schedulers` runs these where the schedulers are up (.ci/run starts them); where CI=true a
scheduler that is missing is a failure. The site files are the repository's own; the one for Slurm
is a copy with this machine's size, as its first lines ask for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tanren import runs
from tanren.plan.paths import RunFolder
from tests.conftest import RECIPES, REPOSITORY, SHORT, Finished, Tanren, wait_for

pytestmark = pytest.mark.schedulers
TOOLS = {
    "slurm": Path("/usr/bin"),
    "tsubame4": Path(os.environ.get("QSUB_SHIM", Path.home() / ".local" / "ge-bin")),
    "abci3": Path(os.environ.get("TORQUE_BIN", Path.home() / ".local" / "torque-bin")),
}
QUERY = {"slurm": "squeue", "tsubame4": "qstat", "abci3": "pbsnodes"}
TYPES = {"slurm": "workq", "tsubame4": "cpu_4", "abci3": "rt_HC"}
LONG = tuple("steps=4000" if text == "steps=8" else text for text in SHORT)


@dataclass
class Cluster:
    """A site whose scheduler really runs jobs."""

    site: str
    tanren: Tanren

    def __call__(self, verb: str, *words: str, sets: tuple[str, ...] = ()) -> Finished:
        where = [] if verb in ("status", "cancel", "logs") else ["--site", self.site]
        kind = [] if not where else ["--type", TYPES[Path(self.site).stem]]
        done = self.tanren(verb, *words, *where, *kind, sets=sets)
        assert done.code == 0, done.text
        return done

    def stage(self, stage: str, *words: str, sets: tuple[str, ...] = ()) -> Finished:
        return self(stage, str(RECIPES / f"{stage}.yaml"), "--hours", "0.2", *words, sets=sets)

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.tanren.runs / "tiny" / name)

    def state(self, name: str) -> str:
        lines = self("status").out.splitlines()
        line = next(line for line in lines if line.startswith(f"tiny/{name} "))
        return line[lines[0].index("state") :].split("  ")[0]

    def wait(self, name: str, *states: str, seconds: float = 120.0) -> None:
        wait_for(lambda: self.state(name) in states, seconds)

    def tail(self, name: str) -> str:
        path = self.folder(name).job_log
        return path.read_text() if path.exists() else "no job.log"


@pytest.fixture(params=["slurm", "tsubame4", "abci3"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path, prepared: Path) -> Cluster:
    site = request.param
    path = f"{TOOLS[site]}:{os.environ['PATH']}"
    tool = shutil.which(QUERY[site], path=path)
    there = tool and TOOLS[site].is_dir() and subprocess.run(
        [tool], capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    if not there:
        message = f"the scheduler of {site} is not running here"
        assert os.environ.get("CI") != "true", message
        pytest.skip(message)
    (tmp_path / "user.toml").write_text('group = "tga-test"\n')
    shutil.copytree(prepared / "tiny", tmp_path / "runs" / "tiny")
    if site == "slurm":
        text = (REPOSITORY / "recipes" / "sites" / "slurm.yaml").read_text()
        text = text.replace("  cpu: {gpus: 0, cores: 32", "  workq: {gpus: 0, cores: 1")
        site = str(tmp_path / "slurm.yaml")
        Path(site).write_text(text.replace("cpu_type: cpu", "cpu_type: workq"))
    tanren = Tanren(tmp_path / "runs", {"PATH": path, "TANREN_USER": str(tmp_path / "user.toml")})
    return Cluster(site, tanren)


def test_the_road_runs_and_its_dependencies_hold(cluster: Cluster) -> None:
    """Text to model by one command; the export waits for the training."""
    shutil.rmtree(cluster.tanren.runs)
    done = cluster.stage("midtrain", "--needs", "--then", "export", sets=SHORT)
    assert done.out.count("submitted: job") == 4
    assert cluster.state("export") in ("waiting", "queued")
    cluster.wait("export", "done", "failed", "unfinished", seconds=180)
    for name in ("preprocess", "convert", "midtrain", "export"):
        assert cluster.state(name) == "done", cluster.tail(name)
    assert (cluster.folder("midtrain").export(8) / "model.safetensors").exists()
    log = cluster("logs", "tiny/midtrain").out
    assert "step 8/8" in log


def test_what_stands_on_a_failure_does_not_run(cluster: Cluster) -> None:
    """The training fails at its start; the export must not start, or must refuse by itself."""
    tokens = cluster.folder("preprocess").root / "tokens"
    for file in tokens.glob("*.bin"):
        file.write_bytes(b"")
    cluster.stage("midtrain", "--then", "export", sets=SHORT)
    cluster.wait("midtrain", "failed")
    cluster.wait("export", "unfinished", "failed", seconds=60)
    assert not cluster.folder("export").done.exists()
    if Path(cluster.site).stem == "tsubame4":
        assert "is not done, and this stage stands on it" in cluster.tail("export")


def test_a_chain_of_two_goes_on_where_the_walltime_ended(cluster: Cluster) -> None:
    """Each job stops by itself, saves and ends with 75; the scheduler starts the next one."""
    # Ten minutes of walltime, and a stop after twenty seconds: long before the scheduler's own.
    sets = (*LONG, "job.walltime_hours=0.16666", "job.save_minutes=9.66")
    done = cluster("midtrain", str(RECIPES / "midtrain.yaml"), "--chain", "2", sets=sets)
    assert done.out.count(", ") == 1
    cluster.wait("midtrain", "stopped, goes on", seconds=150)
    text = cluster.tail("midtrain")
    attempts = runs.read_json(cluster.folder("midtrain").passport)["attempts"]
    assert len(attempts) == 2, text
    assert text.count("stopped by the end of its walltime after step") == 2, text
    assert text.count("midtrain goes on from iteration") == 1, text
    steps = list(runs.curve(cluster.folder("midtrain").metrics, "loss"))
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("cluster", ["slurm", "tsubame4"], indirect=True)
def test_parts_on_several_nodes_make_what_one_machine_makes(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The joining job waits for both parts, and tokenizes nothing."""
    (tmp_path / "mine").mkdir()
    recipe = tmp_path / "mine" / "preprocess.yaml"
    recipe.write_text(
        f"tokenizer: {{path: {cluster.folder('preprocess').tokenizer}}}\n"
        "sources:\n"
        "  - {name: topics, python_documentation: topics}\n"
        "  - {name: docstrings, python_documentation: docstrings}\n"
    )
    words = ("preprocess", str(recipe), "--hours", "0.2")
    done = cluster(*words, "--parts", "2")
    assert "2 parts; 2 submitted: job " in done.out
    assert "preprocess submitted: job " in done.out
    folder = RunFolder(cluster.tanren.runs / "mine" / "preprocess")
    # Jobs of other tests may hold the slots.
    wait_for(folder.done.exists, 240)
    parts = [runs.result_of(part) for _, part in runs.parts(folder)]
    assert [part and part["shards"] for part in parts] == [1, 1]
    assert not folder.shards.exists()
    one = Tanren(tmp_path / "one", cluster.tanren.environment)
    assert one("preprocess", str(recipe), "--site", "local").code == 0
    alone = RunFolder(one.runs / "mine" / "preprocess")
    files = sorted(path.name for path in alone.tokens.iterdir())
    assert files == ["docstrings.bin", "docstrings.idx", "topics.bin", "topics.idx"]
    for file in files:
        assert (folder.tokens / file).read_bytes() == (alone.tokens / file).read_bytes()


def test_a_running_job_saves_when_it_is_cancelled_and_goes_when_it_must(cluster: Cluster) -> None:
    cluster.stage("midtrain", sets=LONG)
    folder = cluster.folder("midtrain")
    wait_for(lambda: len(runs.read_lines(folder.metrics)) > 4)
    assert "is in the queue already" in cluster.stage("midtrain", sets=LONG).out
    assert "saves after its step and ends" in cluster("cancel", "tiny/midtrain").out
    cluster.wait("midtrain", "stopped, goes on")
    saved = runs.iterations(folder)[-1]
    cluster.stage("midtrain", sets=LONG)
    wait_for(lambda: max(runs.curve(folder.metrics, "loss"), default=0) > saved + 2)
    assert "cancelled" in cluster("cancel", "tiny/midtrain", "--now").out
    wait_for(lambda: cluster.state("midtrain") != "running", 60)
    assert runs.iterations(folder)[-1] >= saved


@pytest.mark.parametrize("cluster", ["slurm", "tsubame4"], indirect=True)
def test_a_job_that_its_walltime_ends_leaves_a_run_that_can_go_on(cluster: Cluster) -> None:
    """One step longer than the walltime: nothing stops it but the scheduler."""
    cluster.stage("midtrain", "--hours", "0.01", sets=(*SHORT, "global_batch=16384",
                  "mix.max_epochs=1000.0"))  # fmt: skip
    cluster.wait("midtrain", "running")
    cluster.wait("midtrain", "unfinished", seconds=240)
    assert not runs.iterations(cluster.folder("midtrain"))
    cluster.stage("midtrain", sets=SHORT)
    cluster.wait("midtrain", "done", "failed")
    assert cluster.state("midtrain") == "done", cluster.tail("midtrain")


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """Slurm with two hosts."""
    listed = subprocess.run(["sinfo", "-hN", "-p", "workq", "-o", "%N"], capture_output=True,
                            text=True, check=False).stdout.split()  # fmt: skip
    if len(set(listed)) < 2:
        assert os.environ.get("CI") != "true", "Slurm has one host"
        pytest.skip("Slurm has one host (SLURM_NODES=2 pretends two)")
    # Slurm takes a host out of use where a killed job of an earlier test is not gone in a minute,
    # as happens on a busy machine: then both jobs here would wait for it for ever.
    reasons = subprocess.run(["sinfo", "-hN", "-o", "%N %E"], capture_output=True, text=True,
                             check=False).stdout.splitlines()  # fmt: skip
    for host in {line.split()[0] for line in reasons if "Kill task failed" in line}:
        warnings.warn(f"Slurm had drained {host}: Kill task failed", stacklevel=1)
        subprocess.run(["scontrol", "update", f"nodename={host}", "state=resume"], check=False)
    shutil.copytree(request.getfixturevalue("prepared") / "tiny", tmp_path / "runs" / "tiny")
    text = (REPOSITORY / "recipes" / "sites" / "slurm.yaml").read_text()
    text = text.replace("cpu: {gpus: 0, cores: 32, memory_gib: 200, nodes: 1",
                        "workq: {gpus: 0, cores: 1, memory_gib: 200, nodes: 2")  # fmt: skip
    site = tmp_path / "slurm.yaml"
    # As many as the run on one host gives each of its two processes: sums may depend on it.
    text += "environment: {OMP_NUM_THREADS: '1'}\n"
    site.write_text(text.replace("cpu_type: cpu", "cpu_type: workq"))
    (tmp_path / "user.toml").write_text("")
    environment = {"TANREN_USER": str(tmp_path / "user.toml")}
    cluster = Cluster(str(site), Tanren(tmp_path / "runs", environment))
    yield cluster
    if cluster.state("midtrain") == "running":
        cluster("cancel", "tiny/midtrain", "--now")


def test_two_hosts_train_one_model(pair: Cluster) -> None:
    """One torchrun a host, started by srun; the losses are those of one host with two processes."""
    two = ("layout.data=2", "micro_batch=2")
    pair.stage("midtrain", "--nodes", "2", sets=(*SHORT, *two))
    pair.wait("midtrain", "done", "failed")
    assert pair.state("midtrain") == "done", pair.tail("midtrain")
    assert "on node1, node2" in pair.tail("midtrain")
    assert "--nnodes 2" in pair.folder("midtrain").node.read_text()
    one = pair.tanren.midtrain("--site", "local", "--name", "one", sets=two)
    assert one.code == 0, one.text
    curves = [
        runs.curve(pair.folder(name).metrics, "loss") for name in ("midtrain", "midtrain-one")
    ]
    assert len(curves[0]) == 8
    assert curves[0] == curves[1]


def test_a_rank_that_dies_ends_the_job_of_both_hosts(pair: Cluster) -> None:
    pair.stage("midtrain", "--nodes", "2", sets=(*LONG, "layout.data=2", "micro_batch=2"))
    folder = pair.folder("midtrain")
    wait_for(lambda: len(runs.read_lines(folder.metrics)) > 3)
    workers = [
        process for process in psutil.process_iter(["cmdline", "environ", "name"])
        if "tanren.stages" in (process.info["cmdline"] or [])
        and str(folder.plan) in process.info["cmdline"]
        and "torch.distributed.run" not in process.info["cmdline"]
        and process.info["name"] != "tanren-writer"
        and (process.info["environ"] or {}).get("RANK") == "1"
    ]  # fmt: skip
    assert workers
    for worker in workers:
        worker.kill()
    wait_for(lambda: pair.state("midtrain") != "running", 120)
    assert pair.state("midtrain") in ("failed", "unfinished")
    assert "exitcode  : -9" in folder.log(1).read_text() or "Signal 9" in folder.log(1).read_text()


MPIRUN = """\
#!/bin/bash
# Open MPI's words as pbs.py says them, and its variable; a host is a network namespace here.
[[ "$1 $3 $4 $5 $6 $7 $8" == "--hostfile -np 2 --map-by ppr:1:node --bind-to none" ]] || exit 64
hosts=$2 rank=0 all=()
shift 8
while read -r host; do
    OMPI_COMM_WORLD_RANK=$rank ip netns exec "tanren-$host" "$@" &
    all+=($!)
    rank=$((rank + 1))
done <"$hosts"
code=0
for one in "${all[@]}"; do wait "$one" || code=$?; done
exit "$code"
"""
HOSTS = ("10.77.0.1", "10.77.0.2")


@pytest.fixture
def network() -> Iterator[None]:
    """Two hosts with a cable between them: network namespaces joined by a veth pair."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        assert os.environ.get("CI") != "true", "needs root and ip (apt install iproute2)"
        pytest.skip("network namespaces need root and ip")

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)

    def remove() -> None:
        for host in HOSTS:
            ip("netns", "del", f"tanren-{host}", check=False)

    remove()
    for host in HOSTS:
        ip("netns", "add", f"tanren-{host}")
    ip("link", "add", "tanren0", "netns", f"tanren-{HOSTS[0]}", "type", "veth", "peer", "name",
       "tanren0", "netns", f"tanren-{HOSTS[1]}")  # fmt: skip
    for host in HOSTS:
        inside = ("-n", f"tanren-{host}")
        ip(*inside, "addr", "add", f"{host}/24", "dev", "tanren0")
        ip(*inside, "link", "set", "tanren0", "up")
        ip(*inside, "link", "set", "lo", "up")
    yield
    remove()


def test_two_hosts_with_a_network_between_them(
    network: None, tmp_path: Path, prepared: Path
) -> None:
    """The path of a PBS job: node file, mpirun, torchrun on each host, gloo over the cable."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("mpirun", MPIRUN), ("qsub", "#!/bin/sh\necho 7.pbs1\n"),
                       ("qstat", "#!/bin/sh\n")):  # fmt: skip
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    site = tmp_path / "abci3.yaml"
    text = (REPOSITORY / "recipes" / "sites" / "abci3.yaml").read_text()
    text = text.replace("memory_gib: 320, nodes: 1", "memory_gib: 320, nodes: 2")
    site.write_text(text + "environment: {GLOO_SOCKET_IFNAME: tanren0, OMP_NUM_THREADS: '1'}\n")
    (tmp_path / "user.toml").write_text('group = "g"\n')
    shutil.copytree(prepared / "tiny", tmp_path / "runs" / "tiny")
    path = f"{tools}:{os.environ['PATH']}"
    tanren = Tanren(tmp_path / "runs", {"PATH": path, "TANREN_USER": str(tmp_path / "user.toml")})
    two = (*SHORT, "layout.data=2", "micro_batch=2")
    done = tanren("midtrain", str(RECIPES / "midtrain.yaml"), "--site", str(site), "--type",
                  "rt_HC", "--nodes", "2", sets=two)  # fmt: skip
    assert done.code == 0, done.text
    folder = RunFolder(tmp_path / "runs" / "tiny" / "midtrain")
    nodes = tmp_path / "nodes"
    nodes.write_text("".join(f"{host}\n{host}\n" for host in HOSTS))  # a line a process, as PBS
    job = subprocess.run(
        [str(folder.job)],
        env={"PATH": path, "HOME": "/root", "PBS_JOBID": "7.pbs1", "PBS_NODEFILE": str(nodes),
             "RUNTIME": "native", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    said = folder.job_log.read_text()
    assert job.returncode == 0, said + folder.log(1).read_text()
    assert f"job 7.pbs1 on {', '.join(HOSTS)}" in said
    assert f"--master-addr {HOSTS[0]}" in folder.node.read_text()
    one = tanren.midtrain("--site", "local", "--name", "one", sets=two)
    assert one.code == 0, one.text
    curves = [
        runs.curve(tmp_path / "runs" / "tiny" / name / "metrics.jsonl", "loss")
        for name in ("midtrain", "midtrain-one")
    ]
    assert len(curves[0]) == 8
    assert curves[0] == curves[1]
