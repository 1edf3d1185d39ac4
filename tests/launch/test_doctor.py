"""What `make doctor` says of machines that have, lack or break something."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tanren.images import definition
from tanren.images.definition import IMAGES
from tanren.images.lock import Base, Commit, Lock, write_lock
from tanren.launch import doctor
from tanren.launch.doctor import Finding, Group
from tanren.launch.outside import Outside
from tanren.launch.quota import quota_of
from tests.conftest import REPOSITORY, Tanren

SMI = "| NVIDIA-SMI 590.1     Driver Version: 590.1     CUDA Version: {cuda}     |\n"
LISTED = "NVIDIA H200, 143771\n"


def programs(**answers: str) -> Callable[[Sequence[str]], str | None]:
    """Programs by the beginning of their command line; the others are absent."""

    def run(command: Sequence[str]) -> str | None:
        line = " ".join(command)
        found = [text for start, text in answers.items() if line.startswith(start)]
        return found[-1] if found else None

    return run


def world(**changes: object) -> Outside:
    """A machine on which nothing is wrong, and nothing is more than needed."""
    empty = Outside(
        run=programs(git="", bash="1 2\n"), which=lambda name: None, free=lambda path: 2**40,
        writable=lambda path: True, fetch=lambda url: None, module=lambda name: name == "torch",
        gpus=lambda: 0, environment={}, python=(3, 11, 7), home=Path("/"),
    )  # fmt: skip
    return replace(empty, **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def nothing_of_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user.toml").write_text("")
    for name, value in (("TANREN_USER", tmp_path / "user.toml"), ("RUNS", tmp_path / "runs"),
                        ("DATA", tmp_path / "data"), ("IMAGES", tmp_path / "images")):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("SITE", raising=False)


def all_of(groups: list[Group]) -> dict[str, Finding]:
    found = {one.what: one for group in groups for one in group.findings}
    assert len(found) == sum(len(group.findings) for group in groups), "a name stands twice"
    return found


def look(site: str | None = "local", **changes: object) -> dict[str, Finding]:
    return all_of(doctor.examine(site, world(**changes)))


def test_a_laptop_with_a_whole_venv_lacks_nothing() -> None:
    groups = doctor.examine("local", world())
    assert doctor.lacking(groups) is None
    found = all_of(groups)
    assert [group.title.split(",")[0] for group in groups] == [
        "every stage", "preprocess", "build-image", "jobs (submit)", "eval", "merge",
        "sft and dpo with engine: nemo", "fetch",
    ]  # fmt: skip
    assert (found["torch"].state, found["torch"].found) == ("ok", "in .venv")
    assert (found["hub"].state, found["git tree"].state) == ("ok", "ok")
    assert found["disk of runs"].found.startswith("1,024.0 GiB free")
    for one in found.values():
        assert one.state == "ok" or one.next_step, f"{one.what} says nothing to do"


@pytest.mark.parametrize(
    ("changes", "what", "state", "found"),
    [
        ({"python": (3, 9, 2)}, "Python", "missing", "3.9.2"),
        ({"module": lambda name: False}, "torch", "missing", "neither in .venv nor in an image"),
        ({"free": lambda path: 2**29}, "disk of runs", "missing", "0.5 GiB free"),
        ({"free": lambda path: 2**33}, "disk of runs", "warning", "8.0 GiB free"),
        ({"writable": lambda path: False}, "disk of runs", "missing", "cannot be written"),
        ({"run": programs(git=" M src/a.py\n M b\n")}, "git tree", "warning", "2 tracked files "
         "changed (src/a.py, ...)"),
        ({"run": programs()}, "git tree", "warning", "no checkout that git can read"),
        ({"fetch": lambda url: "timed out"}, "hub", "warning", "https://huggingface.co: timed out"),
        ({"environment": {"HF_HUB_OFFLINE": "1"}}, "hub", "warning", "HF_HUB_OFFLINE is set"),
        ({"gpus": lambda: 8}, "GPUs", "missing", "8 in the machine, and nvidia-smi does not"),
        ({"which": lambda name: name if name == "apptainer" else None}, "container program",
         "missing", "apptainer does not start"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_to_do(
    changes: dict[str, object], what: str, state: str, found: str
) -> None:
    groups = doctor.examine("local", world(**changes))
    one = all_of(groups)[what]
    assert one.state == state
    assert found in one.found
    assert one.next_step
    refusal = doctor.lacking(groups)
    assert (refusal is not None) == (one.needed and state == "missing")
    if refusal is not None:
        assert (refusal.place, refusal.exit_code) == (what, 2)


@pytest.mark.parametrize(
    ("listed", "cuda", "gpus", "driver"),
    [
        (LISTED * 8, "13.2", "ok", "ok"),
        (LISTED * 8, "13.0", "ok", "ok"),  # minor version compatibility
        (LISTED * 8, "12.8", "ok", "warning"),
        (LISTED * 7, "13.1", "missing", "ok"),
        (LISTED * 7 + "NVIDIA H100, 95830\n", "13.1", "warning", "ok"),
        (LISTED * 8, "N/A", "ok", "warning"),
    ],
)
def test_gpus_and_their_driver_against_the_image(
    listed: str, cuda: str, gpus: str, driver: str
) -> None:
    answers = {"git": "", "nvidia-smi": SMI.format(cuda=cuda), "nvidia-smi --query": listed}
    found = look(gpus=lambda: 8, run=programs(**answers))
    assert (found["GPUs"].state, found["driver"].state) == (gpus, driver)
    if gpus == "ok":
        assert found["GPUs"].found == "8 x NVIDIA H200 140 GiB"
    wanted = re.search(r"^TRAIN_CUDA=(\S+)", (REPOSITORY / "containers/versions.env").read_text(),
                       re.MULTILINE)  # fmt: skip
    assert wanted is not None
    if cuda != "N/A":
        assert found["driver"].found == f"CUDA {cuda}, the train image has {wanted[1]}"
    assert found["Transformer Engine"].state == "warning"


@pytest.mark.parametrize(
    ("there", "state", "found"),
    [
        ((), "warning", "flash-attn-4 and quack-kernels missing in .venv: slower on Hopper GPUs"),
        (("flash_attn",), "warning", "quack-kernels missing in .venv: slower on Hopper GPUs"),
        (("flash_attn", "quack"), "ok", "flash-attn-4 and quack-kernels in .venv"),
    ],
)
def test_a_venv_on_gpus_may_lack_what_makes_it_fast(
    there: tuple[str, ...], state: str, found: str
) -> None:
    modules = {"torch", "transformer_engine", *there}
    one = look(gpus=lambda: 8, module=modules.__contains__)["fast kernels"]
    assert (one.state, one.found) == (state, found)
    install = '.venv/bin/pip install "flash-attn-4[cu13]==4.0.0b36" "quack-kernels==0.6.5"'
    assert one.next_step == ("" if state == "ok" else install)


def test_the_cuda_of_a_base_changes_no_image(tmp_path: Path) -> None:
    """It only says what the base has: an image that is built stays the checkout's."""
    import shutil

    shutil.copytree(REPOSITORY / "containers", tmp_path / "containers")
    before = definition.definition_digest(IMAGES["train"], tmp_path)
    versions = tmp_path / "containers" / "versions.env"
    versions.write_text(versions.read_text().replace("TRAIN_CUDA=", "TRAIN_CUDA=9"))
    assert definition.read_versions(IMAGES["train"], tmp_path).cuda == "913.1"
    assert definition.definition_digest(IMAGES["train"], tmp_path) == before
    versions.write_text(versions.read_text().replace("TRAIN_GLIBC=", "TRAIN_GLIBC=9"))
    assert definition.definition_digest(IMAGES["train"], tmp_path) != before


def test_an_image_of_this_checkout_and_one_of_another(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, digest in (("cpu", definition.definition_digest(IMAGES["cpu"])), ("merge", "old")):
        sif = tmp_path / "images" / f"{name}.sif"
        sif.write_bytes(b"sif")
        write_lock(sif, Lock(
            image=name, sha256="ab", bytes=3, base=Base(name="b", digest=None), definition=digest,
            commit=Commit(id="c", dirty=False), builder="x", built="today", seconds=1.0, python={},
            system={},
        ))  # fmt: skip
    found = look(which=lambda name: name, run=programs(git="", apptainer="apptainer 1.4.5\n"),
                 module=lambda name: False)  # fmt: skip
    assert found["container program"].found == "apptainer 1.4.5"
    assert (found["cpu.sif"].state, found["cpu.sif"].found) == (
        "ok", "of this checkout, built today")  # fmt: skip
    assert found["merge.sif"].state == "warning"
    assert "make build-image IMAGE=merge" in found["merge.sif"].next_step
    assert found["train.sif"].found.startswith("not built")
    # No torch in .venv, and none is needed.
    assert (found["torch"].state, found["torch"].found) == ("ok", "in cpu.sif")


def test_a_login_node_needs_a_group_and_no_torch(tmp_path: Path) -> None:
    qsub = {"which": lambda name: name if name.startswith("q") else None,
            "module": lambda name: False}  # fmt: skip
    groups = doctor.examine("abci3", world(**qsub))
    refusal = doctor.lacking(groups)
    assert refusal is not None
    assert refusal.place == "group"
    assert "user.toml" in refusal.next_step
    (tmp_path / "user.toml").write_text('group = "gaa50000"\n')
    groups = doctor.examine("abci3", world(**qsub))
    assert doctor.lacking(groups) is None
    found = all_of(groups)
    assert (found["group"].found, found["scheduler"].found) == ("gaa50000", "qsub, qstat, qdel")
    assert found["image for jobs"].state == "missing"
    assert found["GPUs"].state == "ok"
    groups = doctor.examine("tsubame4", world(module=lambda name: False))
    refusal = doctor.lacking(groups)
    assert refusal is not None
    assert (refusal.place, refusal.problem) == (
        "scheduler", "no qsub, qstat, qdel on this machine")  # fmt: skip


def test_keys_are_set_or_not_and_never_shown() -> None:
    keys = {"HF_TOKEN": "hf_planted_secret", "WANDB_API_KEY": "planted0123456789"}
    found = look(environment=keys)
    assert [found[key].found for key in keys] == ["is set", "is set"]
    assert not any(value in repr(found) for value in keys.values())
    assert look()["HF_TOKEN"].state == "warning"


def test_a_name_server_that_hangs_costs_two_seconds() -> None:
    def hang(url: str) -> str | None:
        time.sleep(20)
        return None

    began = time.monotonic()
    found = look(fetch=hang)
    assert time.monotonic() - began < 4
    assert (found["hub"].state, found["hub"].found) == (
        "warning", "https://huggingface.co: no answer within 2 s")  # fmt: skip


LUSTRE = """\
 /groups/gaa50000 {used} {soft} {hard} - 12345 0 0 -
"""
NFS = """\
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
nas:/other 9999999 1 1 0 1 0 0 0
nas:/home {used} {soft} {hard} 0 123 0 0 0
"""


@pytest.mark.parametrize(
    ("used", "soft", "hard", "expected"),
    [("1048576", "0", "26214400", (1.0, 25.0)), ("26214401*", "26214400", "0", (25.0, 25.0)),
     ("1048576", "0", "0", None)],
)  # fmt: skip
def test_a_quota_is_read_as_lustre_and_nfs_tell_it(
    used: str, soft: str, hard: str, expected: tuple[float, float] | None
) -> None:
    row = {"used": used, "soft": soft, "hard": hard}
    lustre = {"stat -f": "lustre\n", "stat -c %G": "gaa\n", "lfs quota -q -g gaa":
              LUSTRE.format(**row)}  # fmt: skip
    nfs = {"stat -f": "nfs\n", "stat -c %m": "/home\n", "findmnt": "nas:/home\n",
           "quota": NFS.format(**row)}  # fmt: skip
    for answers in (lustre, nfs):
        found = quota_of(Path("/x"), world(run=programs(**answers), which=lambda name: name))
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert (found.used_gib, found.limit_gib) == pytest.approx(expected, abs=1e-5)


def test_a_full_quota_is_missing_though_the_disk_is_empty() -> None:
    answers = {"git": "", "stat -f": "lustre", "stat -c %G": "g",
               "lfs quota": LUSTRE.format(used="26000000", soft=0, hard=26214400)}  # fmt: skip
    found = look(run=programs(**answers))
    assert found["quota of home"].state == "missing"
    assert found["quota of home"].found == "24.8 of 25.0 GiB used"
    assert look()["disk of home"].state == "ok"


def test_looking_imports_no_torch() -> None:
    program = (
        "import sys; from tanren.launch import doctor; groups = doctor.examine('local'); "
        "print(len(groups), [name for name in ('torch', 'numpy', 'transformers') "
        "if name in sys.modules])"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "8 []\n"


def test_the_command_says_what_it_finds_and_what_is_wrong_with_a_site(tmp_path: Path) -> None:
    """As a person runs it here: whatever this machine has, lines and exit code agree."""
    tanren = Tanren(tmp_path / "runs", {"HF_HUB_OFFLINE": "1"})
    done = tanren("doctor", "--site", "local")
    states = re.findall(r"^  (ok|warning|missing) +(?:\S+ )+", done.out, re.MULTILINE)
    assert len(states) > 15
    assert (done.code, done.err == "") in ((0, True), (2, False))
    assert done.code == 0 or "missing" in states
    done = tanren("doctor", "--site", "nowhere")
    assert done.code == 2
    assert "nowhere.yaml" in done.err
