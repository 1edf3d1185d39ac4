"""The FP8 gate: the same steps in bf16 and in FP8, and whether their loss curves agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

from tanren.config.errors import RequestError
from tanren.config.training import Midtrain, Training

BF16 = "bf16"
# bf16 once more, beginning a hair's breadth beside it: what chance alone does to the curves.
CONTROL = "control"
NUDGE = 1e-5  # of its learning rate, relative
SCALINGS = ("delayed", "tensorwise", "blockwise")
# The compute capability that Transformer Engine's recipe needs: Ada has FP8 matrix products, and
# products of scaled blocks begin with Hopper.
CAPABILITY = {"delayed": 8.9, "tensorwise": 8.9, "blockwise": 9.0}
# Means over so many steps are compared: a single batch does not decide.
WINDOW = 10
# Of the first steps the loss falls fast, and a difference of a step's progress looks large.
SKIPPED = 20
# Steps whose mean is the value at the end.
END = 50
FEWEST_STEPS = SKIPPED + END


def scalings(stated: tuple[str, ...], recipe: Training) -> tuple[str, ...]:
    """The FP8 recipes to try: those stated, else the recipe's own, else tensorwise.

    Raises:
        RequestError: there is none of that name.
    """
    wanted = tuple(dict.fromkeys(stated))
    for name in wanted:
        if name not in SCALINGS:
            raise RequestError(
                f"--fp8 {name}", "is no FP8 recipe", f"they are {', '.join(SCALINGS)}"
            )
    return wanted or (recipe.fp8 if recipe.fp8 != "none" else "tensorwise",)


def changes(recipe: Training, scaling: str, steps: int) -> tuple[str, ...]:
    """What a run of the gate changes in its recipe, as `field=value`.

    The learning rate stays at its peak after the warm-up (which is at most a quarter of the steps):
    a recipe's decay is as long as the recipe's run, and a decay makes curves agree.

    Rounding makes any two runs drift apart that are not the same bit for bit. How far they do is
    the least that a limit can tell, and `control` shows it: its learning rate is 1e-5 higher, which
    by itself matters to nobody.

    Args:
        scaling: an FP8 recipe, `bf16` or `control`.
    """
    warmup = min(recipe.schedule.warmup_steps, steps // 4)
    length = "tokens" if isinstance(recipe, Midtrain) else "epochs"
    return (
        f"steps={steps}",
        f"{length}=null",
        "schedule.style=constant",
        f"schedule.warmup_steps={warmup}",
        "schedule.decay_steps=null",
        "schedule.decay_style=null",
        "schedule.constant_steps=0",
        "precision=bf16",
        f"fp8={scaling if scaling in SCALINGS else 'none'}",
        # quack computes in bf16 alone.
        *(["linear=auto"] * (scaling in SCALINGS)),
        "checkpoints.keep_last=1",
        *([f"optimizer.lr={recipe.optimizer.lr * (1 + NUDGE):.10g}"] * (scaling == CONTROL)),
    )


@dataclass(frozen=True)
class Curves:
    """What a run has written down, by step."""

    loss: Mapping[int, float]
    grad_norm: Mapping[int, float]
    # Tokens per second.
    rate: Mapping[int, float]
    # Empty where nothing is held out.
    held_out: Mapping[int, float]


@dataclass(frozen=True)
class Comparison:
    """FP8 against bf16. Differences are relative, (FP8 - bf16) / bf16.

    `first` is of step 1, whose loss is that of the same weights: what FP8 costs the forward pass
    alone. All others are of what lies behind the first `SKIPPED` steps: `by_step` of the means of
    the `WINDOW` steps that end there, `largest` the largest of them, `end` of the mean of the last
    `END` steps, `held_out` the largest of the held-out losses (None where there are none),
    `grad_norm` and `speed` ratios of medians.
    """

    first: float
    largest: float
    at: int
    end: float
    held_out: float | None
    grad_norm: float
    speed: float
    by_step: Mapping[int, float]

    def passes(self, limit: float) -> bool:
        """Whether all three stay under the limit, a share of 1."""
        return all(abs(one) < limit for one in (self.largest, self.end, self.held_out or 0.0))


def means(curve: Mapping[int, float]) -> dict[int, float]:
    """The mean of the `WINDOW` steps that end at each step, all behind the first `SKIPPED`."""
    steps = sorted(curve)[SKIPPED:]
    return {
        step: fmean(curve[one] for one in steps[at + 1 - WINDOW : at + 1])
        for at, step in enumerate(steps)
        if at + 1 >= WINDOW
    }


def compare(bf16: Curves, fp8: Curves) -> Comparison:
    """Compare two runs of the same steps, at least `FEWEST_STEPS` of them."""
    steps = sorted(bf16.loss)
    assert steps == sorted(fp8.loss)
    assert len(steps) >= FEWEST_STEPS
    smooth, other = means(bf16.loss), means(fp8.loss)
    by_step = {step: _relative(other[step], smooth[step]) for step in smooth}
    at = max(by_step, key=lambda step: abs(by_step[step]))
    held_out = [
        _relative(fp8.held_out[step], value)
        for step, value in bf16.held_out.items()
        if step >= steps[SKIPPED] and step in fp8.held_out
    ]
    late = steps[SKIPPED:]
    return Comparison(
        first=_relative(fp8.loss[steps[0]], bf16.loss[steps[0]]),
        largest=by_step[at],
        at=at,
        end=_relative(*(fmean(run.loss[step] for step in steps[-END:]) for run in (fp8, bf16))),
        held_out=max(held_out, key=abs, default=None),
        grad_norm=_ratio(fp8.grad_norm, bf16.grad_norm, late),
        speed=_ratio(fp8.rate, bf16.rate, late),
        by_step=by_step,
    )


def _relative(fp8: float, bf16: float) -> float:
    return (fp8 - bf16) / bf16


def _ratio(fp8: Mapping[int, float], bf16: Mapping[int, float], steps: list[int]) -> float:
    return median(fp8[step] for step in steps) / median(bf16[step] for step in steps)
