"""The map of compositions enumerates what the contract of the axes enumerates, and a line of it is true."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "contract"))

from test_axes import LEGAL

from benchmarks import compositions
from benchmarks.evidence_tasks import SHORT, load, rows_of

AXES = ("update", "gain", "init", "gradient", "base", "frozen")


def test_a_pair_is_legal_exactly_if_the_contract_has_a_legal_combination_with_it() -> None:
    """The contract tries all combinations of six axes, the map completes pairs by few changes: they must find the same pairs."""
    there = set()
    for combination in LEGAL:
        chosen = [(axis, "+".join(part) if isinstance(part, tuple) else part) for axis, part in zip(AXES, combination, strict=True)]
        there |= set(itertools.combinations(chosen, 2))
    mine = [pair for pair in compositions.pairs() if pair[0][0] in AXES and pair[1][0] in AXES]
    index = {axis: place for place, axis in enumerate(AXES)}
    ordered = {pair: tuple(sorted(pair, key=lambda value: index[value[0]])) for pair in mine}
    assert len(mine) > 300
    wrong = [pair for pair in mine if (compositions.recipe_of(pair)[0] is not None) != (ordered[pair] in there)]
    assert not wrong


def test_every_refusal_has_the_reason_of_the_legality_table() -> None:
    refused = [compositions.recipe_of(pair)[1] for pair in compositions.pairs() if compositions.recipe_of(pair)[0] is None]
    assert refused
    assert all(why is not None and " cannot be combined with " in why for why in refused)


CHANGES = [
    {},
    {"gain": "dora", "init": "pissa"},
    {"update": "adalora", "init": "own", "schedule": "adalora"},
    {"schedule": "lora-drop", "routing": "milora-mixture"},  # the probe needs rows for the gates' second level too
]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_line_of_the_map(changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(compositions, "STEPS", 6)
    monkeypatch.setattr(compositions, "MIDDLE", 3)
    data = rows_of(SHORT)
    loaded = load(SHORT, data, 0)
    given = compositions.batches(data, loaded.device)[:2]
    before = compositions.loss_on(loaded.model, given)
    line = compositions.trained(loaded.model, changes, given, before)
    assert line.get("failed") is None
    assert line["resumes"]
    assert line["finite"]
    assert line["after"] < line["before"]


def test_a_run_that_does_not_resume_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: without the optimizer's state the losses differ."""
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(compositions, "STEPS", 6)
    monkeypatch.setattr(compositions, "MIDDLE", 3)
    data = rows_of(SHORT)
    loaded = load(SHORT, data, 0)
    given = compositions.batches(data, loaded.device)[:2]
    assert not compositions.trained(loaded.model, {}, given, 0.0)["resumes"]
