"""What goes into a container and what stays out, and which runtime is chosen."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tanren.config.errors import RequestError
from tanren.config.load import read_recipe, repository
from tanren.images.build import build
from tanren.images.builder import Places
from tanren.images.definition import IMAGES
from tanren.images.lock import Base, Commit, Lock
from tanren.launch import container, inputs, local
from tanren.launch.container import Container, Runtime
from tanren.plan.paths import RunFolder
from tanren.plan.plan import Launch
from tests.conftest import RECIPES, Tanren
from tests.images.conftest import FAKE, builder, machine, places

__all__ = ["builder", "machine", "places"]  # fixtures

LOCK = Lock(
    image="train", sha256="ab", bytes=1, base=Base(name="b", digest="sha256:1"), definition="d",
    commit=Commit(id="c", dirty=False), builder="x", built="t", seconds=1.0,
    python={"torch": "2.10.0a0"}, system={},
)  # fmt: skip


def inside(binary: str, *, gpu: bool, binds: tuple[tuple[Path, bool], ...]) -> Container:
    runtime = Runtime(Path(binary).name, Path(binary), "1")
    return Container(runtime, Path("/images/train.sif"), LOCK, gpu, binds)


def test_the_whole_script_of_a_gpu_stage_in_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job of ABCI 3.0 would hold it: SingularityCE, two GPUs, Lustre folders."""
    monkeypatch.setenv("DATA", "/groups/gaa50000/data")
    repository_text = str(repository())
    binds = ((Path("/groups/gaa50000/runs"), True), (repository(), False))
    launch = Launch(engine=True, processes=2, device="cuda")
    there = inside("/usr/bin/singularity", gpu=True, binds=binds)
    folder = RunFolder(Path("/groups/gaa50000/runs/llmjp4-8b/midtrain"))
    expected = f"""\
#!/usr/bin/env bash
# Attempt 3 of /groups/gaa50000/runs/llmjp4-8b/midtrain, written by tanren. Nothing here is to be edited.
set -euo pipefail
# Into the container pass these and nothing else of the environment.
export APPTAINERENV_PYTHONPATH={repository_text}/src SINGULARITYENV_PYTHONPATH={repository_text}/src
export APPTAINERENV_PYTHONNOUSERSITE=1 SINGULARITYENV_PYTHONNOUSERSITE=1
export APPTAINERENV_PYTHONUNBUFFERED=1 SINGULARITYENV_PYTHONUNBUFFERED=1
export APPTAINERENV_OMP_NUM_THREADS=8 SINGULARITYENV_OMP_NUM_THREADS=8
export APPTAINERENV_TOKENIZERS_PARALLELISM=true SINGULARITYENV_TOKENIZERS_PARALLELISM=true
export APPTAINERENV_DATA=/groups/gaa50000/data SINGULARITYENV_DATA=/groups/gaa50000/data
export APPTAINERENV_CUDA_DEVICE_MAX_CONNECTIONS=1 SINGULARITYENV_CUDA_DEVICE_MAX_CONNECTIONS=1
for name in {" ".join(container.PASSED)} "${{!FI_@}}" "${{!GLOO_@}}" "${{!NCCL_@}}" \
"${{!UCX_@}}"; do
    if [[ -v $name ]]; then
        export "APPTAINERENV_$name=${{!name}}" "SINGULARITYENV_$name=${{!name}}"
    fi
done
unset APPTAINER_BIND APPTAINER_BINDPATH SINGULARITY_BIND SINGULARITY_BINDPATH
mkdir -p "${{TMPDIR:-/tmp}}/tanren-home-$UID"
exec /usr/bin/singularity exec --cleanenv --no-mount cwd --nv \
--home "${{TMPDIR:-/tmp}}/tanren-home-$UID":/home/tanren --pwd {folder.root} \
--bind /groups/gaa50000/runs:/groups/gaa50000/runs --bind {repository_text}:{repository_text}:ro \
/images/train.sif python3 -m torch.distributed.run --standalone --nproc-per-node 2 \
-m tanren.stages {folder.root}/plan.json 3
"""  # noqa: E501
    assert local.script(folder, launch, 3, 16, there) == expected


def test_the_last_line_of_a_cpu_stage_with_apptainer() -> None:
    """As on TSUBAME 4.0: group disks of two kinds, a folder with a space in its name."""
    binds = ((Path("/gs/bs/tga x/runs"), True), (Path("/gs/fs/data"), False))
    there = inside("/usr/bin/apptainer", gpu=False, binds=binds)
    folder = RunFolder(Path("/gs/bs/tga x/runs/tiny/convert"))
    text = local.script(folder, Launch(engine=False, processes=1, device="cpu"), 1, 4, there)
    assert text.splitlines()[-1] == (
        "exec /usr/bin/apptainer exec --cleanenv --no-mount cwd "
        '--home "${TMPDIR:-/tmp}/tanren-home-$UID":/home/tanren '
        "--pwd '/gs/bs/tga x/runs/tiny/convert' "
        "--bind '/gs/bs/tga x/runs:/gs/bs/tga x/runs' --bind /gs/fs/data:/gs/fs/data:ro "
        "/images/train.sif python3 -m tanren.stages '/gs/bs/tga x/runs/tiny/convert/plan.json' 1"
    )
    assert "APPTAINERENV_CUDA_VISIBLE_DEVICES='' SINGULARITYENV_CUDA_VISIBLE_DEVICES=''" in text


def test_what_passes_into_the_container_and_what_does_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    there = inside(str(FAKE), gpu=False, binds=())
    script = local.script(folder, Launch(engine=False, processes=1, device="cpu"), 1, 1, there)
    secret = {"WANDB_API_KEY": "s3cret key", "HF_TOKEN": "hf_1", "NCCL_DEBUG": "INFO"}
    host = {
        "PATH": os.environ["PATH"], "LD_LIBRARY_PATH": "/host", "PYTHONPATH": "/host", **secret,
        "CUDA_VISIBLE_DEVICES": "0", "TMPDIR": str(tmp_path), "AWS_SECRET_ACCESS_KEY": "no",
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", script], env=host, capture_output=True, text=True,
                          check=True)  # fmt: skip
    environment = json.loads(done.stdout)["environment"]
    assert {key: environment.get(key) for key in secret} == secret
    assert environment["PYTHONPATH"] == f"{repository()}/src"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""  # the plan's, not the host's
    assert not {"LD_LIBRARY_PATH", "AWS_SECRET_ACCESS_KEY", "PATH"} & set(environment)
    assert not any(value in script for value in ("s3cret", "hf_1"))


def test_the_runtime_follows_what_is_there(
    machine: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert container.choose(None, 0) is None
    with pytest.raises(RequestError, match=r"cpu.sif: there is no such image(.|\n)*IMAGE=cpu"):
        container.choose("apptainer", 0)
    with pytest.raises(
        RequestError, match=r"singularity: is not on this machine(.|\n)*apt install"
    ):
        container.choose("singularity", 0)
    with pytest.raises(RequestError, match=r"RUNTIME=docker: there is no such runtime"):
        container.choose("docker", 0)
    build(IMAGES["cpu"], container.require().builder, places, lambda _: None)
    for wanted in (None, "apptainer"):
        chosen = container.choose(wanted, 0)
        assert chosen is not None
        assert (chosen.image, chosen.gpu) == (machine / "cpu.sif", False)
        assert chosen.runtime.binary.name == "apptainer"
    assert container.choose("native", 0) is None
    monkeypatch.setenv("RUNTIME", "native")
    assert container.choose(None, 0) is None
    monkeypatch.delenv("RUNTIME")
    assert container.choose(None, 2) is None  # a machine with GPUs needs train.sif
    with pytest.raises(RequestError, match=r"train.sif: there is no such image"):
        container.choose("apptainer", 2)


def test_without_any_runtime_the_message_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    container.find.cache_clear()
    try:
        with pytest.raises(RequestError, match=r"neither is on this machine(.|\n)*dnf install"):
            container.require()
    finally:
        container.find.cache_clear()


def test_the_binds_are_what_the_run_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshot"
    text, extra = tmp_path / "text [1]", tmp_path / "extra"
    for folder in (blobs, snapshot, text, extra):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(blobs / "abc")
    (text / "a.jsonl").write_text("{}")
    recipe_file = tmp_path / "preprocess.yaml"
    recipe_file.write_text(
        f"tokenizer: {{path: {snapshot}}}\nsources:\n  - {{name: a, path: 'text [[]1]/*.jsonl'}}\n"
    )
    recipe = inputs.with_absolute_paths(read_recipe(recipe_file, None, [])[1], tmp_path)
    monkeypatch.delenv("HF_HOME", raising=False)
    found = container.binds(recipe, tmp_path / "runs", (str(extra),))
    assert found == tuple(sorted({
        (repository(), False), (tmp_path / "runs", True), (extra, True), (snapshot, False),
        (blobs, False), (text, False),
    }))  # fmt: skip
    with pytest.raises(RequestError, match=r"bind /nowhere: there is no such folder"):
        container.binds(recipe, tmp_path / "runs", ("/nowhere",))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "absent"))
    with pytest.raises(RequestError, match=r"bind .*absent: there is no such folder"):
        container.binds(None, tmp_path / "runs")
    with pytest.raises(RequestError, match=r"a,b: cannot be bound: its name has a comma"):
        container.command(inside("/a", gpu=False, binds=((Path("/a,b"), True),)), [], tmp_path)


def test_a_checkpoint_that_a_recipe_starts_from_is_bound(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for init in (f"hf:{base}", f"checkpoint:{base}"):
        _, recipe = read_recipe(RECIPES / "midtrain.yaml", None, [f"init={init}"])
        assert inputs.paths(recipe) == [str(base)]
        assert (base, False) in container.binds(recipe, tmp_path / "runs")


def test_the_plan_shows_the_command_line_of_the_container(
    machine: Path, places: Places, bare: Tanren
) -> None:
    build(IMAGES["cpu"], container.require().builder, places, lambda _: None)
    bare.environment = {"PATH": os.environ["PATH"], "IMAGES": str(machine), "RUNTIME": ""}
    shown = bare("plan", str(RECIPES / "midtrain.yaml"), "--bind", "/etc")
    assert shown.code == 0, shown.text
    last = shown.out.splitlines()[-1]
    assert f"exec {machine.parent}/tools/apptainer exec --cleanenv" in last
    assert "--bind /etc:/etc " in last
    native = bare("plan", str(RECIPES / "midtrain.yaml"), "--runtime", "native")
    assert "apptainer" not in native.out
