"""docs/evidence.md from raw results: the table of methods, its plot, the claims, the papers' figures, the map of compositions.

The generated part stands between two markers; what is written around them stays.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compositions, paper_figures
from benchmarks.claims import CLAIMS, ELSEWHERE
from benchmarks.common import write_json
from benchmarks.evidence_jobs import METHODS, bracket
from benchmarks.evidence_results import Evidence, Row, difference, gather, results_of
from benchmarks.evidence_tasks import TASKS, Task

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- begin: python -m benchmarks.evidence --report -->", "<!-- end -->"
EDGES = {"": "", "low": " (end of bracket)", "high": " (the last tried)", "beyond": " (above its bracket)"}
BETTER, WORSE = "#1f6f8b", "#c0632b"  # whose interval lies wholly on that side of LoRA
NAMES = {"frozen": "frozen base", "full": "full fine-tuning"}


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table; a bar inside a cell would end it."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(key, "")).replace("|", "/") for key in columns) + " |" for row in rows])


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation over seeds."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f} (1 seed)"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f} ({len(values)} seeds)"


def counted(methods: Sequence[str]) -> str:
    return f"{len(methods)} method{'s' if len(methods) > 1 else ''}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}"


def line(evidence: Evidence, row: Row) -> dict[str, str]:
    """A method in the table."""
    made = {"method": NAMES.get(row.method, row.method)}
    task, lora, base = evidence.task, evidence.rows["lora"], evidence.rows["frozen"]
    classes = task.kind == "classification"
    if not row.runs:
        return made | {"test loss": f"not run ({row.missing})" if row.missing != "not run" else "not run"}
    made["test loss"] = spread(row.means("test"))
    if classes:
        made["accuracy"] = spread(row.means("test", 2), 3)
    if row.method != "lora" and lora.runs:
        made["loss less LoRA's"] = str(difference(row, lora))
        if classes:
            made["accuracy less LoRA's"] = str(difference(row, lora, column=2))
    if task.general:
        made["general perplexity"] = f"{math.exp(row.mean('general')):.2f}"
        if row.method != "frozen" and base.runs:
            made["forgotten (loss)"] = str(difference(row, base, "general"))
    made["lr"] = "" if not row.lr else f"{row.lr:.3g}{EDGES[row.edge]}"
    made["trained"] = f"{row.size('trained_parameters'):,}"
    start = row.size("parameters_at_start")
    if start != row.size("trained_parameters"):
        made["trained"] += f" (of {start:,} at the start)"
    made["optimizer MB"] = megabytes(row.size("optimizer_bytes"))
    if row.size("method_state_bytes"):
        made["optimizer MB"] += f" + {megabytes(row.size('method_state_bytes'))}"
    made["file MB"] = megabytes(row.size("adapter_bytes"))
    return made


def columns(task: Task) -> list[str]:
    quality = ["accuracy", "accuracy less LoRA's"] if task.kind == "classification" else ["general perplexity", "forgotten (loss)"]
    return ["method", "test loss", "loss less LoRA's", *quality, "lr", "trained", "optimizer MB", "file MB"]


def about(task: Task, evidence: Evidence) -> str:
    """How a task is set up, and how far it got."""
    ran = sum(bool(row.runs) for row in evidence.rows.values())
    if task.kind == "classification":
        what = f"MiniLM names the section of a package: {task.per_class} rows of each section, texts cut at {task.max_length} tokens"
    else:
        limit = "" if task.max_length == 512 else f", rows of at most {task.max_length} tokens"
        what = f"the bundled base writes descriptions of packages in a form and of sections that it has not seen{limit}"
    some = next((run for row in evidence.rows.values() for run in row.runs.values() if run["steps"]), None)
    length = "" if some is None else f" {some['steps']} steps, {len(some['test'])} test rows. Measured on {some['machine']['text']}."
    return f"{what}; one pass, {task.batch} rows a step.{length} {ran} of {len(evidence.rows)} rows of the table have results."


def times(folder: Path) -> str:
    """Time and memory, from benchmarks.train_step."""
    found = results_of(folder / "train_step.json")
    if found is None:
        return (
            "Not measured yet: `python -m benchmarks.train_step --memory --full --output benchmarks/results/train_step.json` measures them "
            "by interleaved pairs, apart from the runs above."
        )
    memory = results_of(folder / "train_step_memory.json") or {"rows": []}
    peaks = {(row["case"], row["who"]): row["peak MiB"] for row in [*memory["rows"], *found["rows"]] if "peak MiB" in row}
    rows = [
        {
            "method": row["case"] if row["who"] == "rankwise" else row["who"],
            "ms a step": f"{row['ms']:.0f}",
            "over the frozen base's step": f"{100 * row['overhead']:+.0f}%",
            "kept for the backward, MiB": f"{row['saved MiB']:.0f}",
            "peak, MiB": f"{peaks[key]:.0f}" if (key := (row["case"], row["who"])) in peaks else "",
        }
        for row in found["rows"]
        if row["who"] in ("rankwise", "floor", "full fine-tuning")
    ]
    setting = found["setting"]
    shape = f"{setting['shape']}, {setting['dtype']}, {setting['batch']} x {setting['length']} tokens"
    return f"From `benchmarks/results/train_step.json`: {shape}, {found['machine']['text']}.\n\n{markdown(rows)}"


def steps(folder: Path) -> str:
    """Time and memory of every row, from benchmarks.evidence_steps."""
    found = results_of(folder / "evidence_steps.json")
    if found is None:
        return "Not measured yet: `python -m benchmarks.evidence_steps --output benchmarks/results/evidence_steps.json`."
    rows = [
        {
            "method": NAMES.get(row["method"], row["method"]),
            "ms a step": f"{row['ms']:.0f} ({row['p10_ms']:.0f} to {row['p90_ms']:.0f})",
            "over the frozen base's step": f"{100 * (row['step / frozen'] - 1):+.0f}%",
            "step / LoRA's": f"{row['step / lora']:.2f}",
            "kept for the backward, MiB": f"{row['kept MiB']:.0f}",
            "peak, MiB": f"{row['peak MiB']:.0f}",
        }
        for row in found["rows"]
    ]
    batch, length = found["setting"]["batch"]
    told = (
        f"Every row on the model of `completions`, fp32, {batch} x {length} tokens, clipping and optimizer included, in turns, "
        f"{found['setting']['rounds']} rounds; median and the middle 80%; peak above the loaded model in a process of its own. From "
        f"`benchmarks/results/evidence_steps.json`: {found['machine']['text']}."
    )
    return f"{told}\n\n{markdown(rows)}"


def claims(parts: Iterable[Evidence]) -> str:
    """The claims, each decided on every task whose rows it needs were run; what is decided by no task's rows once."""
    rows = []
    for claim in CLAIMS:
        seen: set[str] = set()
        found = [(evidence, claim.decide(evidence)) for evidence in parts]
        decided = [(evidence, verdict) for evidence, verdict in found if verdict.verdict != "not run"]
        for evidence, verdict in decided or found[-1:]:
            if verdict.numbers in seen:
                continue
            seen.add(verdict.numbers)
            own = claim.decide in ELSEWHERE
            rows.append(
                {
                    "method": claim.method,
                    "the paper": claim.paper,
                    "measured here": claim.sentence,
                    "task": "" if own else evidence.task.name,
                    "verdict": f"**{verdict.verdict}**",
                    "numbers": verdict.numbers,
                }
            )
    return markdown(rows)


def figures() -> str:
    """The papers' exact figures."""
    rows = []
    for row in paper_figures.rows():
        rows.append({key: row[key] or "" for key in ("source", "what", "printed", "computed", "verdict", "why")})
    return markdown(rows)


def map_of_compositions(folder: Path) -> str:
    """The counts of the map, and what failed."""
    found = compositions.read(folder / "compositions.jsonl")
    made = compositions.summary(found)
    write_json(folder / "compositions.json", made)
    compositions.plot(made, DOCS / "compositions.png")
    counts = made["counts"]
    told = ", ".join(f"{key} {value}" for key, value in counts.items())
    bad = [row for row in made["pairs"] if "failed" in row or row.get("resumes") is False or row.get("finite") is False]
    rose = [row for row in made["pairs"] if row.get("finite") and row["after"] >= row["before"]]
    listed = [
        f"- {row['recipe']}: {row.get('failed') or ('does not resume bit for bit' if not row['resumes'] else 'not finite')}" for row in bad
    ]
    listed += [f"- {row['recipe']}: the loss went from {row['before']:.3f} to {row['after']:.3f}" for row in rose]
    lines = [f"{told}. Pairs share recipes: {len(found)} of {len(compositions.recipes())} recipes were run.", ""]
    lines += ["![every pair of axis values](compositions.png)", ""]
    return "\n".join(lines + list(dict.fromkeys(listed)))


def plot(parts: Sequence[Evidence], path: Path) -> None:
    """Left: test loss less LoRA's with its interval. Right: the same of the accuracy of a classifier; of a language model what was learned
    against what was forgotten, without the frozen base, which is far off."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [max(2.5, 0.22 * sum(bool(row.runs) for row in evidence.rows.values())) for evidence in parts]
    size, ratios = (12, sum(heights)), {"height_ratios": heights}
    figure, grid = pyplot.subplots(len(parts), 2, figsize=size, gridspec_kw=ratios, layout="constrained", squeeze=False)
    for evidence, (left, right) in zip(parts, grid, strict=True):
        name, base = evidence.task.name, evidence.rows["frozen"]
        differences(left, evidence, 0, f"{name}: test loss less LoRA's, 95% over test rows")
        if evidence.task.kind == "classification":
            differences(right, evidence, 2, f"{name}: accuracy less LoRA's, 95% over test rows")
            continue
        for row in evidence.rows.values():
            if row.runs and row.method != "frozen" and base.runs:
                across, up = row.mean("test"), row.mean("general") - base.mean("general")
                right.plot(across, up, "o", color="black" if row.method in ("lora", "full") else BETTER, markersize=4)
                right.annotate(NAMES.get(row.method, row.method), (across, up), fontsize=7, xytext=(3, 3), textcoords="offset points")
        right.set_title(f"{name}: forgotten (loss on general text) over test loss", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def differences(axes: Any, evidence: Evidence, column: int, title: str) -> None:
    """A line for each method: how far it lies from LoRA; the frozen base only where its head trains."""
    lora = evidence.rows["lora"]
    beside = ("lora",) if evidence.task.kind == "classification" else ("lora", "frozen")
    ran = [row for row in evidence.rows.values() if row.runs and row.method not in beside and lora.runs]
    good = -1 if column == 2 else 1  # a loss is better low, an accuracy high
    gaps = sorted(((difference(row, lora, column=column), row) for row in ran), key=lambda item: good * item[0].value)
    for place, (gap, row) in enumerate(gaps):
        ends = sorted((good * gap.low, good * gap.high))
        colour = BETTER if ends[1] < 0 else WORSE if ends[0] > 0 else "#777777"
        axes.plot([gap.low, gap.high], [place, place], color=colour)
        axes.plot(gap.value, place, "o" if len(row.runs) > 1 else ".", color=colour)
    axes.set_yticks(range(len(gaps)), [NAMES.get(row.method, row.method) for _, row in gaps], fontsize=8)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_title(title, fontsize=9)


def write_report(root: Path) -> None:
    """Writes the generated part of docs/evidence.md and the plots."""
    folder = root.parent
    every = [gather(root, task) for task in TASKS.values()]
    parts = [evidence for evidence in every if evidence.any]
    lines = ["## The table of methods", ""]
    for evidence in every:
        lines += [f"### {evidence.task.name}", ""]
        if not evidence.any:
            lines += [f"Not run yet: `python -m benchmarks.evidence --tasks {evidence.task.name}`.", ""]
            continue
        names = columns(evidence.task)
        rows = [line(evidence, evidence.rows[method]) for method in METHODS]
        lines += [about(evidence.task, evidence), "", markdown([{key: row.get(key, "") for key in names} for row in rows]), ""]
        ends = [row.method for row in evidence.rows.values() if row.edge == "high"]
        if ends:
            lines += [f"{counted(ends)} chose the highest rate that was tried: {', '.join(ends)}. A higher one might do better.", ""]
        if above := [row.method for row in evidence.rows.values() if row.lr and row.lr > bracket(row.method)[2]]:
            lines += [f"{counted(above)} went beyond their bracket: {', '.join(above)}.", ""]
        lower = [f"{row.method} ({', '.join(f'{lr:.3g}' for lr in row.given_up)})" for row in evidence.rows.values() if row.given_up]
        if lower:
            lines += [f"Given up for the next rate, because the first full run ended worse than the short one: {', '.join(lower)}.", ""]
    if parts:
        plot(parts, DOCS / "evidence.png")
        lines += ["![test loss and accuracy less LoRA's, and forgetting](evidence.png)", ""]
    lines += ["## Time and memory", "", steps(folder), "", times(folder), ""]
    lines += ["## The papers' claims", "", claims(parts) if parts else "Nothing was run yet.", ""]
    lines += ["## The papers' figures, from shapes alone", "", figures(), ""]
    lines += ["## The map of compositions", "", map_of_compositions(folder), ""]
    path = DOCS / "evidence.md"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n" + END + after, encoding="utf-8")
