"""What an export is about to publish, judged: the measures of ``export/measure.py``, their limits, and their words.

Notable: what is gross is refused, and nothing else. A short run merged in bf16 loses most of its update by nature, so
that is a warning with a way out; an adapter that is broken, or a file that does not compute what was trained, is not
published without ``--force``, and the receipt says what was forced.
"""

from __future__ import annotations

import math
from typing import Any

import attrs

from eulerforge.errors import Problem, RunError
from eulerforge.terminal import strict

EXPLODING = 5.0
"""||D|| / ||W|| above which a layer is refused. Runs of SmolLM2-135M that learnt stayed below 0.4 in every layer, one
that diverged had layers of 0.9 to 6 (docs/howto/resume_merge_export.md); a tiny model with random weights reaches 4
soundly, because there the weights carry nothing."""
LOST_WARNING = 0.25
"""Share of the whole update lost to rounding that is warned of. bf16 loses a third of an update of 0.5% of the weights
and 90% of one of 0.05%, so a short run in bf16 is no fault, but ``--dtype fp32`` keeps it."""
LOST_REFUSED = 0.99
"""Share above which the file would hold the base under another name."""
TOP1_REFUSED, KL_REFUSED = 0.8, 0.1
"""Agreement below and mean KL divergence (nats) above which the written model is not the one that was trained. Rounding
to bf16 costs a thousandth to a hundredth of a nat; a layer that was left out or merged twice costs far more."""
TOP1_REFUSED_QUANTIZED, KL_REFUSED_QUANTIZED = 0.5, 1.0
"""The same where the run's base was quantized: the adapters go into the original weights, which differ from the
quantized ones that they were trained on."""
FORCE = "--force publishes it all the same"


@attrs.frozen(kw_only=True)
class LayerAudit:
    """One changed tensor of the model, by its name without wrappers.

    ``base_norm`` is None where the base's files hold no floating-point values; ``lost`` and
    ``dtype``, that of the written weight, are None where only adapters are written. ``largest_ratio`` is the
    adapter's own, that of its largest expert; it is None where the base's own values were trained and nothing else.
    ``fits`` is false where a merged value is not finite in ``dtype``.
    """

    name: str
    delta_norm: float
    base_norm: float | None
    largest_ratio: float | None
    error_norm: float | None = None
    dtype: str | None = None
    finite: bool = True
    fits: bool = True
    untouched: bool = False
    untouched_experts: int = 0

    @property
    def ratio(self) -> float | None:
        return None if self.base_norm is None else share(self.delta_norm, self.base_norm)

    @property
    def lost(self) -> float | None:
        return None if self.error_norm is None else share(self.error_norm, self.delta_norm)

    @property
    def exploding(self) -> bool:
        return self.largest_ratio is not None and self.largest_ratio > EXPLODING

    def problem(self) -> Problem | None:
        """Why this layer is not published, or None."""
        if not self.finite:
            return Problem(
                message=f"{self.name}: the adapter holds NaN or infinite values",
                hint=f"take an earlier checkpoint with --checkpoint N; {FORCE}",
            )
        if not self.fits:
            return Problem(
                message=f"{self.name} is not finite as {self.dtype} after the merge",
                hint="give --dtype fp32 or bf16, or look at the run's loss: the training may have diverged",
            )
        if self.exploding:
            return Problem(
                message=f"{self.name}: the update is {self.largest_ratio:.3g} times as large as the weight"
                f" (the limit is {EXPLODING:g})",
                hint=f"train with a lower training.lr, or take an earlier checkpoint with --checkpoint N; {FORCE}",
            )
        if self.untouched:
            return Problem(
                message=f"{self.name}: the adapter was never trained, its update is zero",
                hint=f"look at training.phases and training.lr, or take the layer out of the injection; {FORCE}",
            )
        return None

    def sizes(self) -> tuple[tuple[float | None, str], ...]:
        """Weight, ratio and lost, each with the form in which a table shows it."""
        return (self.base_norm, ".4g"), (self.ratio, ".3%"), (self.lost, ".2%")

    def flags(self) -> list[str]:
        """What is wrong with the layer, in a word each."""
        named = {
            "not finite": not (self.finite and self.fits),
            "exploding": self.exploding,
            "untouched": self.untouched,
            f"{self.untouched_experts} experts untouched": self.untouched_experts > 0,
        }
        return [name for name, holds in named.items() if holds]

    def to_json(self) -> dict[str, Any]:
        flags = ("finite", "fits", "untouched", "untouched_experts", "exploding")
        numbers = ("delta_norm", "base_norm", "ratio", "largest_ratio", "lost")
        return {
            "name": self.name,
            "dtype": self.dtype,
            **{name: strict(getattr(self, name)) for name in numbers},
            **{name: getattr(self, name) for name in flags},
        }


@attrs.frozen(kw_only=True)
class LogitsAudit:
    """Logits of the written model beside those with the adapters on: ``kl`` in nats per token, ``top1`` a share."""

    kl: float
    top1: float
    largest_difference: float
    tokens: int
    source: str

    def problem(self, *, quantized: bool) -> Problem | None:
        """Why the written model is not published, or None."""
        top1, kl = (TOP1_REFUSED_QUANTIZED, KL_REFUSED_QUANTIZED) if quantized else (TOP1_REFUSED, KL_REFUSED)
        if self.kl <= kl and self.top1 >= top1:
            return None
        return Problem(
            message=f"the merged model is not the one that was trained: {self.describe()}"
            f" (the limits are {kl:g} and {top1:.0%})",
            hint=f"give --dtype fp32, compare both with eulerforge bench and bench --live; {FORCE}",
        )

    def describe(self) -> str:
        return (
            f"KL divergence {self.kl:.3g}, top-1 agreement {self.top1:.1%}, largest difference"
            f" {self.largest_difference:.3g} over {self.tokens:,} tokens of {self.source}"
        )

    def to_json(self) -> dict[str, Any]:
        return strict(attrs.asdict(self))


@attrs.frozen(kw_only=True)
class ExportAudit:
    """What was measured of an export; ``logits`` is None where none were compared."""

    layers: tuple[LayerAudit, ...]
    quantized: bool = False
    logits: LogitsAudit | None = None

    @property
    def dtype(self) -> str | None:
        """That of the written weights (``bf16/fp32`` where they are mixed); None where only adapters are written."""
        return "/".join(sorted({layer.dtype for layer in self.layers if layer.dtype})) or None

    @property
    def lost(self) -> float | None:
        """The share of the whole update that rounding takes; None where only adapters are written."""
        if self.dtype is None:
            return None
        errors = (layer.error_norm or 0.0 for layer in self.layers)
        return share(math.hypot(*errors), math.hypot(*(layer.delta_norm for layer in self.layers)))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All that forbids to publish it without ``--force``."""
        found = [problem for layer in self.layers if (problem := layer.problem())]
        if not found and self.lost is not None and self.lost > LOST_REFUSED:
            found.append(
                Problem(
                    message=f"{self.lost:.1%} of the update is lost to rounding as {self.dtype}: the file would be the"
                    " base model",
                    hint=f"give --dtype fp32; {FORCE}",
                )
            )
        if self.logits is not None and (problem := self.logits.problem(quantized=self.quantized)):
            found.append(problem)
        return tuple(found)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What a user should know of an export that is published."""
        lost = self.lost
        if lost is None or not lost > LOST_WARNING:
            return ()
        worst = max(self.layers, key=lambda layer: layer.lost or 0)
        return (
            Problem(
                message=f"{lost:.0%} of the update is lost to rounding as {self.dtype}, most in {worst.name}",
                hint="--dtype fp32 keeps it, or serve the adapter by itself with --format peft",
            ),
        )

    def refuse(self, *, force: bool) -> None:
        """Raise what forbids to publish.

        Raises:
            RunError: there is a problem and no ``force``; the first 5 are named.
        """
        if (problems := self.problems) and not force:
            more = len(problems) - 5
            shown = list(problems[:5])
            if more > 0:
                shown.append(Problem(message=f"{more} more layers are refused", hint="the first ones say why"))
            raise RunError.of(shown)

    def to_json(self) -> dict[str, Any]:
        """The receipt's part: the measures, the limits that they were held against, and what was forced."""
        quantized = self.quantized
        return {
            "lost": strict(self.lost),
            "logits": None if self.logits is None else self.logits.to_json(),
            "limits": {
                "ratio": EXPLODING,
                "lost": LOST_REFUSED,
                "kl": KL_REFUSED_QUANTIZED if quantized else KL_REFUSED,
                "top1": TOP1_REFUSED_QUANTIZED if quantized else TOP1_REFUSED,
            },
            "forced": [problem.message for problem in self.problems],
            "layers": [layer.to_json() for layer in self.layers],
        }

    def lines(self) -> list[str]:
        """The summary as a person reads it."""
        sized = [(layer.ratio, layer.name) for layer in self.layers if layer.ratio is not None]
        text = f"update: {len(self.layers):,} tensors"
        if sized:
            (low, _), (high, name) = min(sized), max(sized)
            text += f", {low:.3%} to {high:.3%} of their weights' size ({name})"
        if self.lost is not None:
            text += f", {self.lost:.2%} lost to rounding as {self.dtype}"
        if idle := sum(layer.untouched_experts for layer in self.layers):
            text += f", {idle:,} experts never trained"
        return [text, *([] if self.logits is None else [f"logits: {self.logits.describe()}"])]

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headers and a row for each layer."""
        rows = [
            (
                layer.name,
                f"{layer.delta_norm:.4g}",
                *("-" if value is None else f"{value:{form}}" for value, form in layer.sizes()),
                ", ".join(layer.flags()),
            )
            for layer in self.layers
        ]
        return ("tensor", "update", "weight", "ratio", "lost", ""), rows


def share(part: float, whole: float) -> float:
    """``part / whole``; of nothing, nothing is 0 and all else is infinite."""
    if whole == 0:
        return 0.0 if part == 0 else math.inf
    return part / whole
