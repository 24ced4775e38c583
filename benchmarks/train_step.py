"""A training step of low-rank methods: rankwise, PEFT, full fine-tuning and the frozen floor, in turns in one process.

    python -m benchmarks.train_step                                      # the table of docs/speed.md: 130M, bf16, 4 x 256 tokens
    python -m benchmarks.train_step --shape 60M --cases lora,dora --rounds 5
    python -m benchmarks.train_step --shape 7B --batch 2 --length 2048   # on a GPU

The floor is the frozen base's own forward and input gradient: what no adapter can avoid. overhead = step / floor - 1, paired by round.
Before anything is timed, rankwise's loss and adapter gradients are compared with PEFT's on the same factors (methods that PEFT does not
have: with the plain form of the equation), so that both sides are known to do the same work. All contenders share the base's weights, the
process, the allocator's setting and the batch. 'rankwise, adapters alone' leaves the norms, gated products and the loss as transformers
has them; 'rankwise, fp32 products' is the whole of it after `rankwise.fp32_products`, where a CPU multiplies faster in fp32, with a floor
of its own kind; 'PEFT, base dtype' keeps its adapters in the base's dtype, as rankwise computes. AdaLoRA's and LoRA-FA's steps include
clipping, the optimizer and their bookkeeping. Peak memory comes from a fresh process for each contender (--memory).
"""

import argparse
import copy
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import interleave, machine, peak_bytes, ratio, spread, synchronize, table, tune_allocator, write_json
from benchmarks.contenders import CASES, SHAPES, Case, Contender, agreement, base_model, floor, full, peft, rankwise

LIMITS = {"fp32": {"loss": 1e-5, "gradient": 1e-3}, "bf16": {"loss": 5e-3, "gradient": 4e-2}}
OURS, ALONE, DEFAULT, SAME = "rankwise", "rankwise, adapters alone", "PEFT", "PEFT, base dtype"
WIDE, WIDE_FLOOR = "rankwise, fp32 products", "floor, fp32 products"


def saved_bytes(contender: Contender) -> int:
    """Bytes that one forward keeps for the backward, each storage once, parameters and buffers left out."""
    model = contender.model
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    alive: list[Tensor] = []  # or a later tensor could stand where an earlier one stood

    def pack(tensor: Tensor) -> None:  # the graph gets nothing back: an output that it kept would keep the graph in turn
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        model(**contender.call)
    return sum(seen.values())


@contextmanager
def plain_form() -> Iterator[None]:
    """Within the block the equation runs in plain autograd."""
    from rankwise import equation

    rule = equation.form_of
    equation.form_of = lambda storage, x: "reference"
    try:
        yield
    finally:
        equation.form_of = rule


def against_plain_form(contender: Contender) -> dict[str, float]:
    """Loss and gradients of the fused form and of the plain one, relative."""
    model = contender.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained:
            if not bool(parameter.any()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)

    def gradients() -> tuple[float, list[Tensor | None]]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(2)
        loss = model(**contender.call).loss
        loss.backward()
        return float(loss.detach()), [parameter.grad for parameter in trained]

    fused, mine = gradients()
    with plain_form():
        plain, others = gradients()
    both = [(a.float(), b.float()) for a, b in zip(mine, others, strict=True) if a is not None and b is not None]
    difference = sum(float((a - b).square().sum()) for a, b in both)
    return {"loss": abs(fused - plain) / plain, "gradient": (difference / sum(float(b.square().sum()) for _, b in both)) ** 0.5}


def build(base: Any, batch: dict[str, Tensor], case: Case) -> dict[str, Contender]:
    """The contenders of one case."""
    made = {OURS: rankwise(base, batch, case), ALONE: rankwise(base, batch, case, alone=True)}
    if wide_pays(base):
        made[WIDE] = rankwise(base, batch, case, wide=True)
    if not case.against and case is not CASES["lora-24"]:
        made |= {DEFAULT: peft(base, batch, case, upcast=True), SAME: peft(base, batch, case, upcast=False)}
    return made


def wide_pays(base: Any) -> bool:
    """Whether `rankwise.fp32_products` has something to gain here."""
    import rankwise as rw

    return base.device.type == "cpu" and base.dtype != torch.float32 and rw.fp32_products_pay(base.dtype)


def checked(base: Any, batch: dict[str, Tensor], case: Case, contenders: dict[str, Contender], dtype: str) -> dict[str, float]:
    """How far the two sides are from each other; an error if they do not do the same work. Dropout draws differ, so it is off here.

    The plain form is compared in fp32: a hard gate on the edge falls to one side or the other by a rounding of 16 bits.
    """
    for contender in contenders.values():
        contender.model.eval() if case.dropout else contender.model.train()
    if DEFAULT in contenders:
        found = agreement(contenders[OURS], contenders[DEFAULT], case.method)
    else:
        found, dtype = against_plain_form(rankwise(copy.deepcopy(base).float(), batch, case)), "fp32"
    if WIDE in contenders:
        wide = agreement(contenders[WIDE], contenders[DEFAULT], case.method) if DEFAULT in contenders else {}
        found = {what: max(value, wide.get(what, 0.0)) for what, value in found.items()}
    for contender in contenders.values():
        contender.model.train()
    for what, limit in LIMITS[dtype].items():
        if not found[what] < limit:
            raise SystemExit(
                f"{case.name}: {what} differs by {found[what]:.2g}, more than {limit:.2g}: the contenders do not do the same work"
            )
    return found


def peak(options: argparse.Namespace, what: str, name: str) -> float:
    """MiB above the loaded contender at the worst moment of two steps, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train_step", "--child", f"{what}:{name}", "--shape", options.shape]
    command += ["--dtype", options.dtype, "--batch", str(options.batch), "--length", str(options.length), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the memory of {name} ({what}) could not be measured:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def child(options: argparse.Namespace) -> None:
    """Prints the peak of one contender."""
    what, _, name = options.child.partition(":")
    base, batch = prepared(options)
    contender = {"floor": floor, "full": full}[what](base, batch) if what in ("floor", "full") else one(base, batch, CASES[what], name)
    del base
    gc.collect()
    print(peak_bytes(contender.step) / 2**20)


def one(base: Any, batch: dict[str, Tensor], case: Case, name: str) -> Contender:
    """One contender of a case by its name."""
    if name in (OURS, ALONE, WIDE):
        return rankwise(base, batch, case, alone=name == ALONE, wide=name == WIDE)
    return peft(base, batch, case, upcast=name == DEFAULT)


def prepared(options: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    """The base and its batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = base_model(options.shape, {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype], device)
    ids = torch.randint(0, SHAPES[options.shape][4], (options.batch, options.length), generator=torch.Generator().manual_seed(2)).to(device)
    labels = ids.clone()
    labels[:, : round(options.length * options.masked)] = -100
    return base, {"input_ids": ids, "labels": labels}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed and written."""
    base, batch = prepared(options)
    contenders: dict[str, Contender] = {"floor": floor(base, batch)}
    if wide_pays(base):
        contenders[WIDE_FLOOR] = floor(base, batch, wide=True)
    if options.full:
        contenders["full fine-tuning"] = full(base, batch)
    agreements: dict[str, dict[str, float]] = {}
    for key in options.cases:
        made = build(base, batch, CASES[key])
        agreements[key] = checked(base, batch, CASES[key], made, options.dtype)
        print(
            f"{CASES[key].name}: {'PEFT' if DEFAULT in made else 'the plain form'} agrees to {agreements[key]}", file=sys.stderr, flush=True
        )
        contenders |= {f"{key}: {name}": contender for name, contender in made.items()}
    times = interleave({name: contender.step for name, contender in contenders.items()}, options.rounds, options.warmup)
    rows = []
    for name in times:
        print(f"{name}: {1000 * min(times[name]):.0f} ms at best", file=sys.stderr, flush=True)
    for name, contender in contenders.items():
        case, _, who = name.partition(": ")
        row: dict[str, Any] = {"case": case, "who": who or case, **spread(times[name])}
        row["tokens/s"] = batch["input_ids"].numel() / row["ms"] * 1000
        row["overhead"] = ratio(times[name], times["floor"]) - 1
        if who == WIDE:
            row["over its own floor"] = ratio(times[name], times[WIDE_FLOOR]) - 1
        contender.model.zero_grad(set_to_none=True)
        row["saved MiB"] = saved_bytes(contender) / 2**20
        synchronize()
        if options.memory:
            what = {"floor": "floor", WIDE_FLOOR: "floor", "full fine-tuning": "full"}.get(name, case)
            row["peak MiB"] = peak(options, what, who)
        rows.append(row)
    setting = {key: value for key, value in vars(options).items() if key not in ("output", "plot", "child")}
    return {"setting": setting, "machine": machine(), "agreement": agreements, "rows": rows, "ratios": ratios(rows, times, options.cases)}


def ratios(rows: list[dict[str, Any]], times: dict[str, list[float]], cases: list[str]) -> list[dict[str, Any]]:
    """Ours over PEFT's, case by case."""
    by_name = {(row["case"], row["who"]): row for row in rows}
    found = []
    for key in cases:
        ours, alone = by_name[key, OURS], by_name[key, ALONE]
        other = CASES[key].against
        if other:
            if (other, OURS) in by_name:
                found.append({"case": key, "step / step of " + other: ratio(times[f"{key}: {OURS}"], times[f"{other}: {OURS}"])})
            continue
        if (key, DEFAULT) not in by_name:
            continue
        default, same = by_name[key, DEFAULT], by_name[key, SAME]
        found.append(
            {
                "case": key,
                "overhead / PEFT's": ours["overhead"] / default["overhead"],
                "/ base dtype": ours["overhead"] / same["overhead"],
                "alone / base dtype": alone["overhead"] / same["overhead"],
                "step / PEFT's": ratio(times[f"{key}: {OURS}"], times[f"{key}: {DEFAULT}"]),
                **({"fp32 products": ratio(times[f"{key}: {WIDE}"], times[f"{key}: {DEFAULT}"])} if (key, WIDE) in by_name else {}),
                "saved / PEFT's": ours["saved MiB"] / default["saved MiB"],
            }
        )
    return found


def plot(result: dict[str, Any], path: Path) -> None:
    """Overheads as bars, a group for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["case"] in result["setting"]["cases"]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    colours = {WIDE: "#0b3c49", OURS: "#1f6f8b", ALONE: "#8fc1d4", SAME: "#e0b084", DEFAULT: "#c0632b"}
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for place, (who, colour) in enumerate(colours.items()):
        found = {row["case"]: 100 * row["overhead"] for row in rows if row["who"] == who}
        axes.bar([cases.index(case) + (place - 2) * 0.17 for case in found], list(found.values()), 0.17, label=who, color=colour)
    axes.set_xticks(range(len(cases)), cases, rotation=20)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylabel("% over the frozen base's step")
    setting = result["setting"]
    axes.set_title(
        f"{setting['shape']}, {setting['dtype']}, {setting['batch']} x {setting['length']} tokens; {result['machine']['text']}", fontsize=9
    )
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="130M")
    parser.add_argument("--cases", default=",".join(CASES), help=f"any of {', '.join(CASES)}")
    parser.add_argument("--dtype", choices=LIMITS, default="bf16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--masked", type=float, default=0.0, help="share of the tokens, at the beginning, that carry no label")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="time full fine-tuning too")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, a fresh process for each contender")
    parser.add_argument("--output", type=Path, default=None, help="write the result as JSON")
    parser.add_argument("--plot", type=Path, default=None, help="draw the overheads as a PNG")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cases = [name for name in options.cases.split(",") if name]
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"--cases: {', '.join(unknown)} is none of {', '.join(CASES)}")
    tune_allocator()
    torch.set_num_threads(options.threads)
    if options.child:
        child(options)
        return
    result = measured(options)
    print(json.dumps({"setting": result["setting"], "machine": result["machine"]["text"]}))
    print(table(result["rows"]))
    print()
    print(table(result["ratios"]))
    if options.output:
        write_json(options.output, result)
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
