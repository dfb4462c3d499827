"""What a person sees while a run trains: a bar on a terminal, a line every so many steps elsewhere; all on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from eulerforge.terminal import harmless
from eulerforge.training.evaluate import Evaluation

AVERAGED_STEPS = 20


class Progress:
    """Plain lines every ``log_steps`` steps: what a log file or a pipe gets."""

    def __init__(self, total_steps: int, log_steps: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.total_steps = total_steps
        self.log_steps = log_steps
        self._clock = clock
        self._edges: deque[float] = deque(maxlen=AVERAGED_STEPS + 1)

    def say(self, text: str) -> None:
        print(harmless(text), file=sys.stderr, flush=True)

    def step(self, row: dict[str, Any]) -> None:
        """Take note of a finished step, a row of metrics.jsonl."""
        step, left = row["step"], self._time_left(row)
        self._draw(row, left)
        if step % self.log_steps == 0 or step in (1, self.total_steps):
            self.say(
                f"step {step}/{self.total_steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}"
                f"  grad norm {row['grad_norm']:.3f}  {row['tokens_per_s']:,.0f} tokens/s  about {left} left"
            )

    def _draw(self, row: dict[str, Any], left: str) -> None:
        """Nothing to draw without a terminal."""

    def _time_left(self, row: dict[str, Any]) -> str:
        """From the last steps as a clock on the wall sees them: saving and validating take their time too."""
        now = self._clock()
        if not self._edges:
            self._edges.append(now - row["seconds"])
        self._edges.append(now)
        per_step = (now - self._edges[0]) / (len(self._edges) - 1)
        return duration((self.total_steps - row["step"]) * per_step)

    def validation(self, step: int, result: Evaluation) -> None:
        self.say(
            f"step {step}/{self.total_steps}  held-out loss {result.loss:.4f}"
            f"  perplexity {result.perplexity:.2f}  ({duration(result.seconds)})"
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class BarProgress(Progress):
    """A bar with loss, speed and time left; lines still go above it."""

    def __init__(self, total_steps: int, log_steps: int) -> None:
        super().__init__(total_steps, log_steps)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  about {task.fields[left]} left"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("training", total=total_steps, loss="-", speed="-", left="-")

    def say(self, text: str) -> None:
        self._bar.console.print(harmless(text), markup=False, highlight=False)

    def _draw(self, row: dict[str, Any], left: str) -> None:
        loss, speed = f"{row['loss']:.4f}", f"{row['tokens_per_s']:,.0f}"
        self._bar.update(self._task, completed=row["step"], loss=loss, speed=speed, left=left)

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def make_progress(total_steps: int, log_steps: int) -> Progress:
    return (BarProgress if sys.stderr.isatty() else Progress)(total_steps, log_steps)


def duration(seconds: float) -> str:
    """3725 as "1 h 02 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
