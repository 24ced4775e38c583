"""The map of compositions: every pair of axis values that can be combined, trained for 50 steps on the bundled base. Resumable.

    python -m benchmarks.compositions                          # what is left; results/compositions.jsonl
    python -m benchmarks.compositions --budget-minutes 10
    python -m benchmarks.compositions --list                   # pairs, recipes and refusals, nothing trained
    python -m benchmarks.compositions --plot                   # docs/compositions.png and results/compositions.json from what is there

A pair becomes a recipe by leaving every other axis at its default; where that is refused, by the fewest changes of other axes that are
legal (a pair with GaLore's update gets its schedule and its init). A pair for which no such recipe exists is refused, and the reason is
that of the legality table. One rate, rank and batch for all: the map says that a composition trains and resumes, not which one is best.

Each recipe: the loss on its eight batches before and after 50 steps, whether every loss was finite, and whether a run that was saved after
25 steps and loaded into a fresh model goes on with the same 25 losses, bit for bit.
"""

import argparse
import copy
import itertools
import json
import math
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from benchmarks.common import machine, write_json
from benchmarks.evidence_tasks import SHORT, Data, Part, load, rows_of
from rankwise.checkpoint import load_trainable_state, trainable_state
from rankwise.recipe import AXES, Recipe, refusal

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
STEPS, MIDDLE, BATCH, BATCHES, LENGTH, PROMPT = 50, 25, 2, 8, 32, 8  # what routes by the prompt needs one
FIELDS: dict[str, Any] = {"rank": 4, "lr": 2e-3, "targets": ["q_proj", "k_proj", "down_proj"]}
#: a value with other options than its own defaults, and why: AdaLoRA's default target is above the rank here
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {("schedule", "adalora"): {"name": "adalora", "target_rank": 2}}
#: every axis that a pair is taken from, its values; the first is the default
VALUES: dict[str, tuple[Any, ...]] = {
    **{axis: tuple(sorted(known, key=lambda name, axis=axis: name != getattr(Recipe(), axis).name)) for axis, known in AXES.items()},
    "base": ("keep", "fold"),
    "frozen": ("", "down"),
}
DEFAULT = {axis: values[0] for axis, values in VALUES.items()}

Value = tuple[str, str]  # axis, name


def values() -> list[Value]:
    """All values of all axes."""
    return [(axis, value) for axis, names in VALUES.items() for value in names]


def pairs() -> list[tuple[Value, Value]]:
    """Every two values of different axes."""
    return [(one, other) for one, other in itertools.combinations(values(), 2) if one[0] != other[0]]


def fields(changes: Mapping[str, str]) -> dict[str, Any]:
    """The recipe's fields of some choices."""
    chosen = DEFAULT | dict(changes)
    made: dict[str, Any] = {axis: OPTIONS.get((axis, name), name) for axis, name in chosen.items()}
    return FIELDS | made | {"frozen": frozenset(filter(None, [chosen["frozen"]]))}


@cache
def _reason(changes: tuple[Value, ...]) -> str | None:
    error = refusal(**fields(dict(changes)))
    return None if error is None else str(error)


def reason(changes: Mapping[str, str]) -> str | None:
    """Why these choices are refused; None where they are legal."""
    return _reason(tuple(sorted(item for item in changes.items() if DEFAULT[item[0]] != item[1])))


def completions(fixed: Mapping[str, str], others: Mapping[str, Sequence[str]], most: int) -> Iterator[dict[str, str]]:
    """The choices in `fixed` with at most `most` changes of other axes, fewest first."""
    free = [axis for axis in VALUES if axis not in fixed]
    for count in range(most + 1):
        for axes in itertools.combinations(free, count):
            for names in itertools.product(*([name for name in others[axis] if name != DEFAULT[axis]] for axis in axes)):
                yield dict(fixed) | dict(zip(axes, names, strict=True))


@lru_cache(maxsize=1)
def companions() -> dict[str, tuple[str, ...]]:
    """Axis -> the values that some value of another axis needs beside it: what completions are made of."""
    needed: dict[str, set[str]] = {axis: set() for axis in VALUES}
    for axis, name in values():
        made = next((made for made in completions({axis: name}, VALUES, 3) if reason(made) is None), None)
        if made is None:
            raise SystemExit(f"no legal recipe has {axis}={name!r}")
        for other, value in made.items():
            needed[other].add(value)
    return {axis: tuple(name for name in VALUES[axis] if name in needed[axis]) for axis in VALUES}


@cache
def recipe_of(pair: tuple[Value, Value]) -> tuple[dict[str, str] | None, str | None]:
    """The choices that a pair is trained with, or None and why it is refused."""
    fixed = dict(pair)
    made = next((made for made in completions(fixed, companions(), 3) if reason(made) is None), None)
    return (made, None) if made is not None else (None, reason(fixed))


def label(made: Mapping[str, str]) -> str:
    """What differs from plain LoRA, in the order of the axes."""
    return " ".join(f"{axis}={made[axis]}" for axis in VALUES if axis in made and made[axis] != DEFAULT[axis]) or "plain LoRA"


# --- one recipe ------------------------------------------------------------------------------------------------------------------------


def batches(data: Data, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The rows that come again and again: the shortest, so that the map is quick."""
    shortest = sorted(data.train, key=lambda row: len(row["input_ids"]))[: BATCH * BATCHES]
    cut = [row["input_ids"][:LENGTH] for row in shortest]
    rows = Part({"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:]} for ids in cut)
    return [{key: value.to(device) for key, value in data.collate(rows[at : at + BATCH]).items()} for at in range(0, len(rows), BATCH)]


def built(base: Any, recipe: Recipe, given: list[dict[str, torch.Tensor]], folder: Path | None = None) -> tuple[Any, Any]:
    """A fresh model and its optimizer; from a saved adapter where the start was made from weights or data, as `rankwise train` resumes."""
    model = copy.deepcopy(base)
    asks = recipe.init.calibration is not None or recipe.schedule.sample is not None
    if folder is not None and (asks or recipe.init.needs_weight):
        rw.load(model, folder)
    else:
        rw.adapt(model, recipe, calibration=given if asks else None)
    second = given[:2] if recipe.routing.wants_validation else None
    return model, rw.optimizer(model, total_steps=STEPS, validation=second)


def steps(model: Any, optimizer: Any, given: list[dict[str, torch.Tensor]], first: int, last: int) -> list[float]:
    """The losses of some steps."""
    losses = []
    model.train()
    for step in range(first, last):
        torch.manual_seed(step)
        loss = model(**given[step % len(given)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def loss_on(model: Any, given: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss of the batches, without dropout."""
    model.eval()
    return sum(float(model(**batch).loss) for batch in given) / len(given)


def trained(base: Any, made: Mapping[str, str], given: list[dict[str, torch.Tensor]], before: float) -> dict[str, Any]:
    """One line of the results."""
    begin, found = time.perf_counter(), {"recipe": dict(made), "label": label(made)}
    try:
        recipe = Recipe().replace(**fields(made))
        model, optimizer = built(base, recipe, given)
        losses = steps(model, optimizer, given, 0, MIDDLE)
        with tempfile.TemporaryDirectory() as name:
            rw.save(model, folder := Path(name) / "adapter")
            session = optimizer.rankwise_session
            kept = json.loads(json.dumps(session.state())), trainable_state(model), copy.deepcopy(session.tensors())
            moments = copy.deepcopy(optimizer.state_dict())
            losses += steps(model, optimizer, given, MIDDLE, STEPS)
            again, resumed = built(base, recipe, given, folder)
        session = resumed.rankwise_session
        session.restore(kept[0])
        load_trainable_state(again, kept[1])
        session.restore_tensors(kept[2])
        resumed.load_state_dict(moments)
        same = steps(again, resumed, given, MIDDLE, STEPS) == losses[MIDDLE:]
        optimizer.rankwise_session.check_alive()
        after = loss_on(model, given)
        finite = all(map(math.isfinite, [*losses, after]))
        found |= {"before": before, "after": after if finite else str(after), "finite": finite, "resumes": same}
    except Exception as error:  # a composition that breaks is what the map is to show
        found["failed"] = f"{type(error).__name__}: {error}"
    return found | {"seconds": round(time.perf_counter() - begin, 2)}


# --- results ---------------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Label -> line; a line that was cut off by a kill is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        found[result["label"]] = result
    return found


def recipes() -> dict[str, dict[str, str]]:
    """Label -> choices of every distinct recipe that some pair is trained with, in a drawn order: a run that is stopped early has seen all
    axes."""
    found = {label(made): made for made, _ in map(recipe_of, pairs()) if made is not None}
    return {name: found[name] for name in random.Random(0).sample(sorted(found), len(found))}


def summary(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Every pair with what became of it."""
    rows = []
    for pair in pairs():
        made, why = recipe_of(pair)
        row: dict[str, Any] = {"pair": [f"{axis}={name or 'nothing'}" for axis, name in pair]}
        if made is None:
            row["refused"] = why
        else:
            result = found.get(label(made))
            row["recipe"] = label(made)
            keys = ("before", "after", "finite", "resumes", "failed")
            row |= {"not run": True} if result is None else {key: result[key] for key in keys if key in result}
        rows.append(row)
    setting = {"steps": STEPS, "resumed at": MIDDLE, "batch": BATCH, "batches": BATCHES, "tokens a row, at most": LENGTH, **FIELDS}
    return {"setting": setting, "machine": machine()["text"], "counts": counts(rows), "pairs": rows}


def counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many pairs of each kind."""
    ran = [row for row in rows if "after" in row]
    return {
        "pairs": len(rows),
        "refused": sum("refused" in row for row in rows),
        "trained": len(ran),
        "finite": sum(row["finite"] for row in ran),
        "resumed bit for bit": sum(row["resumes"] for row in ran),
        "loss fell": sum(row["finite"] and row["after"] < row["before"] for row in ran),
        "failed": sum("failed" in row for row in rows),
        "not run": sum("not run" in row for row in rows),
    }


def plot(made: Mapping[str, Any], path: Path) -> None:
    """The matrix of pairs: colour is the change of the loss, a dot a refusal, a cross a failure, a ring a resume that differed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import TwoSlopeNorm

    names = [f"{axis}={name or 'nothing'}" for axis, name in values()]
    place = {name: index for index, name in enumerate(names)}
    figure, axes = pyplot.subplots(figsize=(13, 12), layout="constrained")
    grid = torch.full((len(names), len(names)), math.nan)
    marks: dict[str, list[tuple[int, int]]] = {"refused": [], "failed": [], "resume differed": [], "not run": []}
    for row in made["pairs"]:
        across, down = place[row["pair"][0]], place[row["pair"][1]]
        if "after" in row and row["finite"]:
            grid[down, across] = row["after"] - row["before"]
            if not row["resumes"]:
                marks["resume differed"].append((across, down))
        else:
            marks["refused" if "refused" in row else "not run" if "not run" in row else "failed"].append((across, down))
    shown = axes.imshow(grid.numpy(), cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -4.0, 1.0))
    looks = {"refused": (".", "#999999"), "failed": ("x", "red"), "resume differed": ("o", "black"), "not run": ("_", "#cccccc")}
    for kind, (marker, colour) in looks.items():
        if marks[kind]:
            across, down = zip(*marks[kind], strict=True)
            filled = {"facecolors": "none", "edgecolors": colour} if marker == "o" else {"color": colour}
            axes.scatter(across, down, marker=marker, s=22, label=f"{kind} ({len(marks[kind])})", **filled)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    edges = list(itertools.accumulate(len(known) for known in VALUES.values()))[:-1]
    for edge in edges:
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
        axes.axvline(edge - 0.5, color="white", linewidth=1.5)
    axes.set_facecolor("#f4f4f4")
    axes.legend(loc="upper right", frameon=False)
    axes.set_title(
        f"loss after {STEPS} steps less loss before, {made['counts']['trained']} of {made['counts']['pairs']} pairs", fontsize=10
    )
    figure.colorbar(shown, ax=axes, shrink=0.6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "compositions.jsonl")
    parser.add_argument("--budget-minutes", type=float, default=None, help="begin no recipe after that; the next call goes on")
    parser.add_argument("--threads", type=int, default=1, help="the matrices are far too small for more than one")
    parser.add_argument("--only", default="", help="only recipes whose label contains this text")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = read(options.results)
    if options.list:
        refused = [(pair, why) for pair in pairs() for made, why in [recipe_of(pair)] if made is None]
        for pair, why in refused:
            print(f"refused  {label(dict(pair))}: {why}")
        print(f"{len(pairs())} pairs, {len(refused)} refused, {len(recipes())} recipes, {len(found)} of them run")
        return
    if options.plot:
        made = summary(found)
        write_json(options.results.with_suffix(".json"), made)
        plot(made, DOCS / "compositions.png")
        print(json.dumps(made["counts"]))
        return
    torch.set_num_threads(options.threads)
    data = rows_of(SHORT)
    loaded = load(SHORT, data, 0)
    given = batches(data, loaded.device)
    before, begin = loss_on(loaded.model, given), time.monotonic()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for name, made in recipes().items():
        if name in found or options.only not in name:
            continue
        if options.budget_minutes is not None and time.monotonic() - begin > 60 * options.budget_minutes:
            print("the time is up; the same command goes on from here")
            break
        result = trained(loaded.model, made, given, before)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        told = result.get("failed") or f"{result['before']:.3f} to {result['after']:.3f}{'' if result['resumes'] else ', RESUME DIFFERS'}"
        print(f"{name}: {told} ({result['seconds']:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
