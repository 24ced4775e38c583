"""What a run prints while it trains: one live line in a terminal, a plain line now and then elsewhere."""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any


def say(console: Any, text: str) -> None:
    """Prints plain text as it is: no markup, no colours for numbers, lines never broken."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def short_time(seconds: float) -> str:
    """75 -> '1m15s'."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """Step, loss, tokens per second and time left, over a window of the last steps. A context manager: the live line ends with it."""

    def __init__(self, console: Any, total: int, lines: int = 10) -> None:
        self.console = console
        self.total = total
        self.every = max(1, total // lines)
        self.window: deque[tuple[int, float]] = deque(maxlen=50)  # (tokens, seconds) of the last steps
        self.losses: deque[float] = deque(maxlen=20)
        self.status: Any = None
        self.started = time.perf_counter()

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self.status = Bar(TextColumn("training"), BarColumn(30), TextColumn("{task.description}"), console=self.console)
            self.task = self.status.add_task("", total=self.total)
            self.status.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.status is not None:
            self.status.stop()

    def step(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """One step is done."""
        self.window.append((tokens, seconds))
        self.losses.append(loss)
        if self.status is not None:
            self.status.update(self.task, completed=step, description=self._text(step))
        elif step % self.every == 0 or step == self.total:
            say(self.console, self._text(step))

    def scores(self, step: int, scores: Mapping[str, float]) -> None:
        """An evaluation in between."""
        text = ", ".join(f"{key} {value:.4g}" for key, value in scores.items())
        say(self.console, f"step {step}: evaluation {text}")

    def _text(self, step: int) -> str:
        seconds = max(sum(second for _, second in self.window), 1e-9)
        speed = sum(tokens for tokens, _ in self.window) / seconds
        left = (self.total - step) * seconds / len(self.window)
        loss = sum(self.losses) / len(self.losses)
        return f"step {step}/{self.total} · loss {loss:.4f} · {speed:,.0f} tokens/s · {short_time(left)} left"
