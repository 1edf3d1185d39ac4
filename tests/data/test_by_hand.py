"""tanren tokenize: files to token files without a recipe."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from tanren.data import indexed
from tanren.data import tokenizer as tokenizers
from tests.conftest import Tanren

TEXTS = [f"{number}: 鍛錬 the smith folds the steel" for number in range(50)]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    tokenizers.train(TEXTS, 300, tmp_path / "tokenizer")
    lines = b"".join(orjson.dumps({"body": text}) + b"\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_bytes(lines)
    return ["--input", f"{tmp_path}/*.jsonl", "--tokenizer", str(tmp_path / "tokenizer"),
            "--output-prefix", str(tmp_path / "out" / "t"), "--text-key", "body"]  # fmt: skip


def test_what_is_asked_for_is_added_and_nothing_else(
    bare: Tanren, words: list[str], tmp_path: Path
) -> None:
    prefix, tokenizer = tmp_path / "out" / "t", tokenizers.read(tmp_path / "tokenizer")
    plain = [ids.tolist() for ids in tokenizer.encode(TEXTS)]
    for options, expected in (
        ((), plain),
        (("--append-eod", "--workers", "1"), [[*ids, tokenizer.eod] for ids in plain]),
        (("--prepend-bos",), [[tokenizer.bos, *ids] for ids in plain]),
    ):
        done = bare("tokenize", *words, *options)
        assert done.code == 0, done.text
        indexed.write(tmp_path / "theirs", expected, tokenizer.size)
        for suffix in ("bin", "idx"):
            ours = (tmp_path / "out" / f"t.{suffix}").read_bytes()
            assert ours == (tmp_path / f"theirs.{suffix}").read_bytes()
        assert f"50 documents, {indexed.check(prefix).tokens:,} tokens" in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"t.bin", "t.idx"}


def test_what_cannot_be_done_is_said_and_leaves_nothing(
    bare: Tanren, words: list[str], tmp_path: Path
) -> None:
    done = bare("tokenize", *words, "--input", f"{tmp_path}/no*.jsonl")
    assert done.code == 2
    assert "no file of source t is there" in done.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    done = bare("tokenize", *words, "--prepend-bos")
    assert done.code == 2
    assert "names no bos_token" in done.err
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"{\n")
    done = bare("tokenize", *words)
    assert done.code == 2
    assert "a.jsonl:51: is not JSON" in done.err
    done = bare("tokenize", *words, "--skip-errors")
    assert done.code == 0
    assert "1 lines passed over" in done.out
    assert len((tmp_path / "out" / "t.skipped.jsonl").read_text().splitlines()) == 1
