"""How fast a rank's share of a checkpoint goes to host memory, and from there to the disk.

`python -m tests.bench.bench_checkpoint FOLDER GIB`, on a GPU or without one: tensors as the
precision-aware optimizer keeps them, of so many GiB, copied while matrices are multiplied; what was
written is compared with what they were. 17 GiB are a rank's share of 8.59 B parameters over four.
"""

from __future__ import annotations

import io
import pickle
import shutil
import sys
import time
import zlib
from contextlib import closing
from pathlib import Path

import torch

from tanren.engine.boxes import Chunk, join
from tanren.engine.staging import Staging
from tanren.engine.writer import Item, Memory, Process, Record, Write, Written

# Elements of a tensor: 32 Mi, of 8 bytes together.
NUMEL = 1 << 25


def tensors(count: int, device: str) -> list[dict[str, torch.Tensor]]:
    def bits() -> torch.Tensor:
        return torch.randint(-(2**14), 2**14, (NUMEL,), dtype=torch.int16, device=device)

    return [
        {"weight": bits().view(torch.bfloat16), "param": bits(),
         "exp_avg": bits().view(torch.bfloat16), "exp_avg_sq": bits().view(torch.bfloat16)}
        for _ in range(count)
    ]  # fmt: skip


def layout(
    made: list[dict[str, torch.Tensor]],
) -> tuple[list[Item], list[tuple[torch.Tensor, int]]]:
    items, placed = [], []
    for number, kinds in enumerate(made):
        places = {kind: (4 * number + i) * 2 * NUMEL for i, kind in enumerate(kinds)}
        placed += [(tensor, places[kind]) for kind, tensor in kinds.items()]
        for kind in kinds:
            chunk = Chunk(f"{kind}.{number}", (NUMEL,), (0,), (NUMEL,), 0)
            written = torch.bfloat16 if kind == "weight" else torch.float32
            rest = places["param"] if kind == "param" else None
            place = places["weight" if kind == "param" else kind]
            items.append(Item(chunk, torch.bfloat16, written, place, rest))
    return items, placed


def check(folder: Path, records: list[Record], made: list[dict[str, torch.Tensor]]) -> None:
    for record in records:
        kind, number = record.key.split(".")
        kinds = {name: tensor.cpu() for name, tensor in made[int(number)].items()}
        wanted = join(kinds["weight"], kinds["param"]) if kind == "param" else kinds[kind]
        with (folder / record.file).open("rb") as stream:
            stream.seek(record.offset)
            read = torch.load(io.BytesIO(stream.read(record.length)))
        short = torch.int32 if read.dtype == torch.float32 else torch.int16
        assert torch.equal(read.view(short), wanted.to(read.dtype).view(short)), record.key


def main(folder: Path, gib: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = tensors(max(int(gib * 2**30 / (8 * NUMEL)), 1), device)
    items, placed = layout(made)
    size = len(made) * 8 * NUMEL
    process = Process()
    staging = Staging(process.memory)
    # Closed first, also after an error: the writer ends with it.
    with closing(process.connection) as here:
        began = time.perf_counter()
        staging.allocate(size)
        here.send(Memory(size, tuple(items)))
        staging.lock()
        print(f"{size / 2**30:.1f} GiB locked in {time.perf_counter() - began:.2f} s")
        matrix = torch.randn(4096 if device == "cuda" else 64, 4096, device=device).bfloat16()
        for number in range(2):
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            staging.copy(placed)
            blocked = time.perf_counter() - began
            for _ in range(200 if device == "cuda" else 0):
                matrix @ matrix
            staging.finish()
            copied = time.perf_counter() - began
            partial = folder / f"bench-{number}"
            began = time.perf_counter()
            here.send(Write(partial, 0, {}, {}))
            answer = here.recv()
            assert isinstance(answer, Written), answer
            seconds = time.perf_counter() - began
            records: list[Record] = pickle.loads(zlib.decompress(answer.records))
            length = sum(record.length for record in records) / 2**30
            print(
                f"begun in {blocked:.3f} s, copied in {copied:.3f} s "
                f"({size / 2**30 / copied:.1f} GiB/s); {length:.1f} GiB written in {seconds:.2f} s "
                f"({length / seconds:.2f} GiB/s)"
            )
        check(partial, records, made)
        for number in range(2):
            shutil.rmtree(folder / f"bench-{number}")
        here.send(None)
    staging.close()
    print("what was written is what they were")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
