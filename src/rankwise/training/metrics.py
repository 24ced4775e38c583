"""metrics.jsonl and timing.jsonl: one line a step, written as it happens.

Metrics hold no clock time, so that an interrupted run that was resumed has the same file, byte for byte; times lie in timing.jsonl.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.training.folder import RunFolder, cut_back
from rankwise.training.progress import Progress


class Recorder:
    """Appends to the metrics of a run and feeds its progress line. Opened at the step from which the run goes on."""

    def __init__(self, run: RunFolder, step: int, progress: Progress) -> None:
        for name in ("metrics.jsonl", "timing.jsonl"):
            cut_back(run / name, step)
        self.metrics: Path = run / "metrics.jsonl"
        self.timing: Path = run / "timing.jsonl"
        self.progress = progress
        self.last = time.perf_counter()

    def step(self, step: int, epoch: float | None, logs: Mapping[str, Any], tokens: int, method: Mapping[str, float]) -> None:
        """One optimizer step: the mean loss over its supervised tokens, the gradient's norm before clipping, the base learning rate, and
        what the method says of it (a penalty, a budget)."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        line = {"step": step, "epoch": epoch, "loss": logs["loss"], "grad_norm": logs.get("grad_norm"), "lr": logs.get("learning_rate")}
        _append(self.metrics, line | {"tokens": tokens, **method})
        _append(self.timing, {"step": step, "seconds": round(seconds, 6), "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)})
        self.progress.step(step, float(logs["loss"]), tokens, seconds)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Scores in the middle of training."""
        _append(self.metrics, {"step": step} | {f"eval_{key}": value for key, value in scores.items()})
        self.progress.scores(step, scores)
        self.last = time.perf_counter()  # the next step's time is its own


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
