"""Tokenizers and templates of many kinds, as folders that training and inference take alike."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tanren.data import template, to_fast
from tests.stages.test_real_data import MODEL

TEXTS = [
    "The smith folds the steel again and again.\n\n### 指示:\nfold it\n\n### 応答:\n\nI fold it.",
    "吾輩は猫である。\n\n名前はまだ無い。\n\n\n### 応答:\n\n\n鍛錬とは鉄を打つことである。",
    "def forge(steel):\n    return steel * 2\n\n\nassistant\n\nuser\n\n system  \n 42 </think>",
] * 4
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|eot|>", "<|channel|>")
# Everything that a text of these can be: the pieces of special tokens, too.
ALPHABET = sorted(set("".join((*TEXTS, *SPECIAL))))

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|header|>' + message['role'] + "
    "'<|header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|header|>\\n\\n' }}{% endif %}"
)
# As Qwen 3's and DeepSeek's: reasoning is in the last answer alone.
THINKING = (
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + text + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Phi's: the answer follows a special token.
BARE = (
    "{% for message in messages %}{{ '<|header|>' + message['role'] + '<|channel|>' + "
    "message['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|channel|>' }}{% endif %}"
)
# As OpenAI's harmony: special tokens in the answer, and another one behind the last.
CHANNELS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant<|channel|>' + message['content'] }}"
    "{{ '</s>' if loop.last else '<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "thinking": THINKING, "channels": CHANNELS,
             "bare": BARE}  # fmt: skip


def _bpe(pre_tokenizer: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=450, special_tokens=list(SPECIAL), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return backend


def _unigram(normalizer: Any, pre_tokenizer: Any) -> tokenizers.Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "a.model"
        model.write_bytes(_pieces())
        backend, _ = to_fast.convert(model, {"added_tokens_decoder": added_tokens(1)})
    backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return backend


def added_tokens(first: int) -> dict[str, dict[str, Any]]:
    special = {"special": True, "normalized": False}
    return {str(first + n): {"content": name, **special} for n, name in enumerate(SPECIAL)}


def _pieces() -> bytes:
    """A SentencePiece model as llm-jp's are."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=450, model_type="unigram",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=list(SPECIAL[2:]), hard_vocab_limit=False, minloglevel=2,
        required_chars="".join(map(chr, range(33, 127))),
    )  # fmt: skip
    return model.getvalue()


FAST: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": lambda: _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    # Merges where it likes: "\n\n" across the border of a prompt and its answer.
    "merging": lambda: _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "prefix space": lambda: _bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    # As llm-jp's own tokenizer.json puts its prefix, and as Llama's newer ones do.
    "caret": lambda: _unigram(
        normalizers.Sequence(
            [normalizers.Replace(tokenizers.Regex(r"(?<!\n)^"), "▁"), normalizers.Replace(" ", "▁")]
        ),
        None,
    ),
    "metaspace": lambda: _unigram(
        normalizers.Sequence([]), pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
}
KINDS = (*FAST, "pieces", "llm-jp v4")


@functools.cache
def _content(kind: str) -> bytes:
    return FAST[kind]().to_str().encode() if kind in FAST else _pieces()


def write_source(folder: Path, kind: str, **settings: Any) -> Path:
    """What a base model's folder holds of its tokenizer."""
    if kind == "llm-jp v4":
        return MODEL.parent
    folder.mkdir(parents=True)
    name = "tokenizer.json" if kind in FAST else "tokenizer.model"
    (folder / name).write_bytes(_content(kind))
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer",
              **settings}  # fmt: skip
    if kind not in FAST:  # its <unk> is the first piece
        config["added_tokens_decoder"] = added_tokens(1)
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    return folder


def prepare(folder: Path, kind: str, name: str) -> Path:
    """The folder that training uses, with a template of a name."""
    if name == "llmjp-instruct":
        source = write_source(folder / "source", kind)
        template.prepare(source, name, folder / "chat", "sft.yaml: template")
    else:
        source = write_source(folder / "source", kind, chat_template=TEMPLATES[name])
        template.prepare(source, "model", folder / "chat", "sft.yaml: template")
    return folder / "chat"
