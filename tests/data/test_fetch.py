"""Fetching from a hub: pinned, gone on with, verified, refused with words."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tanren.config.errors import EXIT_FAILED, EXIT_REQUEST, RequestError, TanrenError
from tanren.config.load import repository
from tanren.data import fetch, hub
from tanren.data.hub import Fetched, Wanted
from tests.conftest import Tanren, end_group, wait_for
from tests.data.fake_hub import TOKEN, Hub, commit_of

WEB = {"web/a.jsonl": b'{"text": "a"}\n', "web/b.jsonl": b'{"text": "b"}\n', "README.md": b"hi\n"}


def wanted(text: str, *globs: str, kind: hub.Kind = "dataset") -> Wanted:
    return Wanted(hub.parse(text, kind), globs or ("**",))


def names(found: Fetched) -> list[str]:
    return [str(path.relative_to(found.folder)) for path in found.files]


def refusal(asked: Wanted, **options: Any) -> TanrenError:
    """The one error that a fetch ends with: a place, a problem, a next step, no secret."""
    with pytest.raises(TanrenError) as caught:
        fetch.fetch(asked, **options)
    assert caught.value.place
    assert caught.value.problem
    assert caught.value.next_step
    assert TOKEN not in caught.value.text()
    return caught.value


def test_a_pinned_data_set_is_fetched_once(fake_hub: Hub, tmp_path: Path) -> None:
    commit = fake_hub.repository("datasets/o/corpus").commit(WEB)
    asked = wanted(f"hf:o/corpus@{commit}", "web/*.jsonl", "*.md")
    shown: list[fetch.Progress] = []
    found = fetch.fetch(asked, shown.append)
    assert names(found) == ["README.md", "web/a.jsonl", "web/b.jsonl"]
    assert found.folder == tmp_path / "data" / "hub" / "datasets" / "o--corpus" / commit[:12]
    assert {n: (found.folder / n).read_bytes() for n in names(found)} == WEB
    assert (shown[-1].files, shown[-1].bytes) == (3, sum(map(len, WEB.values())))
    manifest = json.loads(hub.manifest_file(found.folder).read_text())
    assert manifest["revision"] == commit
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in WEB.items()
    }
    assert f"/api/datasets/o/corpus/revision/{commit}" not in " ".join(fake_hub.asked)
    fake_hub.asked.clear()
    assert fetch.fetch(asked) == found
    assert fake_hub.asked == []


def test_globs_are_added_to_what_is_there(fake_hub: Hub) -> None:
    fake_hub.repository("datasets/o/corpus").commit(WEB)
    first = fetch.fetch(wanted("o/corpus", "web/a*"))
    fake_hub.asked.clear()
    assert names(fetch.fetch(wanted("o/corpus", "web/*"))) == ["web/a.jsonl", "web/b.jsonl"]
    assert [line.rpartition("/")[2] for line in fake_hub.downloads()] == ["b.jsonl"]
    assert not [line for line in fake_hub.asked if "/tree/" in line], "it was listed before"
    assert hub.find(wanted("o/corpus", "web/a*")) == first
    fetch.fetch(wanted("o/corpus", "*.md"))
    assert hub.find(wanted("o/corpus", "web/a*")) == first


def test_a_branch_stays_where_it_was_until_update(fake_hub: Hub) -> None:
    corpus = fake_hub.repository("datasets/o/corpus")
    old = corpus.commit(WEB)
    asked = wanted("hf:o/corpus")
    assert fetch.fetch(asked).revision == old
    new = corpus.commit({**WEB, "web/c.jsonl": b"{}\n"})
    fake_hub.asked.clear()
    assert fetch.fetch(asked).revision == old
    assert fake_hub.asked == []
    said: list[str] = []
    found = fetch.fetch(asked, say=said.append, update=True)
    assert (found.revision, len(found.files)) == (new, 4)
    assert old in said[0]
    assert new in said[0]
    assert fetch.fetch(asked, say=said.append, update=True) == found
    assert len(said) == 1


def test_an_update_that_fails_leaves_what_was(fake_hub: Hub) -> None:
    corpus = fake_hub.repository("datasets/o/corpus")
    before = corpus.commit(WEB)
    asked = wanted("hf:o/corpus")
    assert fetch.fetch(asked).revision == before
    corpus.commit({"web/new.jsonl": b"{}\n"})
    fake_hub.gone.add("web/new.jsonl")
    refusal(asked, update=True)
    assert hub.find(asked).revision == before


def test_a_connection_that_breaks_goes_on_where_it_was(
    fake_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    content = bytes(range(256)) * 40
    fake_hub.repository("datasets/o/corpus").commit({"a.jsonl": content})
    fake_hub.breaks["a.jsonl"] = [5000]
    found = fetch.fetch(wanted("o/corpus"))
    assert found.files[0].read_bytes() == content
    assert [line.partition("bytes=")[2] for line in fake_hub.downloads()] == ["", "5000-"]


def test_a_fetch_that_failed_goes_on_with_the_files_that_came(fake_hub: Hub) -> None:
    fake_hub.repository("datasets/o/corpus").commit(WEB)
    fake_hub.breaks["web/b.jsonl"] = [3] * 20
    asked = wanted("o/corpus")
    error = refusal(asked, workers=1)
    assert error.exit_code == EXIT_FAILED
    assert "goes on with the files that came" in error.next_step
    with pytest.raises(hub.NotFetchedError, match="was not fetched to its end"):
        hub.find(asked)
    fake_hub.breaks.clear()
    fake_hub.asked.clear()
    assert len(fetch.fetch(asked).files) == 3
    again = [line.rpartition("/")[2] for line in fake_hub.downloads()]
    assert "b.jsonl" in again
    assert "a.jsonl" not in again


@pytest.mark.parametrize("name", ["web/a.jsonl", "README.md"])
def test_wrong_content_is_never_kept(fake_hub: Hub, name: str) -> None:
    """Of a large file the hub states its SHA-256, of others the name that git gives them."""
    fake_hub.repository("datasets/o/corpus").commit(WEB)
    fake_hub.wrong[name] = WEB[name].swapcase()
    assert len(fake_hub.wrong[name]) == len(WEB[name])
    error = refusal(wanted("o/corpus"))
    assert error.place.endswith(name)
    assert "is not what the hub states" in error.problem
    fake_hub.wrong.clear()
    assert len(fetch.fetch(wanted("o/corpus")).files) == 3


def test_what_changed_on_the_disk_is_found_and_fetched_again(fake_hub: Hub) -> None:
    """A size is seen at once, other content when it is hashed again."""
    fake_hub.repository("datasets/o/corpus").commit(WEB)
    asked = wanted("o/corpus")
    found = fetch.fetch(asked)
    a, b = found.folder / "web" / "a.jsonl", found.folder / "web" / "b.jsonl"
    a.write_bytes(a.read_bytes()[:3])
    with pytest.raises(hub.NotFetchedError, match=r"is not whole any more: web/a\.jsonl"):
        hub.find(asked)
    b.write_bytes(b.read_bytes().swapcase())
    said: list[str] = []
    assert fetch.fetch(asked, say=said.append) == found
    assert b.read_bytes() != WEB["web/b.jsonl"]
    assert fetch.fetch(asked, say=said.append, verify=True) == found
    assert said == ["hf:o/corpus@main changed since it was fetched: web/b.jsonl; fetched again"]
    assert {n: (found.folder / n).read_bytes() for n in names(found)} == WEB


def test_a_file_that_the_hub_lost(fake_hub: Hub) -> None:
    fake_hub.repository("datasets/o/corpus").commit(WEB)
    fake_hub.gone.add("web/a.jsonl")
    error = refusal(wanted("o/corpus"))
    assert "web/a.jsonl" in error.place
    assert "lists this file and does not have it" in error.problem


def test_a_glob_that_matches_nothing_names_what_is_there(fake_hub: Hub) -> None:
    fake_hub.repository("datasets/o/corpus").commit(WEB)
    error = refusal(wanted("o/corpus", "web/*.jsonl", "*.jsonl"))
    assert error.exit_code == EXIT_REQUEST
    assert error.problem == "no file matches *.jsonl; it has README.md, web/a.jsonl, web/b.jsonl"
    assert fake_hub.downloads() == []


def test_a_tokenizer_takes_what_its_repository_has(fake_hub: Hub) -> None:
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "model.safetensors": b"w",
             "old/tokenizer.json": b"{}"}  # fmt: skip
    fake_hub.repository("models/o/base").commit(files)
    fake_hub.repository("models/o/empty").commit({"README.md": b""})
    found = fetch.fetch(hub.tokenizer_of("hf:o/base"))
    assert names(found) == ["tokenizer.json", "tokenizer_config.json"]
    assert fetch.fetch(hub.model_of("hf:o/base")).folder == found.folder
    assert "no file matches tokenizer.json or" in refusal(hub.tokenizer_of("hf:o/empty")).problem


def test_a_login_is_asked_for_and_never_shown(
    fake_hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    private = fake_hub.repository("datasets/o/private")
    private.private = True
    private.commit(WEB)
    fake_hub.repository("datasets/o/gated").gated = True
    fake_hub.repository("datasets/o/gated").commit(WEB)
    error = refusal(wanted("o/private"))
    assert "no such dataset, or it is private and no login (HF_TOKEN is not set)" in error.problem
    assert "HF_TOKEN" in error.next_step
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = fetch.fetch(wanted("o/private"))
    assert len(found.files) == 3
    error = refusal(wanted("o/gated"))
    assert "is gated" in error.problem
    assert "HF_TOKEN" in error.next_step
    written = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert len(written) > 3
    assert [path for path in written if TOKEN in path.read_text()] == []


def test_what_is_not_on_the_hub(fake_hub: Hub) -> None:
    fake_hub.repository("datasets/o/corpus").commit(WEB)
    assert "is it a model?" in refusal(wanted("o/nothing")).next_step
    assert "has no revision v9" in refusal(wanted("o/corpus@v9")).problem
    gone = wanted(f"o/corpus@{commit_of('another')}")
    assert "has no revision" in refusal(gone).problem


def test_a_hub_that_is_down_or_away(fake_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.down = True
    assert "the hub answers 503" in refusal(wanted("o/corpus")).problem
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = refusal(wanted("o/corpus"))
    assert error.exit_code == EXIT_FAILED
    assert "cannot be reached" in error.problem
    assert "HF_ENDPOINT" in error.next_step


def test_offline_uses_what_is_there(fake_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.repository("datasets/o/corpus").commit(WEB)
    found = fetch.fetch(wanted("o/corpus", "web/*"))
    fake_hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch.fetch(wanted("o/corpus", "web/*"), verify=True) == found
    error = refusal(wanted("o/corpus", "web/*", "*.md"))
    assert error.problem.startswith("the files *.md of it are not fetched yet, and HF_HUB_OFFLINE")
    assert "which commit" in refusal(wanted("o/other")).problem
    found.files[0].write_bytes(b"other content\n"[: found.files[0].stat().st_size])
    assert "changed since it was" in refusal(wanted("o/corpus", "web/*"), verify=True).problem
    assert fake_hub.asked == []


def test_a_disk_that_is_too_small_is_told_before(
    fake_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.repository("datasets/o/corpus").commit({"a.jsonl": bytes(2 << 20), "b.jsonl": b"b"})
    usage = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    error = refusal(wanted("o/corpus"))
    assert error.problem == "hf:o/corpus@main needs 0.0 GiB more, and 0.0 are free"
    assert fake_hub.downloads() == []
    assert len(fetch.fetch(wanted("o/corpus", "b*")).files) == 1


def test_two_at_once_do_not_mix(fake_hub: Hub) -> None:
    fake_hub.repository("datasets/o/corpus").commit(WEB)
    refusals: list[str] = []

    def again() -> None:
        fake_hub.meanwhile.clear()
        refusals.append(refusal(wanted("o/corpus")).problem)

    fake_hub.meanwhile["web/a.jsonl"] = again
    assert len(fetch.fetch(wanted("o/corpus")).files) == 3
    assert [text.startswith("is being worked on by process") for text in refusals] == [True]


def test_a_killed_command_goes_on(fake_hub: Hub, bare: Tanren) -> None:
    """kill -9 in the middle of a file: the whole files stay, the torn one is fetched anew."""
    commit = fake_hub.repository("datasets/o/corpus").commit(WEB)
    bare.environment["HF_TOKEN"] = TOKEN
    folder = hub.folder_of(hub.parse("o/corpus", "dataset"), commit)
    words = ("fetch", f"hf:o/corpus@{commit}", "--files", "**/*.jsonl", "--workers", "1")
    killed = bare.start(*words)

    def kill() -> None:
        fake_hub.meanwhile.clear()
        wait_for(lambda: bool(list(folder.rglob("*.incomplete"))))
        end_group(killed)

    fake_hub.meanwhile["web/b.jsonl"] = kill
    wait_for(lambda: killed.poll() is not None)
    assert list(folder.rglob("*.incomplete")) != []
    assert not hub.manifest_file(folder).exists()
    fake_hub.asked.clear()
    done = bare(*words)
    assert done.code == 0, done.text
    assert done.out.splitlines()[-1].strip() == str(folder)
    assert TOKEN not in done.text
    assert [line.rpartition("/")[2] for line in fake_hub.downloads()] == ["b.jsonl"]
    assert list(folder.rglob("*.incomplete")) == []
    refused = bare("fetch", "hf:o/corpus", "--files", "*.txt")
    assert refused.code == EXIT_REQUEST
    assert "no file matches *.txt" in refused.err
    assert TOKEN not in refused.text


@pytest.mark.parametrize(
    ("path", "glob", "same"),
    [
        ("a.jsonl", "*.jsonl", True),
        ("web/a.jsonl", "*.jsonl", False),
        ("web/a.jsonl", "*/*.jsonl", True),
        ("web/a.jsonl", "**", True),
        ("web/a.jsonl", "**/*.jsonl", True),
        ("a.jsonl", "**/*.jsonl", True),
        ("web/ja/a.jsonl", "web/**", True),
        ("web/ja/a.jsonl", "web/**/a.jsonl", True),
        ("web/ja/a.jsonl", "web", False),
        ("web/A.jsonl", "web/a.jsonl", False),
        ("web/a1.jsonl", "web/a[0-9].jsonl", True),
    ],
)
def test_globs(path: str, glob: str, same: bool) -> None:
    assert hub.matches(path, glob) is same


@pytest.mark.parametrize("text", ["nothing", "a/b/c", "a/b@", "../b", "a/b@-x", "a b/c"])
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(RequestError, match="neither a folder here nor a repository"):
        hub.parse(text, "model")


def test_a_reference_is_pinned_by_a_whole_commit_alone() -> None:
    reference = hub.parse("hf:o/a@" + "0a" * 20, "dataset")
    assert reference.pinned
    assert not replace(reference, revision="0a" * 4).pinned
    assert str(hub.parse("o/a", "dataset")) == "hf:o/a@main"


def test_where_data_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA", raising=False)
    user = tmp_path / "user.toml"
    monkeypatch.setenv("TANREN_USER", str(user))
    user.write_text("")
    assert hub.data_root() == repository() / "data"
    user.write_text(f'data = "{tmp_path}/mine"')
    assert hub.data_root() == tmp_path / "mine"
    monkeypatch.setenv("DATA", str(tmp_path / "other"))
    assert hub.data_root() == tmp_path / "other"
