"""The head: from hidden states to the cross-entropy, and the z-loss, of each token.

With 196,608 pieces the logits of 8,192 tokens are 3 GiB, and all that is done to them beside the
matrix products waits for memory. So they are read once for their softmax, and once more when they
are overwritten with their gradient: by Triton on a GPU, by torch on a CPU. (In FP8 runs on Hopper
it is written beside them: head_fp8.py.)

Where it is known beforehand what each token's loss counts in the sum that is differentiated, the
gradients are made together with the losses, some tokens at a time, and the logits of all of them
never exist (`losses_by_chunks`). Otherwise, as for preference pairs, they are kept for the backward
pass (`losses_of_logits`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from tanren.engine.main_grad import add_product, already_in_main_grad

# total += leftᵀ right.
Add = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
# Tokens whose logits exist at a time.
CHUNK = 4096
# False keeps the logits of all tokens wherever gradients are wanted.
GRADIENTS_BY_CHUNKS = True
# Products of FP8 take tokens by multiples of this; and Triton compiles a kernel anew where what it
# is given does not begin at one.
MULTIPLE = 16


@dataclass(frozen=True)
class Vocabulary:
    """The columns of a rank's logits: its part of the padded vocabulary, over `group`.

    Padding takes no part in the softmax: its rows are untrained, and Hugging Face, for the same
    weights, does not count them.

    `first` is this rank's first column in the whole, `real` how many of its columns are real.
    """

    first: int
    real: int
    group: dist.ProcessGroup

    @staticmethod
    def of(size: int, width: int, group: dist.ProcessGroup) -> Vocabulary:
        """A rank's part, `width` columns with padding, of a vocabulary of `size` pieces."""
        first = group.rank() * width
        return Vocabulary(first, min(max(size - first, 0), width), group)


def softmax_parts(logits: torch.Tensor, labels: torch.Tensor, mine: Vocabulary) -> torch.Tensor:
    """What a softmax needs of this rank's logits.

    Args:
        logits: [tokens, columns].
        labels: [tokens], over the whole vocabulary.
    Returns:
        [3, tokens] in fp32: the highest logit; the label's (both -inf where this rank has none);
        the sum of the exponentials of what the logits are above the highest one.
    """
    if logits.is_cuda:
        from tanren.engine import head_kernels

        return head_kernels.softmax_parts(logits, labels, mine.first, mine.real)
    found = torch.full((3, logits.size(0)), -torch.inf)
    if not mine.real:
        found[2] = 0.0
        return found
    real = logits[:, : mine.real].float()
    column = labels - mine.first
    here = (column >= 0) & (column < mine.real)
    wanted = real.gather(1, column.where(here, 0)[:, None])[:, 0]
    found[0], found[1] = real.amax(1), wanted.where(here, -torch.inf)
    found[2] = (real - found[0, :, None]).exp_().sum(1)
    return found


def to_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mine: Vocabulary,
    highest: torch.Tensor,
    log_sum: torch.Tensor,
    d_softmax: torch.Tensor,
    d_label: torch.Tensor,
) -> None:
    """Overwrite this rank's logits with `d_softmax` p - `d_label` [it is the label's].

    p = exp(logit - highest - log_sum) is the probability; at padding the gradient is 0.

    Args:
        logits: [tokens, columns].
        labels: [tokens]; the rest as well, in fp32.
    """
    if logits.is_cuda:
        from tanren.engine import head_kernels

        head_kernels.to_gradient(
            logits, labels, mine.first, mine.real, highest, log_sum, d_softmax, d_label
        )
        return
    real = logits[:, : mine.real].float()
    column = labels - mine.first
    here = (column >= 0) & (column < mine.real)
    gradient = (real - highest[:, None] - log_sum[:, None]).exp_().mul_(d_softmax[:, None])
    if mine.real:
        gradient.scatter_add_(1, column.where(here, 0)[:, None], -(d_label * here)[:, None])
    logits.zero_()[:, : mine.real] = gradient.to(logits.dtype)


@dataclass(frozen=True)
class Softmax:
    """Of each token over the whole vocabulary, [tokens] in fp32 and alike on every rank of it.

    log Z (Z is the softmax's denominator) in two terms, so that nothing is lost where logits are
    large: the highest logit, and the logarithm of Z's share above it.
    """

    highest: torch.Tensor
    log_sum: torch.Tensor
    cross_entropy: torch.Tensor

    @property
    def log_z(self) -> torch.Tensor:
        return self.highest + self.log_sum

    def losses(self, z_loss: float) -> torch.Tensor:
        """[1, tokens], the cross-entropy; or with the z-loss [2, tokens]."""
        kinds = [self.cross_entropy]
        if z_loss:
            kinds.append(z_loss * self.log_z.square())
        return torch.stack(kinds)

    def d_softmax(self, d_losses: torch.Tensor, z_loss: float) -> torch.Tensor:
        """What a probability is weighed with: each logit moves both losses by its own.

        Args:
            d_losses: the gradient of what `losses` gave.
        """
        if not z_loss:
            return d_losses[0].contiguous()
        return d_losses[0] + 2 * z_loss * d_losses[1] * self.log_z


def _softmax(logits: torch.Tensor, labels: torch.Tensor, mine: Vocabulary) -> Softmax:
    highest, wanted, total = parts = softmax_parts(logits, labels, mine)
    if mine.group.size() > 1:
        own = highest.clone()
        dist.all_reduce(parts[:2], dist.ReduceOp.MAX, mine.group)
        total.mul_((own - highest).exp_())
        dist.all_reduce(total, group=mine.group)
    log_sum = total.log()
    return Softmax(highest, log_sum, log_sum - (wanted - highest))


class _Losses(torch.autograd.Function):
    """Keeps the logits alone, and turns them into their gradient in place."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, mine: Vocabulary, z_loss: float
    ) -> torch.Tensor:
        """Logits [tokens, columns], labels [tokens]; losses [kinds, tokens]."""
        found = _softmax(logits, labels, mine)
        ctx.save_for_backward(logits, labels)
        ctx.mine, ctx.z_loss, ctx.found = mine, z_loss, found
        return found.losses(z_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, labels = ctx.saved_tensors
        found, gradient = ctx.found, logits.detach()
        d_softmax = found.d_softmax(d_losses, ctx.z_loss)
        d_label = d_losses[0].contiguous()
        to_gradient(gradient, labels, ctx.mine, found.highest, found.log_sum, d_softmax, d_label)
        return gradient, None, None, None


def losses_of_logits(
    logits: torch.Tensor, labels: torch.Tensor, mine: Vocabulary, z_loss: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of each token over the real vocabulary, in nats, and its z-loss.

    The backward pass overwrites the logits with their gradient: there is no second copy.

    Args:
        logits: [tokens, columns], this rank's.
        labels: [tokens], over the whole vocabulary.
        z_loss: what log²Z of each token is weighed with; 0 leaves it out.
    Returns:
        [kinds, tokens] in fp32, the same on every rank of the group; kinds is 1, or 2 with z-loss.
    """
    losses: torch.Tensor = _Losses.apply(  # type: ignore[no-untyped-call]
        logits, labels, mine, z_loss
    )
    return losses


class _LossesByChunks(torch.autograd.Function):
    """Gradients in the forward pass, so that nothing but d_hidden is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        mine: Vocabulary,
        z_loss: float,
        chunk: int,
        loss_weights: torch.Tensor,
        fp8: Any | None,
        add: Add,
    ) -> torch.Tensor:
        """See `losses_by_chunks`."""
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            # Without megatron-core's gradient buffers, autograd takes it like any other.
            d_weight = getattr(weight, "main_grad", None)
            ctx.in_main_grad = d_weight is not None
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight
        if fp8 is None:
            gradients = Gradients(loss_weights, d_hidden, d_weight, add)
        else:
            from tanren.engine import head_fp8

            gradients = head_fp8.Gradients(loss_weights, d_hidden, d_weight, add, fp8)
        found = _by_chunks(hidden, weight, labels, mine, z_loss, chunk, gradients)
        ctx.weight, ctx.d_hidden, ctx.d_weight = weight, d_hidden, d_weight
        ctx.save_for_backward(loss_weights)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (loss_weights,) = ctx.saved_tensors
        # On the GPU, without waiting for it.
        torch._assert_async(
            (d_losses == loss_weights).all(),
            "what is differentiated is not the sum of losses and weights that the head was given",
        )
        d_weight = ctx.d_weight
        if d_weight is not None and ctx.in_main_grad:
            d_weight = already_in_main_grad(ctx.weight)
        return ctx.d_hidden, d_weight, None, None, None, None, None, None, None


@dataclass(frozen=True)
class Gradients:
    """Where gradients go: d_hidden is overwritten, d_weight added to by `add_to_weight`; None where
    it is frozen.
    """

    loss_weights: torch.Tensor
    d_hidden: torch.Tensor | None
    d_weight: torch.Tensor | None
    add_to_weight: Add

    def add(
        self, part: slice, hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor,
        labels: torch.Tensor, mine: Vocabulary, softmax: Softmax, d_softmax: torch.Tensor,
    ) -> None:  # fmt: skip
        """Those of some tokens, whose logits may be overwritten.

        Args:
            part: which tokens they are.
            hidden: [all tokens, hidden].
            logits: [tokens, columns]; labels, softmax and d_softmax of the same tokens.
        """
        d_label = self.loss_weights[part]
        to_gradient(logits, labels, mine, softmax.highest, softmax.log_sum, d_softmax, d_label)
        if self.d_hidden is not None:
            torch.mm(logits, weight, out=self.d_hidden[part])
        if self.d_weight is not None:
            self.add_to_weight(self.d_weight, logits, hidden[part])


def _by_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    mine: Vocabulary,
    z_loss: float,
    chunk: int,
    gradients: Gradients | None,
) -> torch.Tensor:
    """Losses [kinds, tokens]; with `gradients` those of their weighted sum."""
    tokens, found = hidden.size(0), []
    # Parts of one size: a small one at the end would read the weight, and its gradient, for little.
    size = -(-tokens // max(-(-tokens // chunk), 1))
    multiple = min(MULTIPLE, chunk)
    size = -(-size // multiple) * multiple
    buffer = torch.empty(size, weight.size(0), dtype=hidden.dtype, device=hidden.device)
    for first in range(0, tokens, size):
        part = slice(first, min(first + size, tokens))
        logits = torch.mm(hidden[part], weight.t(), out=buffer[: part.stop - first])
        softmax = _softmax(logits, labels[part], mine)
        found.append(softmax.losses(z_loss))
        if gradients is None:
            continue
        d_softmax = softmax.d_softmax(gradients.loss_weights[part].expand(2, -1), z_loss)
        gradients.add(part, hidden, weight, logits, labels[part], mine, softmax, d_softmax)
    return torch.cat(found, 1)


def losses_by_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    mine: Vocabulary,
    z_loss: float = 0.0,
    *,
    loss_weights: torch.Tensor | None,
    chunk: int,
    fp8: Any | None = None,
    add: Add = add_product,
) -> torch.Tensor:
    """Cross-entropy of each token over the real vocabulary, in nats, and its z-loss.

    With gradients they are made here, those of the losses' sum weighed with `loss_weights`, and the
    weight's joins its main_grad at once. So that sum, times 1, is all that may be differentiated;
    the backward pass checks it, and on a GPU ends the process where it is not so.

    Args:
        hidden: [tokens, hidden], the same on every rank of the group. Its gradient is this rank's
            part, still to be summed over them.
        weight: [columns, hidden], this rank's; frozen where it takes no gradient.
        labels: [tokens], over the whole vocabulary.
        z_loss: what log²Z of each token is weighed with; 0 leaves it out.
        loss_weights: [tokens] in fp32; None where nothing is differentiated.
        chunk: tokens whose logits exist at a time.
        fp8: the weight as head_fp8.Weight casts it, where gradients are products of FP8.
        add: what adds a product in bf16 to the weight's gradient, see `main_grad.add_product`.
    Returns:
        [kinds, tokens] in fp32, the same on every rank of the group; kinds is 1, or 2 with z-loss.
    """
    if not torch.is_grad_enabled():
        return _by_chunks(hidden, weight, labels, mine, z_loss, chunk, None)
    assert loss_weights is not None and loss_weights.dtype == torch.float32
    tokens = hidden.size(0)
    more = -tokens % MULTIPLE if fp8 is not None else 0
    if more:
        hidden = F.pad(hidden, (0, 0, 0, more))
        labels, loss_weights = F.pad(labels, (0, more)), F.pad(loss_weights, (0, more))
    losses: torch.Tensor = _LossesByChunks.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, mine, z_loss, chunk, loss_weights, fp8, add
    )
    return losses[:, :tokens] if more else losses
