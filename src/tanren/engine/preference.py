"""Losses of preference pairs: DPO, IPO, RPO and SimPO, summed over pairs, with what to report.

A micro batch holds answers in pairs: the chosen one at even places, the rejected one after it.
Log-probabilities are sums over an answer's tokens, its end token included, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import logsigmoid

from tanren.config.training import Preference

# What a report holds, in its order; each is a sum over pairs.
REPORT = (
    "loss",  # the preference loss, without the SFT term
    "pairs",
    "margin",  # chosen less rejected reward
    "accuracy",  # 1 where the chosen reward is the higher one, 1/2 where both are equal
    "chosen_reward",  # beta times the log-ratio to the reference: the reward that DPO implies
    "rejected_reward",
    "chosen_log_prob",  # of the whole answer, whatever the loss averages
    "rejected_log_prob",
    "kl",  # mean log-ratio of the two whole answers
    "sft_loss",  # cross-entropy of a chosen token, without its weight
    "loss_at_zero",  # the preference loss of a policy that is its reference
)


def answer_log_probs(
    losses: torch.Tensor, weights: torch.Tensor, examples: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the log-probabilities of each answer's tokens.

    In fp64: an answer of 4,096 tokens is some thousands of nats, and what counts is a difference of
    four such sums.

    Args:
        losses: [positions], cross-entropy in nats.
        weights: [positions], 1 where a token belongs to the answer, 0 elsewhere.
        examples: [positions], the number of the example, below `count` also where the weight is 0.
        count: examples in the micro batch.
    Returns:
        log-probabilities and lengths in tokens, both [count] in fp64; 0 for an example without
        tokens.
    """
    weights = weights.double()
    empty = torch.zeros(count, dtype=torch.float64, device=losses.device)
    sums = empty.index_add(0, examples, -losses.double() * weights)
    return sums, empty.index_add(0, examples, weights)


def preference_loss(
    settings: Preference,
    log_probs: torch.Tensor,
    lengths: torch.Tensor,
    reference: torch.Tensor | None,
    rewards: torch.Tensor,
    present: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum the losses of the pairs that are there.

    The KL estimate is the mean log-ratio to the reference of the two whole answers, in nats. They
    are the data's answers and not drawn from the policy, so that it says how far the policy has
    moved on them and in which direction: below 0 they have become less likely than they were
    (likelihood displacement: Razin et al. 2024, arXiv 2410.08847).

    An answer that is as good as the other to the policy, as all are where training begins from the
    reference, counts half in the accuracy, so that the curve begins at chance and not at 0.

    Args:
        log_probs: [2 x pairs], of the policy.
        lengths: [2 x pairs], tokens of the answers.
        reference: [2 x pairs], log-probabilities of the reference, constants; None for simpo.
        rewards: [2 x pairs], what the data says that an answer is worth; only rpo looks at it.
        present: [pairs], 0 where a pair only fills up the micro batch; nothing of it counts.
    Returns:
        the sum over pairs (to differentiate, the SFT term included), the number of pairs (int), and
        [len(REPORT)], the sums to report; all but the number in fp32.
    """
    there = present.bool()
    policy = _pairs(log_probs, there)
    tokens = _pairs(lengths, there).clamp(min=1)
    sft = -policy[0] / tokens[0]
    moved = torch.zeros_like(policy)
    if settings.loss == "simpo":
        ratios = policy / tokens
    else:
        assert reference is not None, f"{settings.loss} compares with a reference"
        moved = ratios = policy - _pairs(reference, there)
        if settings.average_log_probs:
            ratios = ratios / tokens
    losses = _losses(settings, ratios[0] - ratios[1], _truth(settings, rewards, there))
    total = (losses + settings.sft_weight * sft) * there

    with torch.no_grad():
        implied = settings.beta * ratios
        margin = implied[0] - implied[1]
        start = loss_at_zero(settings, rewards, present)
        report = torch.stack([
            losses, torch.ones_like(losses), margin, (margin.sign() + 1) / 2, *implied, *policy,
            moved.mean(0), sft, torch.zeros_like(losses) if start is None else start,
        ])  # fmt: skip
    return total.sum().float(), there.sum().int(), (report * there).sum(1).float()


def loss_at_zero(
    settings: Preference, rewards: torch.Tensor, present: torch.Tensor
) -> torch.Tensor | None:
    """The preference loss of each pair when the policy is the reference; None for simpo.

    Where training begins: ln 2 for dpo with any label smoothing, 1 / (4 beta²) for ipo; rpo's
    depends on the rewards. A first step that is off has another reference than it began from, or
    computes its log-probabilities otherwise.

    Args:
        rewards: [2 x pairs], as `preference_loss` takes them.
        present: [pairs], likewise.
    Returns:
        [pairs] in fp64, 0 where a pair only fills up the micro batch.
    """
    if settings.loss == "simpo":
        return None
    there = present.bool()
    truth = _truth(settings, rewards, there)
    return _losses(settings, torch.zeros_like(truth), truth) * there


def means(settings: Preference, totals: Sequence[float]) -> dict[str, float]:
    """Means over pairs of reports that were added up over micro batches and ranks.

    Without `loss_at_zero`, which matters once. simpo has no reference: its means are without `kl`.
    """
    sums = dict(zip(REPORT, totals, strict=True))
    pairs, _ = sums.pop("pairs"), sums.pop("loss_at_zero")
    if settings.loss == "simpo":
        del sums["kl"]
    return {name: value / pairs for name, value in sums.items()}


def _pairs(values: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """[2 x pairs] as [2, pairs] in fp64; 0, and no gradient, where there is no pair."""
    return values.double().view(-1, 2).T.where(there, 0.0)


def _truth(settings: Preference, rewards: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """How much better the data says the chosen answers are: [pairs], scaled."""
    chosen, rejected = _pairs(rewards, there)
    return settings.reward_scale * (chosen - rejected)


def _losses(settings: Preference, margin: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The loss of each pair, from the difference of its log-ratios (simpo: mean log-probs)."""
    scaled = settings.beta * margin
    if settings.loss == "dpo":
        # Rafailov et al. 2023, equation 7; smoothed: Mitchell 2023, "A note on DPO with noisy
        # preferences".
        return _smoothed(scaled, settings.label_smoothing)
    if settings.loss == "simpo":
        # Meng et al. 2024, equation 6.
        return _smoothed(scaled - settings.gamma, settings.label_smoothing)
    if settings.loss == "ipo":
        # Azar et al. 2023, equation 17.
        return (margin - 1 / (2 * settings.beta)).square()
    # Nemotron-4 340B (2024); Sun et al. 2025 (arXiv 2502.00203).
    if settings.loss == "rpo_sq":
        return (scaled - truth).square()
    if settings.loss == "rpo_bwd_kl":
        return _bernoulli_kl(truth, scaled)
    assert settings.loss == "rpo_fwd_kl", settings.loss
    return _bernoulli_kl(scaled, truth)


def _smoothed(scaled: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Cross-entropy of the preference when a share of the labels is taken to be the wrong way."""
    right, wrong = logsigmoid(scaled), logsigmoid(-scaled)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def _bernoulli_kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL divergence of Bernoulli(sigmoid(first)) from Bernoulli(sigmoid(second))."""
    yes = first.sigmoid() * (logsigmoid(first) - logsigmoid(second))
    no = (-first).sigmoid() * (logsigmoid(-first) - logsigmoid(-second))
    return yes + no
