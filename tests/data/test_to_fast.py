"""SentencePiece models as tokenizer.json: the ids of the sentencepiece library."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from tanren.config.errors import RequestError
from tanren.data import to_fast
from tests.stages.test_real_data import DATA, MODEL

TEXTS = [
    "The smith folds the steel again and again, and again.",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "鍛錬とは、鉄を打って鍛えることである。ｶﾀｶﾅ ＡＢＣ ①②",
    "def forge(steel):\n    return steel * 2  # 二乗\n\n\n#### 42",
] * 3
KINDS: dict[str, dict[str, Any]] = {
    # As llm-jp's are.
    "unigram": {"model_type": "unigram", "byte_fallback": True, "remove_extra_whitespaces": False,
                "normalization_rule_name": "identity", "split_digits": True},
    # As T5's and many others' are.
    "nfkc": {"model_type": "unigram"},
    # As Llama 2's is.
    "bpe": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity"},
    "no prefix": {"model_type": "unigram", "byte_fallback": True, "add_dummy_prefix": False,
                  "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
}  # fmt: skip


def train(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=model, vocab_size=500,
        user_defined_symbols=["<EOD>"], hard_vocab_limit=options["model_type"] == "bpe",
        # Real models have all of these: names such as <0x41> can be written with their pieces.
        required_chars="".join(map(chr, range(33, 127))), minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def model(kind: str) -> Path:
        path = folder / f"{kind}.model"
        return path if path.exists() else train(path, **KINDS[kind])

    return model


class Both:
    """A model in the sentencepiece library and as a fast tokenizer; special tokens as text."""

    def __init__(self, model: Path, config: dict[str, Any] | None = None) -> None:
        self.theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
        ours, self.config = to_fast.convert(model, config or {})
        # As it is read back: reading rounds the scores.
        self.ours = tokenizers.Tokenizer.from_str(ours.to_str())
        self.ours.encode_special_tokens = True
        size = range(self.theirs.get_piece_size())
        self.scores = np.array([self.theirs.get_score(number) for number in size])

    def differing(self, texts: list[str]) -> list[str]:
        """Texts with other ids; those that differ by more than a tie fail the test."""
        encoded = self.ours.encode_batch(texts, add_special_tokens=False)
        found = []
        for text, one, theirs in zip(texts, encoded, self.theirs.encode(texts), strict=True):
            if one.ids != theirs:
                scores = [float(self.scores[ids].sum()) for ids in (one.ids, theirs)]
                assert scores[0] == pytest.approx(scores[1], rel=1e-5), text
                assert self.ours.decode(one.ids) == self.theirs.decode(theirs), text
                found.append(text)
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_the_sentencepiece_library(
    kind: str, made: Callable[[str], Path]
) -> None:
    both = Both(made(kind))
    assert both.ours.get_vocab_size() == both.theirs.get_piece_size() == len(both.scores)
    odd = ["", " ", "  two  spaces ", "\n\n", "\t", "未知の漢字: 鬱", "👩‍🔬🔨", "が é ﬁ ㍿", "a▁b",
           "<0x0A>", "a<0x41>b", "<s>", "x</s>", "<unk>", "\u2028\u3000\x00"]  # fmt: skip
    assert set(both.differing([*TEXTS, *odd])) <= {TEXTS[3]}, "there a tie"
    space = st.sampled_from([" ", "  ", "\n", "#", "a", "the", "。", "鍛錬", "42", "<s>", "<0x20>"])

    @settings(deadline=None, max_examples=150)
    @given(st.text(st.characters(codec="utf-8"), max_size=30) | st.lists(space).map("".join))
    @example("again again")
    def check(text: str) -> None:
        if kind == "bpe":
            assert both.differing([text]) == []
        else:
            both.differing([text])

    check()


def test_ties_are_all_that_differs_in_real_text() -> None:
    if not MODEL.exists():
        pytest.skip(f"there is no {MODEL}")
    both = Both(MODEL, json.loads((MODEL.parent / "tokenizer_config.json").read_text()))
    assert both.ours.get_vocab_size() == 196608
    assert (both.ours.token_to_id("<|startoftext|>"), both.config["eos_token"]) == (1, "<|return|>")
    lines = (DATA / "gsm8k" / "train.jsonl").read_text().splitlines()[:1000]
    mathematics = [text for line in lines for text in json.loads(line).values()]
    sentences = (DATA / "jnli" / "jnli-v1.1-train.txt").read_text().splitlines()[:5000]
    code = Path(to_fast.__file__).read_text().splitlines()
    assert both.differing(sentences + code) == []
    differing = both.differing(mathematics)
    assert 0 < len(differing) < len(mathematics) * 0.01
    assert all("####" in text for text in differing)


def test_pieces_that_are_no_text_are_found_by_no_text_but_users_own_are(
    made: Callable[[str], Path],
) -> None:
    both = Both(made("unigram"))
    ids = {name: both.theirs.piece_to_id(name) for name in ("<s>", "</s>", "<EOD>", "<0x41>")}
    [text] = both.ours.encode_batch(["a<s>b</s>c<0x41><EOD>d"], add_special_tokens=False)
    assert ids["<EOD>"] in text.ids
    assert not {ids["<s>"], ids["</s>"], ids["<0x41>"]} & set(text.ids)
    both.ours.encode_special_tokens = False
    marked = both.ours.encode("<s>again</s>\n\n", add_special_tokens=False)
    assert marked.tokens[:2] == ["<s>", "▁again"], "as after BOS in pre-training"
    assert marked.tokens[2:4] == ["</s>", "▁"]
    assert both.ours.decode(marked.ids[1:2]) == "again"


def test_no_merges_lead_to_a_control_piece(made: Callable[[str], Path], tmp_path: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(made("bpe").read_bytes())
    long = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) > 1]
    long[-2].piece, long[-1].piece = "</", "s>"
    (tmp_path / "a.model").write_bytes(proto.SerializeToString())
    both = Both(tmp_path / "a.model")
    assert both.theirs.encode("x</s>", out_type=str) == ["▁", "x", "</", "s>"]
    assert both.differing(["x</s>", "</s>"]) == []


def test_settings_may_name_pieces_anew_and_add_some(made: Callable[[str], Path]) -> None:
    model = made("unigram")
    size = Both(model).theirs.get_piece_size()
    special = {"special": True, "normalized": False}
    names = {"2": {"content": "<|return|>", **special}, "3": {"content": "<|eod|>", **special},
             str(size): {"content": "<|new|>", **special}}  # fmt: skip
    both = Both(model, {"added_tokens_decoder": names, "eos_token": "<|return|>", "legacy": False})
    ids = [both.ours.token_to_id(name) for name in ("<|return|>", "<|eod|>", "<|new|>", "<EOD>")]
    assert ids == [2, 3, size, None]
    assert both.ours.get_vocab_size() == size + 1
    assert both.config["eos_token"] == "<|return|>"
    assert both.config["bos_token"] == "<s>"
    assert "legacy" not in both.config
    both.differing(TEXTS)
    for added, problem in (
        ({str(size + 1): {"content": "<|new|>"}}, "has the id .*have a gap"),
        ({"2": {"content": "<s>"}}, "'<s>' is the name of two pieces"),
    ):
        with pytest.raises(RequestError, match=problem):
            to_fast.convert(model, {"added_tokens_decoder": added})


def test_a_model_of_another_kind_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    for number, (change, problem) in enumerate((
        (lambda proto: setattr(proto.trainer_spec, "model_type", 3), "neither a unigram nor a BPE"),
        (lambda proto: setattr(proto.trainer_spec, "treat_whitespace_as_suffix", True), "behind"),
        (lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False), "as ▁"),
    )):  # fmt: skip
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(made("unigram").read_bytes())
        change(proto)
        path = tmp_path / f"{number}.model"
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(RequestError, match=problem):
            to_fast.convert(path, {})
    (tmp_path / "no.model").write_bytes(b"none")
    with pytest.raises(RequestError, match="is not a SentencePiece model"):
        to_fast.convert(tmp_path / "no.model", {})
