"""What a run knows that belongs on a card: its data and its scores."""

import json
from pathlib import Path
from typing import Any

from rankwise.checkpoint.card import scores_lines
from rankwise.training.folder import RunFolder


def data_lines(report: dict[str, Any]) -> list[str]:
    """One list item for each set of rows of a run's data report. Files by their names: the folders above them are nobody's business."""
    return [
        f"- {name}: `{Path(str(each['source'])).name}`, {each['rows']:,} rows, {each['tokens']:,} tokens" for name, each in report.items()
    ]


def run_lines(run: RunFolder | None) -> tuple[list[str], list[str]]:
    """(data, scores) of a run as lines of a card; empty where it is none or has not finished."""
    report, results = (_read(run / name) if run else None for name in ("data.json", "results.json"))
    return data_lines(report or {}), scores_lines(results["before"], results["after"]) if results else []


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
