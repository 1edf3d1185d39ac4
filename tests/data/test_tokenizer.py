"""Tokenizers: training, reading, and what transformers makes of the folder."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tanren.config.errors import EXIT_REQUEST, RequestError
from tanren.data import tokenizer as tokenizers

# Many pairs are equally frequent here: only a fixed rule for ties gives the same merges twice.
TEXTS = [
    "The smith folds the steel again and again.",
    "吾輩は猫である。名前はまだ無い。",
    "鍛錬とは、鉄を打って鍛えることである。",
    "def forge(steel):\n    return steel * 2\n",
] * 3
SIZE = 300
SPECIAL = (tokenizers.BOS, tokenizers.EOS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    return tokenizers.train(TEXTS, SIZE, tmp_path_factory.mktemp("tokenizer"))


def lists(encoded: list[tokenizers.Ids]) -> list[list[int]]:
    return [ids.tolist() for ids in encoded]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_training_again_gives_the_same_files(trained: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """In this process, and in another with other hash seeds and one thread."""
    tokenizers.train(iter(TEXTS), SIZE, tmp_path / "again")
    program = (
        "import sys, pathlib; from tanren.data import tokenizer\n"
        f"tokenizer.train({TEXTS!r}, {SIZE}, pathlib.Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "elsewhere")],
        env=os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
        check=True,
    )
    expected = files(trained.folder)
    assert set(expected) == {"tokenizer.json", "tokenizer_config.json"}
    assert files(tmp_path / "again") == expected
    assert files(tmp_path / "elsewhere") == expected


@pytest.mark.parametrize(
    "text",
    ["", " ", "a", " leading and  double ", "tabs\tand\r\nlines\n", *TEXTS[:4],
     "未知の漢字: 鬱、絵文字: 👩‍🔬、結合: が", "\x00\x7f\u2028"],
)  # fmt: skip
def test_text_comes_back(trained: tokenizers.Tokenizer, text: str) -> None:
    [ids] = trained.encode([text])
    assert trained.backend.decode(ids) == text


@settings(deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=4))
@example(texts=["a</s>b", "<s>"])
def test_any_text_comes_back_without_special_tokens(
    trained: tokenizers.Tokenizer, texts: list[str]
) -> None:
    """Also where a document speaks of special tokens: its text is not taken for them."""
    encoded = trained.encode(texts)
    assert [trained.backend.decode(ids) for ids in encoded] == texts
    assert all(1 < number < trained.size for ids in encoded for number in ids)


def test_the_special_tokens_are_where_training_looks(trained: tokenizers.Tokenizer) -> None:
    assert (trained.bos, trained.eod, trained.size) == (0, 1, SIZE)
    assert tuple(trained.backend.pieces()[piece] for piece in SPECIAL) == (0, 1)
    assert lists(tokenizers.read(trained.folder).encode(TEXTS)) == lists(trained.encode(TEXTS))
    [ids] = trained.encode([TEXTS[0]])
    assert len(ids) < len(TEXTS[0]) / 1.3, "merges were learned"


def test_transformers_reads_the_folder(trained: tokenizers.Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained.folder, local_files_only=True)
    assert (theirs.bos_token, theirs.eos_token) == SPECIAL
    assert (theirs.bos_token_id, theirs.eos_token_id) == (trained.bos, trained.eod)
    assert len(theirs) == trained.size
    texts = [*TEXTS, " 'twas  not 's . , ! ?"]
    ids = lists(trained.encode(texts))
    assert theirs(texts, add_special_tokens=False)["input_ids"] == ids
    assert [theirs.decode(each) for each in ids] == texts


def test_too_little_text_names_what_can_be_learned(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="only 261") as caught:
        tokenizers.train(["abcab"], 5000, tmp_path / "t")
    assert caught.value.place == "tokenizer.train.vocabulary_size"
    assert not (tmp_path / "t").exists()
    assert tokenizers.train(["abcab"], 261, tmp_path / "t").size == 261


def write_config(name: str, value: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(value)


@pytest.mark.parametrize(
    ("damage", "place", "problem"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "", "has no tokenizer.json"),
        (write_config("tokenizer.json", b'{"model": '), "tokenizer.json", "is not a tokenizer"),
        (write_config("tokenizer.json", b"{}"), "tokenizer.json", "is not a tokenizer"),
        (write_config("tokenizer.json", b""), "tokenizer.json", "is not a tokenizer"),
        (write_config("tokenizer_config.json", b"{"), "tokenizer_config.json", "is not JSON"),
        (write_config("special_tokens_map.json", b"{"), "special_tokens_map.json", "is not JSON"),
        (
            write_config("tokenizer_config.json", b'{"eos_token": "<eos>"}'),
            "tokenizer_config.json",
            "the end-of-sequence token '<eos>' is not in the vocabulary",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").unlink(),
            "tokenizer_config.json",
            "the end-of-sequence token None is not in the vocabulary",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(
    trained: tokenizers.Tokenizer,
    tmp_path: Path,
    damage: Callable[[Path], object],
    place: str,
    problem: str,
) -> None:
    tokenizers.copy(trained.folder, tmp_path)
    damage(tmp_path)
    with pytest.raises(RequestError) as caught:
        tokenizers.read(tmp_path)
    assert (caught.value.place, caught.value.exit_code) == (str(tmp_path / place), EXIT_REQUEST)
    assert caught.value.problem.startswith(problem)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no tokenizer\.json"):
        tokenizers.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("special", "config", "bos", "eod"),
    [
        ({}, {"eos_token": {"content": "</s>", "lstrip": False}}, None, 1),
        ({"eos_token": "</s>", "bos_token": {"content": "<s>"}}, None, 0, 1),
        ({"eos_token": "<s>"}, {"eos_token": "</s>", "bos_token": None}, None, 1),
        ({"bos_token": "<s>"}, {"eos_token": "<extra>"}, 0, 400),
    ],
)
def test_special_tokens_are_found_in_every_form(
    trained: tokenizers.Tokenizer,
    tmp_path: Path,
    special: dict[str, object],
    config: dict[str, object] | None,
    bos: int | None,
    eod: int,
) -> None:
    """As strings, as objects, in either file; an added token beyond a gap counts in the size."""
    tokenizers.copy(trained.folder, tmp_path)
    whole = orjson.loads((tmp_path / "tokenizer.json").read_bytes())
    whole["added_tokens"].append(whole["added_tokens"][0] | {"id": 400, "content": "<extra>"})
    whole["model"]["vocab"]["<extra>"] = 400
    (tmp_path / "tokenizer.json").write_bytes(orjson.dumps(whole))
    (tmp_path / "special_tokens_map.json").write_bytes(orjson.dumps(special))
    (tmp_path / "tokenizer_config.json").unlink()
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    tokenizer = tokenizers.read(tmp_path)
    assert (tokenizer.bos, tokenizer.eod, tokenizer.size) == (bos, eod, 401)


def test_copy_takes_the_tokenizer_and_leaves_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    names = ("tokenizer.json", "tokenizer_config.json", "x.model", "llmjp4_tokenizer.py",
             "chat_template.jinja")  # fmt: skip
    for name in (*names, "model.safetensors", "config.json", "modeling_x.py"):
        (source / name).write_text(name)
    tokenizers.copy(source, tmp_path / "to" / "there")
    assert files(tmp_path / "to" / "there") == {name: name.encode() for name in sorted(names)}
    tokenizers.copy(source / "x.model", tmp_path / "one")
    assert files(tmp_path / "one") == {"x.model": b"x.model"}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model as llm-jp's are: unigram, bytes for what it has not, own pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=model, vocab_size=360,
        model_type="unigram", byte_fallback=True, split_digits=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["<EOD>"], hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def test_a_sentencepiece_model_is_read_as_file_and_as_folder(pieces: Path, tmp_path: Path) -> None:
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    texts = [*TEXTS, "", "未知の漢字: 鬱 🔨", "a<EOD>b</s>"]
    for path in (pieces, pieces.parent):
        ours = tokenizers.read(path)
        assert (ours.bos, ours.eod, ours.size) == (1, 2, theirs.get_piece_size())
        assert lists(ours.encode(texts)) == theirs.encode(texts)
    eod = theirs.piece_to_id("<EOD>")
    [ids] = ours.encode(["a<EOD>b</s>"])
    assert eod in ids, "a user-defined piece is one, as Megatron has it"
    assert 2 not in ids, "the text of a control piece is text"
    assert [ours.backend.decode(ids) for ids in ours.encode(TEXTS)] == TEXTS


def test_tokenizers_that_differ_are_told_apart(
    trained: tokenizers.Tokenizer, pieces: Path, tmp_path: Path
) -> None:
    tokenizers.copy(trained.folder, tmp_path / "copy")
    assert trained.agrees_with(tokenizers.read(tmp_path / "copy"))
    assert tokenizers.read(tmp_path / "copy").digest == trained.digest
    smaller = tokenizers.train(TEXTS, SIZE - 1, tmp_path / "smaller")
    assert not trained.agrees_with(smaller)
    assert smaller.digest != trained.digest
    sentencepiece = tokenizers.read(pieces)
    assert sentencepiece.agrees_with(tokenizers.read(pieces.parent))
    assert not sentencepiece.agrees_with(trained)
    assert not trained.agrees_with(sentencepiece)


def test_a_model_file_that_cannot_be_read_is_refused(tmp_path: Path, pieces: Path) -> None:
    with pytest.raises(RequestError, match="there is no such file"):
        tokenizers.read(tmp_path / "no.model")
    (tmp_path / "a.model").write_bytes(b"not one")
    with pytest.raises(RequestError, match="is not a SentencePiece model"):
        tokenizers.read(tmp_path)
    (tmp_path / "b.model").write_bytes(pieces.read_bytes())
    with pytest.raises(RequestError, match=r"has no tokenizer\.json and 2 SentencePiece models"):
        tokenizers.read(tmp_path)
