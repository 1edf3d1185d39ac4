"""The head's two backward products in FP8. GPU runs in FP8 alone import this file.

The logits, and so the losses, stay in bf16: rounded to FP8 they would shift the loss. Their
gradient is bounded before it is made, since a probability is at most 1. So it needs no scaling by
what was seen: it is written in E5M2 by the pass that makes it, in the two orders that Hopper's
products read. Weight and hidden states are E4M3 with one scale each, as in the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformer_engine_torch as tex
from transformer_engine.pytorch.cpp_extensions import general_gemm
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

from tanren.engine import head, head_kernels

# The largest number of E4M3; a bound of E5M2's that is a power of two, so that scaling is exact.
E4M3_LARGEST, E5M2_BOUND = 448.0, 2.0**15


def _room(matrix: torch.Tensor) -> torch.Tensor:
    """Memory for a matrix in E4M3, transposed."""
    return torch.empty(
        matrix.size(1), matrix.size(0), dtype=torch.float8_e4m3fn, device=matrix.device
    )


def _by_columns(matrix: torch.Tensor, room: torch.Tensor) -> Float8TensorStorage:
    """A matrix [rows, columns] in E4M3, transposed alone, which is all that its product reads."""
    largest = torch.linalg.vector_norm(matrix, torch.inf).float().clamp_min(1e-30)
    head_kernels.to_fp8_transposed(matrix, E4M3_LARGEST / largest, room)
    return Float8TensorStorage(
        data=None,
        fp8_scale_inv=(largest / E4M3_LARGEST).view(1),
        fp8_dtype=tex.DType.kFloat8E4M3,
        data_transpose=room.view(torch.uint8),
    )


class Weight:
    """The head's weight, cast once a step."""

    def __init__(self) -> None:
        self._room: torch.Tensor | None = None
        self._cast: Float8TensorStorage | None = None

    def cast(self, weight: torch.Tensor, *, changed: bool) -> Float8TensorStorage:
        """In FP8; cast again where it changed since the last call."""
        if self._room is None:
            self._room = _room(weight)
        if changed or self._cast is None:
            self._cast = _by_columns(weight, self._room)
        return self._cast


@dataclass(frozen=True)
class Gradients(head.Gradients):
    """Gradients whose products are of FP8; the number of tokens must be a multiple of 16."""

    weight: Float8TensorStorage

    def add(
        self, part: slice, hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor,
        labels: torch.Tensor, mine: head.Vocabulary, softmax: head.Softmax,
        d_softmax: torch.Tensor,
    ) -> None:  # fmt: skip
        """See head.Gradients."""
        d_label = self.loss_weights[part]
        # What |d_softmax p - d_label| cannot be over.
        bound = (d_softmax.abs() + d_label.abs()).amax().clamp_min(1e-30)
        by_token = torch.empty(logits.shape, dtype=torch.float8_e5m2, device=logits.device)
        by_column = by_token.new_empty(logits.size(1), logits.size(0))
        head_kernels.to_fp8_gradient(
            logits, labels, mine.first, mine.real, softmax.highest, softmax.log_sum, d_softmax,
            d_label, E5M2_BOUND / bound, by_token, by_column,
        )  # fmt: skip
        gradient = Float8TensorStorage(
            data=by_token.view(torch.uint8),
            fp8_scale_inv=(bound / E5M2_BOUND).view(1),
            fp8_dtype=tex.DType.kFloat8E5M2,
            data_transpose=by_column.view(torch.uint8),
        )
        if self.d_hidden is not None:
            general_gemm(
                self.weight, gradient, layout="NN", grad=True, use_split_accumulator=True,
                out=self.d_hidden[part], out_dtype=self.d_hidden.dtype,
            )  # fmt: skip
        if self.d_weight is not None:
            general_gemm(
                _by_columns(hidden[part], _room(hidden[part])), gradient, layout="NT", grad=True,
                use_split_accumulator=True, accumulate=True,
                out=self.d_weight, out_dtype=self.d_weight.dtype,
            )  # fmt: skip
