"""What a run compiles is there for the next."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from tanren.engine import kernel_cache

NAMES = (
    "TRITON_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "QUACK_CACHE_DIR",
)  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "QUACK_CACHE_ENABLED"):
        # Set first, so that what a test leaves is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_all_compilers_keep_theirs_below_the_folder(tmp_path: Path) -> None:
    kernel_cache.keep(tmp_path / "kernels")
    triton, enabled, flash, quack = (os.environ[name] for name in NAMES)
    assert {Path(one).parent for one in (triton, flash, quack)} == {tmp_path / "kernels"}
    assert enabled == "1" and len({triton, flash, quack}) == 3
    assert list((tmp_path / "kernels").iterdir()) == []


def test_another_processor_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_cache.keep(tmp_path)
    own = [os.environ.pop(name) for name in NAMES[2:]]
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor: 0\nflags\t: fpu avx9\n")
    kernel_cache.keep(tmp_path)
    assert all(os.environ[name] != one for name, one in zip(NAMES[2:], own, strict=True))


def test_a_folder_that_cannot_be_had_is_no_reason_to_stop(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "kernels").write_text("a file")
    kernel_cache.keep(tmp_path / "kernels")
    assert not any(name in os.environ for name in NAMES)
    assert os.environ["QUACK_CACHE_ENABLED"] == "0"
    assert "File exists; kernels are compiled at each start" in caplog.text


def test_what_a_site_says_stays(tmp_path: Path) -> None:
    os.environ.update({NAMES[0]: "/local/triton", NAMES[1]: "0"})
    kernel_cache.keep(tmp_path)
    assert os.environ[NAMES[0]] == "/local/triton" and os.environ[NAMES[1]] == "0"


def test_where_nothing_can_be_locked_triton_alone_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("INFO", "tanren"):
        kernel_cache.keep(tmp_path)
    assert [name in os.environ for name in NAMES] == [True, False, False, False]
    assert os.environ["QUACK_CACHE_ENABLED"] == "0"
    assert "cannot be locked" in caplog.text
