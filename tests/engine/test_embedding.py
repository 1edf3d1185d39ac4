"""The gradient of an embedding joins main_grad row by row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tanren.engine import embedding
from tanren.engine.embedding import _Lookup, rows_of

PIECES, HIDDEN = 23, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_join_what_is_there_and_pieces_may_come_often(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight: Any = torch.nn.Parameter(torch.randn(PIECES, HIDDEN).to(dtype))
    weight.main_grad = torch.randn(PIECES, HIDDEN)
    before = weight.main_grad.clone()
    expected = before.double()
    for width in (5, 300):  # two micro batches; in the second, pieces come a dozen times
        tokens = torch.randint(PIECES - 3, (2, width))
        upstream = torch.randn(2, width, HIDDEN).to(dtype)
        found: Any = _Lookup.apply(weight, tokens)
        assert torch.equal(found, F.embedding(tokens, weight))
        found.backward(upstream)
        assert weight.grad_added_to_main_grad
        weight.grad = None
        exact = weight.detach().double().requires_grad_()
        F.embedding(tokens, exact).backward(upstream.double())
        assert exact.grad is not None
        expected = expected + exact.grad
    torch.testing.assert_close(weight.main_grad.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(weight.main_grad[-3:], before[-3:])


def test_a_rank_takes_its_own_rows_and_spreads_the_others_tokens() -> None:
    """Of ranks with six rows each."""
    tokens = torch.tensor([[0, 5, 6, 11], [12, 6, 17, 7]])
    for rank in range(3):
        rows, elsewhere = rows_of(tokens, 6 * rank, 6)
        mine = tokens // 6 == rank
        assert torch.equal(elsewhere, ~mine)
        assert torch.equal(rows[mine], tokens[mine] % 6)
        assert rows.min() >= 0 and rows.max() < 6
        assert len(rows[elsewhere].unique()) >= 3


def test_ranks_that_share_the_vocabulary_give_what_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on GPUs: of a sum over the ranks each adds the rows that it has, and nothing else."""
    monkeypatch.setattr(embedding, "_joins", lambda _: True)
    monkeypatch.setattr(
        embedding, "reduce_from_tensor_model_parallel_region", lambda found, group: found
    )
    torch.manual_seed(2)
    whole = torch.randn(12, HIDDEN, requires_grad=True)
    tokens, upstream = torch.randint(12, (2, 30)), torch.randn(2, 30, HIDDEN)
    parts, results = [], []
    for rank in range(2):
        weight: Any = torch.nn.Parameter(whole.detach()[6 * rank :][:6].clone())
        weight.main_grad = torch.zeros(6, HIDDEN)
        layer: Any = SimpleNamespace(
            weight=weight, tp_group=SimpleNamespace(size=lambda: 2), vocab_start_index=6 * rank,
            num_embeddings_per_partition=6, reduce_scatter_embeddings=False,
        )  # fmt: skip
        results.append(embedding.Embedding.forward(layer, tokens))
        results[-1].backward(upstream)
        parts.append(weight.main_grad)
    expected = F.embedding(tokens, whole)
    expected.backward(upstream)
    assert torch.equal(results[0] + results[1], expected)
    torch.testing.assert_close(torch.cat(parts), whole.grad)
