"""Scores of a model on encoded rows: loss over supervised tokens, or accuracy and loss of a classifier.

Own loops, because a mean of batch means weighs tokens unequally, and because an evaluation must draw nothing from the random streams:
a run with evaluations in between is then the same run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.context import facts_of

TOKENS = 4096  # padded tokens of one forward: bounds the logits in memory


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is given back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def batches(lengths: Sequence[int], tokens: int = TOKENS) -> list[list[int]]:
    """Row numbers in batches of similar length, each of at most `tokens` padded tokens (or one row)."""
    made: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if made and (len(made[-1]) + 1) * lengths[index] <= tokens:
            made[-1].append(index)
        else:
            made.append([index])
    return made


def causal_scores(model: Any, encoded: Any, collate: Callable[..., Mapping[str, Tensor]], dtype: torch.dtype) -> dict[str, float]:
    """{'loss': mean negative log-likelihood in nats over all supervised tokens, 'tokens': their number}."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model):
        for rows in batches([len(ids) for ids in encoded.input_ids]):
            batch = collate([{"input_ids": encoded.input_ids[row], "labels": encoded.labels[row]} for row in rows])
            batch = {key: value.to(device) for key, value in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                facts = facts_of(model, batch)  # the prompt's end, for models that route by it: the answer must not be looked at
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **facts).logits
            labels = batch["labels"][:, 1:]  # (rows, length - 1): what follows each token
            kept = labels != -100
            total += float(F.cross_entropy(logits[:, :-1][kept].float(), labels[kept], reduction="sum"))
            count += int(kept.sum())
    return {"loss": total / max(1, count), "tokens": count}


def class_scores(model: Any, encoded: Any, collate: Callable[..., Mapping[str, Tensor]], dtype: torch.dtype) -> dict[str, float]:
    """{'accuracy': share of right labels, 'loss': mean negative log-likelihood in nats, 'rows': their number}."""
    device = next(model.parameters()).device
    total, right = 0.0, 0
    with evaluating(model):
        for rows in batches([len(ids) for ids in encoded.input_ids], 4 * TOKENS):
            batch = collate([{"input_ids": encoded.input_ids[row], "labels": encoded.labels[row]} for row in rows])
            batch = {key: value.to(device) for key, value in batch.items()}
            labels = batch.pop("labels")
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                logits = model(**batch).logits.float()  # (rows, classes)
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
    rows_in_all = len(encoded.input_ids)
    return {"accuracy": right / max(1, rows_in_all), "loss": total / max(1, rows_in_all), "rows": rows_in_all}


def scores_table(
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]] | None = None,
    headings: tuple[str, str] = ("before", "after"),
) -> Any:
    """A rich table: for each set of rows, each score before and after training."""
    from rich.table import Table

    table = Table(title="Evaluation", title_justify="left", title_style="bold")
    for heading in ("rows", "score", headings[0], *((headings[1], "change") if after is not None else ())):
        table.add_column(heading, justify="left" if heading in ("rows", "score") else "right")
    for name, scores in before.items():
        for score, was in scores.items():
            if score in ("tokens", "rows"):
                continue
            cells = [name, score, f"{was:.4f}"]
            if after is not None:
                now = after[name][score]
                change = f"{now - was:+.4f}" if score == "accuracy" else f"{100 * (now - was) / was:+.1f}%" if was else ""
                cells += [f"{now:.4f}", change]
            table.add_row(*cells)
    return table
