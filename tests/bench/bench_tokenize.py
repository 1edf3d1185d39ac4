"""How fast text becomes tokens: `python tests/bench/bench_tokenize.py MODEL TEXT.jsonl ...`.

Compares tanren's shards with the design of Megatron-LM's tools/preprocess_data.py (a pool that
tokenizes line by line, and one parent that writes), in one run on the same text. Each file is
repeated to about --megabytes. Prints a table, and JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import orjson
import sentencepiece

from tanren.data import tokenize
from tanren.data.shards import Settings

_pieces: sentencepiece.SentencePieceProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, tokenize.cores()])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for text in asked.texts:
            corpus = Path(folder) / f"{text.stem}.jsonl"
            once = text.read_bytes()
            with corpus.open("wb") as file:
                for _ in range(max(1, asked.megabytes * 10**6 // len(once))):
                    file.write(once)
            calls = {}
            for workers in asked.workers:
                calls[f"library alone, {workers} processes"] = partial(
                    _library, asked.model, corpus, workers
                )
                calls[f"tanren, {workers} workers"] = partial(_ours, asked.model, corpus, workers)
            most = max(asked.workers)
            calls[f"pool and one writer, {most} workers"] = partial(
                _pool, asked.model, corpus, most
            )
            for name, call in calls.items():
                results = [call() for _ in range(asked.repeats)]
                tokens, seconds = min(results, key=lambda result: result[1])
                rows.append({
                    "text": text.stem, "who": name, "tokens": tokens, "seconds": round(seconds, 2),
                    "tokens_per_second": round(tokens / seconds),
                })  # fmt: skip
                print(f"| {text.stem} | {name} | {tokens / seconds / 1e6:.2f} M |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"largest process: {peak:.0f} MiB")
    if asked.json:
        asked.json.write_text(json.dumps({"rows": rows, "peak_mib": round(peak)}, indent=2))


def _library(model: Path, corpus: Path, processes: int) -> tuple[int, float]:
    """What the tokenizer alone can do here: texts in memory, ids thrown away, nothing shared."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        size = corpus.stat().st_size // processes
        parts = [(model, corpus, number * size, size) for number in range(processes)]
        results = pool.starmap(_library_part, parts, chunksize=1)
    return sum(tokens for tokens, _ in results), max(seconds for _, seconds in results)


def _library_part(model: Path, corpus: Path, first: int, size: int) -> tuple[int, float]:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    with corpus.open("rb") as file:
        file.seek(first)
        file.readline()
        texts = [orjson.loads(line)["text"] for line in file.read(size).splitlines()[:-1]]
    began, tokens = time.monotonic(), 0
    for number in range(0, len(texts), 1000):
        batch = pieces.encode(texts[number : number + 1000], num_threads=1, return_type="numpy")
        tokens += sum(map(len, batch))
    return tokens, time.monotonic() - began


def _ours(model: Path, corpus: Path, workers: int) -> tuple[int, float]:
    prefix = corpus.with_name("ours") / "t"
    began = time.monotonic()
    made = tokenize.by_hand(
        str(corpus), model, prefix, Settings(append_eod=True), text_key="text", workers=workers,
        watch=lambda _: None,
    )  # fmt: skip
    seconds = time.monotonic() - began
    shutil.rmtree(prefix.parent)
    return made.tokens, seconds


def _pool(model: Path, corpus: Path, workers: int) -> tuple[int, float]:
    # Here, so that the workers of both, which import this file, start equally fast.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    began, tokens = time.monotonic(), 0
    prefix = corpus.with_name("theirs")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(196608))
    with corpus.open() as file, multiprocessing.Pool(workers, _begin, (model,)) as pool:
        for ids in pool.imap(_encode, file, 32):
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    return tokens, time.monotonic() - began


def _begin(model: Path) -> None:
    global _pieces
    _pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))


def _encode(line: str) -> list[int]:
    ids: list[int] = _pieces.encode(json.loads(line)["text"])
    ids.append(_pieces.eos_id())
    return ids


if __name__ == "__main__":
    sys.exit(main())
