"""The papers' headline claims, each as one sentence that can be measured, and the function that decides it from raw results.

A verdict is 'shown', 'not shown' (which includes: the interval does not decide it), 'not testable here' with the reason, or 'not run'. The
sizes here are those of `benchmarks.evidence`: a claim that is not shown on a tiny base and a short task is not refuted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy

from benchmarks.evidence_results import RESAMPLES, Difference, Evidence, Row, difference, gather, results_of
from benchmarks.evidence_tasks import SHORT
from benchmarks.ranks import GRIDS

MARGIN = 0.01  # relative: what counts as the same quality


@dataclass(frozen=True)
class Verdict:
    """What came out, with the numbers."""

    verdict: str
    numbers: str


Rule = Callable[[Evidence], Verdict]


@dataclass(frozen=True)
class Claim:
    """One paper's claim.

    method: the recipe. paper: what the paper says, shortened. sentence: what is measured here. decide: the verdict.
    """

    method: str
    paper: str
    sentence: str
    decide: Rule


def needs(*methods: str) -> Callable[[Rule], Rule]:
    """Answers 'not run' until these have finished runs."""

    def wrap(rule: Rule) -> Rule:
        def decided(evidence: Evidence) -> Verdict:
            return rule(evidence) if evidence.has(*methods) else Verdict("not run", evidence.missing(*methods))

        return decided

    return wrap


def shown(yes: bool, numbers: str) -> Verdict:
    return Verdict("shown" if yes else "not shown", numbers)


def better(method: str, other: str = "lora") -> Rule:
    """A lower test loss, the whole interval below 0."""

    @needs(method, other)
    def decide(evidence: Evidence) -> Verdict:
        gap = difference(evidence.rows[method], evidence.rows[other])
        return shown(gap.high < 0, f"test loss less {other}'s {gap}")

    return decide


def as_good(method: str, other: str = "lora", parameters: float | None = None, optimizer: float | None = None) -> Rule:
    """A test loss at most 1% above the other's by the whole interval, with at most a share of its trained numbers or optimizer bytes."""

    @needs(method, other)
    def decide(evidence: Evidence) -> Verdict:
        mine, its = evidence.rows[method], evidence.rows[other]
        gap = difference(mine, its)
        told, yes = f"test loss less {other}'s {gap}, allowed {MARGIN * its.mean():+.4f}", gap.high <= MARGIN * its.mean()
        for bound, what, label in (
            (parameters, "trained_parameters", "trained numbers"),
            (optimizer, "optimizer_bytes", "optimizer bytes"),
        ):
            if bound is not None:
                share = mine.size(what) / its.size(what)
                told, yes = f"{told}; {share:.2f} of its {label}, claimed at most {bound:g}", yes and share <= bound
        return shown(yes, told)

    return decide


def curve(row: Row, seeds: list[int]) -> numpy.ndarray:
    """Training loss of each step, mean over seeds."""
    return numpy.mean([row.runs[seed]["losses"] for seed in seeds], axis=0)


def faster(method: str, other: str = "lora") -> Rule:
    """On the same batches a lower training loss, mean over the run, the whole interval over steps below 0. Steps are compared in pairs: in
    one pass the batches differ more from each other than the methods do, so the step at which a loss is first reached says little."""

    @needs(method, other)
    def decide(evidence: Evidence) -> Verdict:
        mine, its = evidence.rows[method], evidence.rows[other]
        seeds = [seed for seed in mine.runs if seed in its.runs]
        if not seeds:
            return Verdict("not run", "no seed in common")
        gaps = curve(mine, seeds) - curve(its, seeds)
        drawn = numpy.random.default_rng(0).integers(0, len(gaps), (RESAMPLES, len(gaps)))
        low, high = numpy.percentile(gaps[drawn].mean(1), [2.5, 97.5])
        gap = Difference(float(gaps.mean()), float(low), float(high))
        return shown(gap.high < 0, f"training loss less {other}'s, mean over {len(gaps)} steps {gap}")

    return decide


def nearer_to_full(method: str, other: str = "lora") -> Rule:
    """A smaller gap to full fine-tuning's test loss, and the method significantly below the other."""

    @needs(method, other, "full")
    def decide(evidence: Evidence) -> Verdict:
        full, mine, its = (evidence.rows[name].mean() for name in ("full", method, other))
        if its <= full:
            return Verdict(
                "not testable here", f"{other} ({its:.4f}) is not behind full fine-tuning ({full:.4f}): there is no gap to close"
            )
        gap = difference(evidence.rows[method], evidence.rows[other])
        told = f"above full fine-tuning by {mine - full:+.4f}, {other} by {its - full:+.4f}; difference {gap}"
        return shown(gap.high < 0, told)

    return decide


def forgets_less(method: str, other: str = "lora") -> Rule:
    """A lower loss on general text after training, the whole interval below 0."""

    @needs(method, other)
    def decide(evidence: Evidence) -> Verdict:
        if not evidence.task.general:
            return Verdict("not testable here", "a classifier has no loss on general text")
        gap = difference(evidence.rows[method], evidence.rows[other], "general")
        return shown(
            gap.high < 0, f"loss on general text less {other}'s {gap}; test loss {difference(evidence.rows[method], evidence.rows[other])}"
        )

    return decide


def sequence(evidence: Evidence) -> Verdict:
    """AM-LoRA's forgetting over a sequence of tasks, from benchmarks.task_sequence."""
    found = results_of(evidence.folder / "task_sequence.json")
    if found is None:
        return Verdict("not run", "python -m benchmarks.task_sequence")
    told = {name: numpy.mean([run["forgetting"] for run in runs]) for name, runs in found["results"].items()}
    mine = min(value for name, value in told.items() if name.startswith("am-lora"))
    return shown(bool(mine < told["lora"]), ", ".join(f"{name} {value:.3f}" for name, value in told.items()) + " (task_sequence.json)")


def decoding(evidence: Evidence) -> Verdict:
    """Routing by the prompt against routing by the token while generating, from benchmarks.decoding; 5% is what such timings can tell."""
    found = results_of(evidence.folder / "decoding.json")
    if found is None:
        return Verdict("not run", "python -m benchmarks.decoding --output benchmarks/results/decoding.json")
    rows = {row["method"]: row for row in found["rows"]}
    told = ", ".join(f"{name} {row['tokens/s']:.0f}" for name, row in rows.items())
    ratio = rows["loramoe"]["over milora-mixture"]
    return shown(ratio > 1.05, f"tokens/s: {told}; LoRAMoE takes {ratio:.2f} of its time (decoding.json)")


def rank_rows(evidence: Evidence, part: str) -> dict[tuple[str, int], Row] | Verdict:
    """The rows of benchmarks.ranks, once all of them have runs."""
    rows = GRIDS[part].rows(evidence.folder / "ranks")
    missing = [f"{method} at rank {rank}" for (method, rank), row in rows.items() if not row.runs]
    return Verdict("not run", f"python -m benchmarks.ranks --parts {part}: {', '.join(missing)}") if missing else rows


def large_ranks(evidence: Evidence) -> Verdict:
    """rsLoRA against LoRA at rank 64, beside what both gained from rank 16 on."""
    rows = rank_rows(evidence, "large")
    if isinstance(rows, Verdict):
        return rows
    gap = difference(rows["rslora", 64], rows["lora", 64])
    small = gather(evidence.folder / "evidence", SHORT, methods=("lora", "rslora")).rows
    gains = [f"{method} {row.mean():.4f} to {rows[method, 64].mean():.4f}" for method, row in small.items() if row.runs]
    return shown(gap.high < 0, f"test loss less lora's {gap}; from rank 16 to 64: {', '.join(gains)} (ranks/)")


def few_rows(evidence: Evidence) -> Verdict:
    """How far the test loss of Deep LoRA spreads over ranks, less how far LoRA's does, with a bootstrap interval over test rows."""
    rows = rank_rows(evidence, "few")
    if isinstance(rows, Verdict):
        return rows
    grid = GRIDS["few"]
    losses = {}  # method -> (ranks, test rows, 2): summed loss and tokens
    for method in grid.methods:
        losses[method] = numpy.stack([rows[method, rank].rows("test", list(rows[method, rank].runs))[:, :2] for rank in grid.ranks])
    count = losses["lora"].shape[1]
    drawn = numpy.random.default_rng(0).integers(0, count, (RESAMPLES, count))

    def widths(chosen: numpy.ndarray) -> dict[str, numpy.ndarray]:
        sums = {method: values[:, chosen].sum(-2) for method, values in losses.items()}  # (ranks, ..., 2)
        return {method: numpy.ptp(values[..., 0] / values[..., 1], axis=0) for method, values in sums.items()}

    found, again = widths(numpy.arange(count)), widths(drawn)
    low, high = numpy.percentile(again["deep-lora"] - again["lora"], [2.5, 97.5])
    gap = Difference(float(found["deep-lora"] - found["lora"]), float(low), float(high))
    told = "; ".join(f"{method} {', '.join(f'{rows[method, rank].mean():.3f}' for rank in grid.ranks)}" for method in grid.methods)
    return shown(gap.high < 0, f"width over ranks {', '.join(map(str, grid.ranks))} less lora's {gap}: {told} (ranks/)")


#: what other benchmarks decide, whatever the task of the table
ELSEWHERE: tuple[Rule, ...] = (sequence, decoding, large_ranks, few_rows)

CLAIMS: tuple[Claim, ...] = (
    Claim("lora", "on par with full fine-tuning", "Its test loss is at most 1% above full fine-tuning's.", as_good("lora", "full")),
    Claim(
        "rslora",
        "large ranks go on learning",
        "At rank 64 its test loss is below LoRA's.",
        large_ranks,
    ),
    Claim("qlora", "4 bits without loss of quality", "Its test loss is at most 1% above LoRA's.", as_good("qlora")),
    Claim(
        "lora-plus", "up to twice as fast", "On the same batches its training loss is below LoRA's, mean over the run.", faster("lora-plus")
    ),
    Claim(
        "lora-fa",
        "the same quality with a frozen down",
        "Its test loss is at most 1% above LoRA's, with at most 0.6 of its trained numbers.",
        as_good("lora-fa", parameters=0.6),
    ),
    Claim("lora-pro", "closes the gap to full fine-tuning", "Its test loss is nearer to full fine-tuning's.", nearer_to_full("lora-pro")),
    Claim("dora", "better than LoRA", "Its test loss is below LoRA's.", better("dora")),
    Claim(
        "pissa", "converges faster than LoRA", "On the same batches its training loss is below LoRA's, mean over the run.", faster("pissa")
    ),
    Claim("milora-svd", "forgets less than LoRA", "Its loss on general text after training is below LoRA's.", forgets_less("milora-svd")),
    Claim(
        "olora", "converges faster than LoRA", "On the same batches its training loss is below LoRA's, mean over the run.", faster("olora")
    ),
    Claim(
        "lora-ga",
        "2 to 4 times as fast as LoRA",
        "On the same batches its training loss is below LoRA's, mean over the run.",
        faster("lora-ga"),
    ),
    Claim("corda", "its 'ipm' is better than LoRA and PiSSA", "Its test loss is below PiSSA's.", better("corda", "pissa")),
    Claim("moslora", "better than LoRA", "Its test loss is below LoRA's.", better("moslora")),
    Claim(
        "vera",
        "the same quality with a tenth of the numbers",
        "Its test loss is at most 1% above LoRA's, with at most 0.1 of its trained numbers.",
        as_good("vera", parameters=0.1),
    ),
    Claim(
        "propulsion",
        "competitive with a tenth of the numbers",
        "Its test loss is at most 1% above LoRA's, with at most 0.1 of its trained numbers.",
        as_good("propulsion", parameters=0.1),
    ),
    Claim(
        "adalora",
        "better at the same budget",
        "Its test loss is at most 1% above LoRA's, with at most 0.55 of the numbers.",
        as_good("adalora", parameters=0.55),
    ),
    Claim(
        "deep-lora",
        "quality does not depend on the rank, also with few samples",
        "Trained on 16 rows its test loss varies less over ranks 8 to 64 than LoRA's.",
        few_rows,
    ),
    Claim("rosa", "better than LoRA, as expressive as full fine-tuning", "Its test loss is below LoRA's.", better("rosa")),
    Claim(
        "lora-drop",
        "half of the parameters, the same quality",
        "Its test loss is at most 1% above LoRA's, with at most 0.55 of its trained numbers.",
        as_good("lora-drop", parameters=0.55),
    ),
    Claim("am-lora", "forgets less over a sequence of tasks", "Its forgetting over four groups of sections is below one LoRA's.", sequence),
    Claim("loramoe", "keeps what the base knows", "Its loss on general text after training is below LoRA's.", forgets_less("loramoe")),
    Claim(
        "milora-mixture",
        "faster decoding than a mixture that routes by the token",
        "Tokens a second while generating are above LoRAMoE's.",
        decoding,
    ),
    Claim(
        "galore",
        "as good as full fine-tuning with a fraction of the optimizer's memory",
        "Its test loss is at most 1% above full fine-tuning's, with at most 0.7 of its optimizer bytes.",
        as_good("galore", "full", optimizer=0.7),
    ),
    Claim("eva", "better than LoRA", "Its test loss is below LoRA's.", better("eva")),
    Claim(
        "lora-one",
        "faster and better than LoRA",
        "On the same batches its training loss is below LoRA's, mean over the run.",
        faster("lora-one"),
    ),
    Claim(
        "randlora",
        "full rank at LoRA's number of parameters",
        "Its test loss is at most 1% above LoRA's, with at most as many trained numbers.",
        as_good("randlora", parameters=1.0),
    ),
)
