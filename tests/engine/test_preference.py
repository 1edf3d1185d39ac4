"""The losses of pairs are those of the papers and of TRL; only pairs that are there count."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tanren.config.training import Preference
from tanren.engine.preference import (
    REPORT,
    answer_log_probs,
    loss_at_zero,
    means,
    preference_loss,
)

LOSSES = ("dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl", "simpo")
CASES = [
    Preference(),
    Preference(beta=0.5, label_smoothing=0.2),
    Preference(beta=1.3, average_log_probs=True, sft_weight=0.4),
    Preference(loss="ipo", beta=0.3),
    Preference(loss="ipo", beta=0.3, average_log_probs=True),
    Preference(loss="rpo_sq", beta=0.2, reward_scale=1.7),
    Preference(loss="rpo_sq", beta=0.2, average_log_probs=True, sft_weight=0.1),
    Preference(loss="rpo_bwd_kl", beta=0.2, reward_scale=0.6),
    Preference(loss="rpo_fwd_kl", beta=0.2, reward_scale=0.6),
    Preference(loss="simpo", beta=2.0, gamma=1.4),
    Preference(loss="simpo", beta=2.0, label_smoothing=0.1, sft_weight=0.3),
]
PAIRS, LENGTH, VOCABULARY = 4, 9, 13


def named(value: object) -> str | None:
    """A test's name from what its settings state."""
    if not isinstance(value, Preference):
        return None
    stated = value.model_dump(exclude_unset=True)
    return " ".join(f"{name}={value}" for name, value in stated.items()) or "default"


def drawn(pairs: int = PAIRS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, lengths, those of the reference, and rewards, of as many pairs."""
    generator = torch.Generator().manual_seed(pairs)
    lengths = torch.randint(1, 40, (2 * pairs,), generator=generator)
    log_probs = -2.0 * torch.rand(2 * pairs, generator=generator) * lengths
    reference = log_probs + 3 * torch.randn(2 * pairs, generator=generator)
    rewards = torch.randn(2 * pairs, generator=generator)
    return log_probs, lengths, reference, rewards


def summed(settings: Preference, *values: torch.Tensor, present: torch.Tensor | None = None) -> Any:
    """`preference_loss`, every pair present unless it is said otherwise."""
    log_probs, lengths, reference, rewards = values
    if present is None:
        present = torch.ones(len(log_probs) // 2)
    base = None if settings.loss == "simpo" else reference
    return preference_loss(settings, log_probs, lengths, base, rewards, present)


def written_out(
    settings: Preference,
    logits: torch.Tensor,
    reference_logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    rewards: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The papers' formulas from whole logits in fp64, each pair by itself, summed over the pairs.

    Args:
        logits: [2 x pairs, length, vocabulary], as `reference_logits`.
        labels: [2 x pairs, length], as `mask`.
    """

    def sums(of: torch.Tensor) -> torch.Tensor:
        each = of.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        return (each * mask).sum(-1)

    def sigma(x: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + torch.exp(-x))

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))

    policy, base, tokens = sums(logits), sums(reference_logits), mask.sum(-1)
    found: dict[str, list[torch.Tensor]] = {}
    beta, epsilon = settings.beta, settings.label_smoothing
    for c in range(0, len(labels), 2):
        r = c + 1
        ratio_c, ratio_r = policy[c] - base[c], policy[r] - base[r]
        kl_estimate = (ratio_c + ratio_r) / 2
        if settings.average_log_probs:
            ratio_c, ratio_r = ratio_c / tokens[c], ratio_r / tokens[r]
        if settings.loss == "simpo":
            ratio_c, ratio_r = policy[c] / tokens[c], policy[r] / tokens[r]
            kl_estimate = 0 * kl_estimate
        h = beta * (ratio_c - ratio_r)
        g = settings.reward_scale * (rewards[c] - rewards[r]).double()
        at_zero = torch.zeros(())
        match settings.loss:
            case "dpo":
                loss = -(1 - epsilon) * torch.log(sigma(h)) - epsilon * torch.log(sigma(-h))
                at_zero = torch.tensor(math.log(2))
            case "ipo":
                loss = (ratio_c - ratio_r - 1 / (2 * beta)) ** 2
                at_zero = torch.tensor(1 / (4 * beta**2))
            case "rpo_sq":
                loss, at_zero = (h - g) ** 2, g**2
            case "rpo_bwd_kl":
                loss, at_zero = kl(sigma(g), sigma(h)), kl(sigma(g), torch.tensor(0.5))
            case "rpo_fwd_kl":
                loss, at_zero = kl(sigma(h), sigma(g)), kl(torch.tensor(0.5), sigma(g))
            case "simpo":
                h_gamma = h - settings.gamma
                loss = -(1 - epsilon) * torch.log(sigma(h_gamma))
                loss -= epsilon * torch.log(sigma(-h_gamma))
        pair = {
            "loss": loss, "pairs": torch.ones(()), "margin": h, "accuracy": (h > 0).double(),
            "chosen_reward": beta * ratio_c, "rejected_reward": beta * ratio_r,
            "chosen_log_prob": policy[c], "rejected_log_prob": policy[r], "kl": kl_estimate,
            "sft_loss": -policy[c] / tokens[c], "loss_at_zero": at_zero,
        }  # fmt: skip
        for name, value in pair.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values).sum() for name, values in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("settings", CASES, ids=named)
def test_losses_and_gradients_are_those_of_the_formulas(
    settings: Preference, dtype: torch.dtype
) -> None:
    """From logits; the positions come to ours in disorder, padding and prompts among them."""
    torch.manual_seed(0)
    shape = (2 * PAIRS, LENGTH)
    logits = 2 * torch.randn(*shape, VOCABULARY, dtype=dtype)
    reference_logits = 2 * torch.randn(*shape, VOCABULARY, dtype=dtype)
    labels = torch.randint(VOCABULARY, shape)
    first, last = torch.randint(0, 4, (2 * PAIRS, 1)), torch.randint(4, LENGTH, (2 * PAIRS, 1))
    place = torch.arange(LENGTH)
    mask = ((place >= first) & (place <= last)).to(dtype)
    rewards = torch.randn(2 * PAIRS)

    dense = logits.double().requires_grad_()
    wanted = written_out(settings, dense, reference_logits, labels, mask, rewards)
    (wanted["loss"] + settings.sft_weight * wanted["sft_loss"]).backward()
    assert tuple(wanted) == REPORT

    order = torch.randperm(2 * PAIRS * LENGTH)
    examples = torch.arange(2 * PAIRS).repeat_interleave(LENGTH)[order]

    def sums(of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses = cross_entropy(of.flatten(0, 1), labels.flatten(), reduction="none")
        return answer_log_probs(losses[order], mask.flatten()[order], examples, 2 * PAIRS)

    ours = logits.requires_grad_()
    log_probs, lengths = sums(ours)
    total, pairs, report = summed(settings, log_probs, lengths, sums(reference_logits)[0], rewards)
    total.backward()

    near = 1e-5 if dtype == torch.float32 else 1e-12
    assert (total.dtype, pairs.dtype, pairs.item()) == (torch.float32, torch.int32, PAIRS)
    expected = torch.stack([value.detach().double() for value in wanted.values()])
    assert report.shape == expected.shape
    torch.testing.assert_close(report.double(), expected, rtol=1e-5, atol=1e-6)
    assert not report.requires_grad
    trained_on = wanted["loss"] + settings.sft_weight * wanted["sft_loss"]
    torch.testing.assert_close(total.double(), trained_on, rtol=1e-5, atol=1e-6)
    assert ours.grad is not None
    assert dense.grad is not None
    assert dense.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.grad.double(), dense.grad, rtol=near, atol=near)


# Spaces between all tokens; the end token is TRL's to add, and ours.
TEXTS = [
    ("a b c", "d e", "f f g h"),
    ("k b c d e", "d e f f f", "f"),
    ("k", "d e f g g a", "f c d"),
]
WORDS = {"<pad>": 0, "<eos>": 1, "?": 2} | {chr(97 + place): 3 + place for place in range(12)}


def like_trl(policy: Any, reference: Any) -> tuple[torch.Tensor, ...]:
    """Log-probabilities and lengths of TEXTS by transformers' models, one row an answer."""

    def sums(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        losses, weights, examples = [], [], []
        answers = [(prompt, answer) for prompt, *both in TEXTS for answer in both]
        for number, (prompt, answer) in enumerate(answers):
            ids = torch.tensor([WORDS[word] for word in f"{prompt} {answer} <eos>".split()])
            logits = model(ids[None]).logits[0, :-1]
            losses.append(cross_entropy(logits, ids[1:], reduction="none"))
            weights.append(torch.arange(1, len(ids)) >= len(prompt.split()))
            examples.append(torch.full((len(ids) - 1,), number))
        return answer_log_probs(
            torch.cat(losses), torch.cat(weights), torch.cat(examples), len(answers)
        )

    with torch.no_grad():
        base, _ = sums(reference)
    return *sums(policy), base, torch.zeros(2 * len(TEXTS))


@pytest.fixture(scope="module")
def tiny_models() -> tuple[Any, Any]:
    """A policy and a reference that differ, of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(2)
    return LlamaForCausalLM(shape), LlamaForCausalLM(shape)


def by_trl(folder: Path, models: tuple[Any, Any], kind: str, **arguments: Any) -> Any:
    """TRL's trainer `kind` takes TEXTS as one batch: loss, gradients and what it would log."""
    from datasets import Dataset
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(WORDS, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="?"
    )
    rows = [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in TEXTS]
    policy, reference = copy.deepcopy(models[0]), copy.deepcopy(models[1])
    given: dict[str, Any] = {}
    if kind == "dpo":
        from trl.trainer.dpo_config import DPOConfig as Config
        from trl.trainer.dpo_trainer import DPOTrainer as Trainer

        given["ref_model"] = reference
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    settings = Config(
        output_dir=str(folder), per_device_train_batch_size=len(rows), max_length=32, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True, **arguments,
    )  # fmt: skip
    trainer = Trainer(
        model=policy,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **given,
    )
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    logged = {"loss": loss.item()}
    trainer.log(logged)
    return loss.item(), {name: p.grad for name, p in policy.named_parameters()}, logged


@pytest.mark.parametrize(
    ("ours", "kind", "theirs"),
    [
        (Preference(beta=0.3), "dpo", {"loss_type": ["sigmoid"], "beta": 0.3}),
        # TRL's ipo averages over the answer's tokens.
        (
            Preference(loss="ipo", beta=0.3, average_log_probs=True),
            "dpo",
            {"loss_type": ["ipo"], "beta": 0.3},
        ),
        (
            Preference(beta=0.3, average_log_probs=True),
            "dpo",
            {"loss_type": ["sigmoid_norm"], "beta": 0.3},
        ),
        (
            Preference(loss="simpo", beta=2.0, gamma=0.8),
            "cpo",
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.0},
        ),
        (
            Preference(loss="simpo", beta=2.0, gamma=0.8, label_smoothing=0.2),
            "cpo",
            {
                "loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.0,
                "label_smoothing": 0.2,
            },
        ),
    ],
    ids=["dpo", "ipo", "averaged dpo", "simpo", "smoothed simpo"],
)  # fmt: skip
def test_losses_and_gradients_are_trls(
    tmp_path: Path,
    tiny_models: tuple[Any, Any],
    ours: Preference,
    kind: str,
    theirs: dict[str, Any],
) -> None:
    """From text: TRL's tokens, masks, model call and loss against ours."""
    wanted, gradients, logged = by_trl(tmp_path, tiny_models, kind, **theirs)
    policy = copy.deepcopy(tiny_models[0])
    total, pairs, report = summed(ours, *like_trl(policy, tiny_models[1]))
    (total / pairs).backward()
    assert pairs.item() == len(TEXTS)
    assert total.item() / len(TEXTS) == pytest.approx(wanted, rel=1e-5)
    found = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        assert gradient.norm() > 1e-3
        assert (gradient - gradients[name]).norm() < 1e-5 * gradient.norm(), name

    mean = means(ours, report.tolist())
    same = {"rewards/chosen": "chosen_reward", "rewards/rejected": "rejected_reward",
            "rewards/margins": "margin", "rewards/accuracies": "accuracy",
            "logps/chosen": "chosen_log_prob", "logps/rejected": "rejected_log_prob"}  # fmt: skip
    if ours.average_log_probs:
        # TRL reports these of whole answers also where its loss averages.
        same = {name: same[name] for name in ("logps/chosen", "logps/rejected")}
    if kind == "cpo":
        # TRL reports simpo's averages.
        same = {name: of for name, of in same.items() if name.startswith("rewards")}
    for name, of in same.items():
        assert mean[of] == pytest.approx(logged[name], rel=1e-4), name


@pytest.mark.parametrize(
    "settings",
    [Preference(beta=0.4, label_smoothing=share) for share in (0.0, 0.1, 0.4)]
    + [Preference(loss="ipo", beta=0.4)],
    ids=named,
)
def test_each_pairs_loss_is_trls(settings: Preference) -> None:
    """TRL smooths labels in `cpo_loss`, which knows no reference: it gets the log-ratios."""
    from trl.experimental.cpo import CPOTrainer

    log_probs, _, reference, _ = drawn(6)
    itself = SimpleNamespace(
        alpha=0.0, beta=settings.beta, label_smoothing=settings.label_smoothing,
        loss_type={"dpo": "sigmoid", "ipo": "ipo"}[settings.loss],
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    ratios = (log_probs - reference).view(-1, 2)
    losses, chosen, rejected = CPOTrainer.cpo_loss(itself, ratios[:, 0], ratios[:, 1])
    assert len(losses) == 6
    for number in range(6):
        values = [value[2 * number : 2 * number + 2] for value in drawn(6)]
        total, _, report = summed(settings, *values)
        named_report = dict(zip(REPORT, report.tolist(), strict=True))
        assert total.item() == pytest.approx(losses[number].item(), rel=1e-5)
        assert named_report["chosen_reward"] == pytest.approx(chosen[number].item(), rel=1e-5)
        assert named_report["rejected_reward"] == pytest.approx(rejected[number].item(), rel=1e-5)


@pytest.mark.parametrize("settings", CASES, ids=named)
def test_swapped_answers_flip_the_margin(settings: Preference) -> None:
    values = drawn()
    swapped = [value.view(-1, 2).flip(1).flatten() for value in values]
    before, after = (
        dict(zip(REPORT, summed(settings, *each)[2].tolist(), strict=True))
        for each in (values, swapped)
    )
    assert abs(before["margin"]) > 1e-3
    assert after["margin"] == pytest.approx(-before["margin"])
    assert after["accuracy"] == PAIRS - before["accuracy"]
    assert (after["chosen_reward"], after["rejected_reward"]) == (
        before["rejected_reward"],
        before["chosen_reward"],
    )
    assert after["kl"] == pytest.approx(before["kl"])


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        (Preference(), math.log(2)),
        (Preference(beta=3.0, label_smoothing=0.3), math.log(2)),
        (Preference(average_log_probs=True, sft_weight=0.5), math.log(2)),
        (Preference(loss="ipo", beta=0.1), 25.0),
        (Preference(loss="ipo", beta=0.5), 1.0),
        (Preference(loss="rpo_sq", reward_scale=2.0), 4.0),
        # ln 2 less the entropy of a coin that falls on one side in sigmoid(1) of cases.
        (Preference(loss="rpo_bwd_kl"), 0.1109440),
        # -ln 2 less the mean of ln sigmoid(1) and ln sigmoid(-1).
        (Preference(loss="rpo_fwd_kl"), 0.1201145),
    ],
    ids=named,
)
def test_a_policy_that_is_its_reference_has_the_loss_at_zero(
    settings: Preference, loss: float
) -> None:
    """With the data's default rewards; half of the ties count as right."""
    log_probs, lengths, *_ = drawn()
    rewards = torch.tensor([1.0, 0.0]).repeat(PAIRS)
    report = summed(settings, log_probs, lengths, log_probs, rewards)[2]
    mean = means(settings, report.tolist())
    assert mean["loss"] == pytest.approx(loss, rel=1e-6)
    assert report[REPORT.index("loss_at_zero")] / PAIRS == pytest.approx(loss, rel=1e-6)
    assert (mean["accuracy"], mean["margin"], mean["kl"]) == (0.5, 0.0, 0.0)
    each = loss_at_zero(settings, rewards, torch.tensor([1, 0, 1, 1]))
    assert each is not None
    assert each.tolist() == pytest.approx([loss, 0.0, loss, loss], rel=1e-6)


def test_simpo_begins_anywhere() -> None:
    settings = Preference(loss="simpo")
    assert loss_at_zero(settings, torch.zeros(2), torch.ones(1)) is None
    mean = means(settings, summed(settings, *drawn())[2].tolist())
    assert list(mean) == [name for name in REPORT if name not in ("pairs", "kl", "loss_at_zero")]


def test_means_are_over_pairs() -> None:
    totals = [2.0 * (place + 1) for place in range(len(REPORT))]
    assert means(Preference(), totals) == {
        name: (place + 1) / 2
        for place, name in enumerate(REPORT)
        if name not in ("pairs", "loss_at_zero")
    }
    assert REPORT[1] == "pairs"


@pytest.mark.parametrize("rubbish", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("settings", CASES, ids=named)
def test_pairs_that_only_fill_up_change_nothing(settings: Preference, rubbish: float) -> None:
    values = drawn()
    wanted = [value.clone() for value in values]
    wanted[0].requires_grad_()
    total, pairs, report = summed(settings, *wanted)
    total.backward()

    present = torch.tensor([1, 0, 1, 1, 0, 1])
    there = present.repeat_interleave(2).bool()
    filled = [torch.full((12,), rubbish).masked_scatter(there, value.float()) for value in values]
    filled[1][~there] = 0
    filled[0].requires_grad_()
    found = summed(settings, *filled, present=present)
    found[0].backward()

    assert (found[0].item(), found[1].item()) == (total.item(), pairs.item())
    assert found[2].tolist() == report.tolist()
    assert filled[0].grad is not None
    assert filled[0].grad[~there].tolist() == [0.0] * 4
    assert wanted[0].grad is not None
    assert filled[0].grad[there].tolist() == wanted[0].grad.tolist()


def test_a_micro_batch_of_filling_alone_counts_nothing() -> None:
    total, pairs, report = summed(Preference(), *drawn(), present=torch.zeros(PAIRS))
    assert (total.item(), pairs.item(), report.tolist()) == (0.0, 0, [0.0] * len(REPORT))


@pytest.mark.parametrize("settings", CASES, ids=named)
def test_two_micro_batches_add_up_to_one(settings: Preference) -> None:
    whole = [value.clone() for value in drawn()]
    whole[0].requires_grad_()
    total, pairs, report = summed(settings, *whole)
    total.backward()
    parts = [value.clone() for value in drawn()]
    parts[0].requires_grad_()
    cut = 2 * (PAIRS - 1)
    first = summed(settings, *(value[:cut] for value in parts))
    second = summed(settings, *(value[cut:] for value in parts))
    (first[0] + second[0]).backward()
    assert (first[1] + second[1]).item() == pairs.item() == PAIRS
    torch.testing.assert_close(first[0] + second[0], total)
    torch.testing.assert_close(first[2] + second[2], report)
    assert whole[0].grad is not None
    assert parts[0].grad is not None
    assert parts[0].grad.tolist() == whole[0].grad.tolist()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_nothing_overflows_far_from_zero(loss: Any, margin: float) -> None:
    settings = Preference(loss=loss, beta=1.0)
    log_probs = torch.tensor([-2e4 + margin, -2e4], requires_grad=True)
    rewards = torch.tensor([1.0, 0.0])
    lengths, reference = torch.ones(2), torch.full((2,), -2e4)
    total, _, report = summed(settings, log_probs, lengths, reference, rewards)
    total.backward()
    assert report.isfinite().all()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()
    assert log_probs.grad[0] == -log_probs.grad[1]
    lost = {
        "dpo": max(-margin, 0.0), "ipo": (margin - 0.5) ** 2, "rpo_sq": (margin - 1) ** 2,
        # sigmoid(1) = 0.731; the entropy of that coin is 0.582.
        "rpo_bwd_kl": 1e4 * (0.26894142 if margin > 0 else 0.73105858) - 0.58220,
        "rpo_fwd_kl": math.log1p(math.exp(-1.0)) if margin > 0 else math.log1p(math.exp(1.0)),
        "simpo": 0.0 if margin > 0 else 1e4 + 0.5,
    }[loss]  # fmt: skip
    assert total.item() == pytest.approx(lost, rel=1e-6)


def test_log_probs_of_answers_are_summed_by_example() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], requires_grad=True)
    weights = torch.tensor([1, 0, 1, 1, 0, 1])
    sums, lengths = answer_log_probs(losses, weights, torch.tensor([2, 2, 0, 2, 0, 3]), 5)
    assert sums.tolist() == [-4.0, 0.0, -9.0, -32.0, 0.0]
    assert lengths.tolist() == [1.0, 0.0, 2.0, 1.0, 0.0]
    (sums * torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])).sum().backward()
    assert losses.grad is not None
    assert losses.grad.dtype == torch.float32
    assert losses.grad.tolist() == [-100.0, 0.0, -1.0, -100.0, 0.0, -1000.0]


def test_log_probs_of_long_answers_lose_nothing() -> None:
    """Summed in fp32, 32,768 tokens of about 2 nats are off by far more than this."""
    torch.manual_seed(3)
    losses = 4 * torch.rand(2**15)
    sums, lengths = answer_log_probs(
        losses, torch.ones_like(losses), torch.zeros(2**15, dtype=torch.long), 1
    )
    assert lengths.tolist() == [2**15]
    assert sums.item() == pytest.approx(-math.fsum(losses.tolist()), abs=1e-8)
