"""Images that are really built and really run, with the container program of this machine.

`make test-images` runs these: they need Apptainer (or SingularityCE), a network to PyPI and to the
Debian mirror, and some minutes. Where CI=true a missing program is a failure.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tanren import runs
from tanren.config.errors import WorkError
from tanren.images import build as building
from tanren.images import builder as programs
from tanren.images.build import build, info
from tanren.images.builder import Places
from tanren.images.definition import IMAGES, Image, read_versions
from tanren.images.lock import read_lock
from tanren.images.requirements import fetch_wheels
from tanren.launch import container
from tests.conftest import REPOSITORY, SHORT, SHORT_SFT, Tanren, end_group, wait_for

pytestmark = pytest.mark.images
POST = re.compile(r"install\.py (--wheels .*?)\n\n", re.DOTALL)


@pytest.fixture(scope="session", autouse=True)
def runtime() -> container.Runtime:
    container.find.cache_clear()
    found = container.find()
    if found is None:
        message = "neither Apptainer nor SingularityCE is on this machine"
        assert os.environ.get("CI") != "true", message
        pytest.skip(message)
    return found


def make(*words: str, **environment: str) -> str:
    """Call make as a person does."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", *words], cwd=REPOSITORY, env=clean | environment, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with cpu.sif, built once for all test workers."""
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    folder = root / "images"
    with (root / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "cpu.sif").exists():
            out = make("build-image", "IMAGE=cpu", IMAGES=str(folder))
            assert f"image      {folder}/cpu.sif" in out
    yield folder


@pytest.fixture
def boxed(images: Path, tmp_path: Path) -> Tanren:
    """A tanren command whose stages run in cpu.sif."""
    return Tanren(tmp_path / "runs", {"RUNTIME": "apptainer", "IMAGES": str(images)})


def test_two_builds_of_a_lock_are_the_same_bytes(images: Path, tmp_path: Path) -> None:
    """On the other worker meanwhile: what runs in the image."""
    out = make("build-image", "IMAGE=cpu", IMAGES=str(tmp_path / "again"),
               TANREN_CACHE=str(images / ".cache"))  # fmt: skip
    first, second = read_lock(images / "cpu.sif"), read_lock(tmp_path / "again" / "cpu.sif")
    assert (first.python, first.system) == (second.python, second.system)
    assert len(first.python) > 40
    assert len(first.system) > 80
    assert first.sha256 == second.sha256
    assert first.built != second.built
    assert "differs from the image before" not in out


def test_tiny_in_the_image_is_tiny_outside_of_it(images: Path, tmp_path: Path) -> None:
    """The README's command, shorter, with the image's Python for the text; the losses of both."""
    words = ("midtrain", "TASK=tiny", f"RUNS={tmp_path / 'runs'}", f"IMAGES={images}",
             "SET=steps=40 schedule.decay_steps=10 evaluation.every_steps=20")  # fmt: skip
    box = make(*words, "NAME=box", "RUNTIME=apptainer")
    own = make(*words, "NAME=own", "RUNTIME=native")
    assert "preprocess →" in box
    assert "preprocess →" not in own
    root = tmp_path / "runs" / "tiny"
    for key in ("loss", "held_out_loss", "grad_norm"):
        inside = runs.curve(root / "midtrain-box" / "metrics.jsonl", key)
        outside = runs.curve(root / "midtrain-own" / "metrics.jsonl", key)
        assert len(inside) == len(outside) > 1
        assert inside == outside
    weights = [root / f"midtrain-{name}" / "hf" / "iter_0000040" / "model.safetensors"
               for name in ("box", "own")]  # fmt: skip
    assert weights[0].read_bytes() == weights[1].read_bytes()
    (attempt,) = runs.read_json(root / "midtrain-box" / "passport.json")["attempts"]
    lock = read_lock(images / "cpu.sif")
    assert attempt["image"]["sha256"] == lock.sha256
    assert attempt["image"]["python"]["torch"] == "2.13.0+cpu"


def test_a_run_in_the_image_stops_resumes_and_survives_a_kill(boxed: Tanren) -> None:
    long = tuple("steps=4000" if text == "steps=8" else text for text in SHORT)
    for stage in ("preprocess", "convert"):
        done = boxed(stage, str(REPOSITORY / "recipes" / "tiny" / f"{stage}.yaml"))
        assert done.code == 0, done.text
    recipe = str(REPOSITORY / "recipes" / "tiny" / "midtrain.yaml")
    metrics = boxed.folder() / "metrics.jsonl"
    process = boxed.start("midtrain", recipe, sets=long)
    wait_for(lambda: len(runs.read_lines(metrics)) > 8)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert "stopped by SIGTERM after step" in err
    process = boxed.start("midtrain", recipe, sets=long)
    before = len(runs.read_lines(metrics))
    wait_for(lambda: len(runs.read_lines(metrics)) > before + 8)
    end_group(process)
    plan = str(boxed.folder() / "plan.json")
    wait_for(lambda: not any(plan in (p.info["cmdline"] or []) for p in
                             psutil.process_iter(["cmdline"])), 20)  # fmt: skip
    process = boxed.start("midtrain", recipe, sets=long)
    wait_for((boxed.folder() / "log" / "3.log").exists)
    before = len(runs.read_lines(metrics))
    wait_for(lambda: len(runs.read_lines(metrics)) > before + 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert "goes on from iteration" in out


def test_inside_is_nothing_of_the_host(images: Path, tmp_path: Path) -> None:
    command = "env; id -u; pwd; python3 --version; touch /opt/x; touch $PWD/x; ls -a /home /root"
    done = subprocess.run(
        [str(REPOSITORY / "bin" / "tanren"), "shell", "cpu"], input=command, text=True,
        capture_output=True, check=False,
        env=os.environ | {"IMAGES": str(images), "RUNS": str(tmp_path / "runs"), "SECRET": "s3cret",
                          "LD_LIBRARY_PATH": "/host", "HF_TOKEN": "hf_x",
                          "TANREN_PYTHON": sys.executable},
    )  # fmt: skip
    inside = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert "SECRET" not in inside
    assert inside["HF_TOKEN"] == "hf_x"
    assert inside["HOME"] == "/home/tanren"
    assert inside["PATH"].split(":")[0] == "/usr/local/sbin"
    assert "/host" not in inside.get("LD_LIBRARY_PATH", "")
    assert "Python 3.11" in done.stdout
    assert str(REPOSITORY) in done.stdout
    assert done.stderr.count("Read-only file system") == 2


def test_the_labels_are_the_locks(images: Path, runtime: container.Runtime, tmp_path: Path) -> None:
    lock, labels = info(images / "cpu.sif", runtime.builder, tmp_path)
    assert labels["image"] == "cpu"
    assert labels["definition"] == lock.definition
    assert labels["commit"].split()[0] == (lock.commit.id or "unknown")
    shown = make("image-info", "IMAGE=cpu", IMAGES=str(images))
    assert lock.sha256 in shown
    assert "torch 2.13.0+cpu, megatron-core 0.16.1" in shown


def answers(
    runtime: container.Runtime, image: Path, folder: Path, *words: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, object]]]:
    """Run a submission as the tuning competition does, with nothing but the loopback."""
    alone = ["--net", "--network", "none"] if os.getuid() == 0 else []
    outside = [] if alone else ["unshare", "--map-root-user", "--net"]
    (folder / "poison").mkdir(exist_ok=True)
    (folder / "poison" / "transformers.py").write_text("raise SystemExit('the host came in')")
    out = folder / "out.jsonl"
    done = subprocess.run(
        [*outside, str(runtime.binary), "run", *alone, "--writable-tmpfs", str(image),
         "--input_path", "in.jsonl", "--output_path", str(out), *words],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(folder / "poison"),
                          "APPTAINER_BIND": str(folder)},
    )  # fmt: skip
    read = out.read_text().splitlines() if out.exists() else []
    return done, [json.loads(line) for line in read]


def test_a_submission_answers_without_a_network(
    images: Path, runtime: container.Runtime, tmp_path: Path
) -> None:
    """From a short run to a .sif, and what it answers; the same every time."""
    tanren = Tanren(tmp_path / "runs", {"IMAGES": str(images)})
    recipes = REPOSITORY / "recipes" / "tiny"
    done = tanren("midtrain", str(recipes / "midtrain.yaml"), "--needs", sets=SHORT)
    assert done.code == 0, done.text
    done = tanren("sft", str(recipes / "sft.yaml"), "--then", "export", sets=SHORT_SFT)
    assert done.code == 0, done.text
    make("submission", "STAGE=sft", "MAX_TOKENS=8", "QUESTION=What comes after {problem}?",
         RUNS=str(tanren.runs), IMAGES=str(images))  # fmt: skip
    image = tanren.folder("sft") / "submission" / "iter_0000006.sif"
    lock = read_lock(image)
    assert lock.base.digest == f"sha256:{read_lock(images / 'cpu.sif').sha256}"
    assert lock.python["torch"] == "2.13.0+cpu"
    export = tanren.folder("sft") / "hf" / "iter_0000006"
    assert set(lock.model or {}) == {path.name for path in export.iterdir()}
    assert "asked 'What comes after 1+1?', it answers" in (
        image.with_suffix(".build.log").read_text()
    )

    lines = [{"id": 3, "problem": "seven"}, {"prompt": "The import"},
             {"messages": [{"role": "user", "content": "What comes after seven?"}]}]  # fmt: skip
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said, first = answers(runtime, image, tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    assert [{k: v for k, v in one.items() if k != "output"} for one in first] == lines
    assert first[0]["output"] == first[2]["output"] != ""
    _, second = answers(runtime, image, tmp_path, "--batch_size", "1")
    assert second == first
    source.write_text("{broken\n" + source.read_text())
    said, third = answers(runtime, image, tmp_path)
    assert said.returncode == 1
    assert "in.jsonl:1: is not JSON" in said.stderr
    assert third[1:] == first
    # Another folder in place of its own model.
    elsewhere, _ = answers(runtime, image, tmp_path, "--model_path", str(tmp_path))
    assert elsewhere.returncode == 2
    assert "holds no model" in elsewhere.stderr


@pytest.mark.parametrize("section", ["post", "test"])
def test_a_real_build_that_fails_leaves_nothing(
    runtime: container.Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    """The gate with the real program, on a root folder made of one static binary."""
    shell = shutil.which("busybox")
    assert shell, "apt install busybox-static"
    root = tmp_path / "repository"
    shutil.copytree(REPOSITORY / "containers", root / "containers")
    (root / "containers" / "cpu.def").write_text(
        "Bootstrap: scratch\n\n%arguments\n    DEFINITION=\n\n"
        f"%files\n    containers/check.py /mnt/x\n    containers/check.py /srv/x\n"
        f"    {shell} /bin/sh\n\n"
        f"%post\n    echo installing\n    {'exit 3' if section == 'post' else ':'}\n\n"
        "%test\n    echo this is the reason; exit 4\n\n"
        "%labels\n    org.tanren.definition {{ DEFINITION }}\n"
    )
    for module in (building, programs):
        monkeypatch.setattr(module, "repository", lambda: root)
    monkeypatch.setattr(building, "source_files", lambda image: [])
    monkeypatch.setattr(building, "definition_digest", lambda image: "d")
    monkeypatch.setattr(building, "arguments", lambda image, known: {"DEFINITION": "d"})
    monkeypatch.setattr(
        building.requirements, "fetch_wheels", lambda v, f, log: f.mkdir(parents=True)
    )
    places = Places(tmp_path / "images", tmp_path / "cache", tmp_path, "mirror")
    reason = "this is the reason" if section == "test" else "installing"
    with pytest.raises(WorkError, match=reason):
        build(IMAGES["cpu"], runtime.builder, places, lambda _: None)
    assert [p.name for p in places.images.iterdir() if "sif" in p.name] == []
    assert not list(tmp_path.glob("tanren-build-*"))


@pytest.fixture(scope="module")
def root_folder(
    images: Path, runtime: container.Runtime, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """cpu.sif unpacked, to install into."""
    folder = tmp_path_factory.mktemp("root") / "cpu"
    subprocess.run([runtime.binary, "build", "--sandbox", folder, images / "cpu.sif"], check=True,
                   capture_output=True)  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["train", "te19"])
def test_the_post_of_an_ngc_image_runs_on_another_base(
    runtime: container.Runtime, root_folder: Path, tmp_path: Path, name: str
) -> None:
    """The real lock and the real arguments, with the wheels of the base's own Python."""
    image: Image = IMAGES[name]
    versions = read_versions(image)
    own = read_versions(IMAGES["cpu"]).values
    here = replace(versions, values={**versions.values, "PYTHON": own["PYTHON"],
                                     "GLIBC": own["GLIBC"]})  # fmt: skip
    fetch_wheels(here, tmp_path / "wheels", tmp_path / "log")
    text = (REPOSITORY / image.definition).read_text()
    words = POST.search(text)
    assert words
    given = words[1].replace("\\\n", " ")
    for key in ("KEEP", "WITHOUT"):
        given = given.replace(f"{{{{ {key} }}}}", versions.values.get(key, ""))
    place = root_folder / "opt" / "tanren"
    for file in (*(REPOSITORY / "containers" / "patches").iterdir(), REPOSITORY / image.lock):
        shutil.copy(file, place / ("lock.txt" if file.name == f"{name}.txt" else file.name))
    # Debian's smallest base has no such program; NGC's have.
    program = shutil.which("patch")
    assert program
    shutil.copy(program, root_folder / "usr" / "bin" / "patch")
    command = [str(runtime.binary), "exec", "--cleanenv", "--no-home", "--no-mount", "cwd",
               "--pwd", "/", "--writable", "--env", "PIP_CONSTRAINT=/absent", "--bind",
               f"{tmp_path / 'wheels'}:/mnt", str(root_folder), "python3", "-B",
               "/opt/tanren/install.py", *given.split()]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    packages = json.loads((place / "packages.json").read_text())["python"]
    assert packages["torch"] == "2.13.0+cpu"
    assert {name: packages[name] for name in versions.pins} == versions.pins
    if name == "te19":
        assert "patched megatron-core 0.10.0 with megatron-core-0.10.0.patch" in done.stdout


OLD_CHECKPOINT = """
import argparse, os, sys
from pathlib import Path
import torch
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core import dist_checkpointing, optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

folder = Path(sys.argv[1])
if not folder.exists():
    folder.mkdir()
    torch.save({"args": argparse.Namespace(seq_length=8192), "iteration": 3}, folder / "common.pt")
try:
    state = TorchCommonLoadStrategy().load_common(folder)
    print("loaded", state["args"].seq_length, state["iteration"])
except Exception as error:
    print("refused", type(error).__name__)
"""


@pytest.mark.parametrize("version", ["0.9.0", "0.10.0"])
def test_the_patch_lets_trusted_checkpoints_through_and_no_others(
    tmp_path: Path, version: str
) -> None:
    """On the package as published, under a torch that unpickles weights alone."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest",
                    tmp_path, f"megatron-core=={version}"], check=True)  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")

    def load(folder: str, trusted: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", OLD_CHECKPOINT, tmp_path / folder],
            env=os.environ | {"PYTHONPATH": str(site), "TANREN_TRUSTED_CHECKPOINTS": trusted},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    ours, theirs = tmp_path / "ours", tmp_path / "ours-not"
    assert load("ours", str(ours)) == "refused UnpicklingError"
    patch = REPOSITORY / "containers" / "patches" / f"megatron-core-{version}.patch"
    subprocess.run(["patch", "--strip=1", "--fuzz=0", "--directory", site, "--input", patch],
                   check=True, capture_output=True)  # fmt: skip
    assert load("ours", f"/elsewhere:{ours}") == "loaded 8192 3"
    assert load("ours", str(tmp_path)) == "loaded 8192 3"
    assert load("ours", "") == "refused UnpicklingError"
    assert load(theirs.name, str(ours)) == "refused UnpicklingError"
    # No other place of the package was loosened.
    loose = subprocess.run(["grep", "-rn", "weights_only=False", site], check=False,
                           capture_output=True, text=True)  # fmt: skip
    assert loose.stdout == ""
    calls = subprocess.run(["grep", "-rhn", "weights_only=weights_only(", site], check=True,
                           capture_output=True, text=True)  # fmt: skip
    assert len(calls.stdout.splitlines()) == 5 + (version == "0.10.0")
