"""What a refresh of GaLore's subspace costs and how good it is: exact SVD, range finder, warm start with and without random directions.

    python -m benchmarks.galore_refresh --shapes 1024x4096:256,2048x2048:128 --json benchmarks/results/galore_refresh.json

The gradients are made: singular values fall like 1 / i^decay, and the one to refresh on is the old one plus `share` of an unrelated one.
Methods run interleaved; a time is the median over the repetitions, a residual is over that of the exact SVD (1 is the best there is).
`step` is the work of every step for comparison: projecting, Adam on the coordinates, back-projecting into the weight.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rankwise.galore import GaLore
from rankwise.subspace import orthonormal, refresh, residual, side_of


def spectrum(out: int, wide: int, decay: float, seed: int, device: str) -> Tensor:
    """A matrix (out, wide) with singular values 1 / i^decay and random directions."""
    generator, small = torch.Generator().manual_seed(seed), min(out, wide)
    left = orthonormal(torch.randn(out, small, generator=generator).to(device))
    right = orthonormal(torch.randn(wide, small, generator=generator).to(device))
    return (left * torch.arange(1, small + 1, device=device).float().pow(-decay)) @ right.T


def timed(call: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(out: int, wide: int, rank: int, decay: float, share: float, repeats: int, device: str) -> dict[str, object]:
    side = side_of(out, wide)
    old = spectrum(out, wide, decay, 0, device)
    new = old + share * spectrum(out, wide, decay, 1, device)
    generator = torch.Generator().manual_seed(2)
    before = refresh(old, rank, side, None, "randomized", generator).frame
    weight = torch.nn.Parameter(torch.zeros_like(new))
    weight.grad = new
    optimizer = GaLore([{"params": [weight], "rank": rank}], update_interval=10**9)
    optimizer.step()
    methods: dict[str, Callable[[], Tensor]] = {
        "svd": lambda: refresh(new, rank, side, before, "svd").frame,
        "range finder": lambda: refresh(new, rank, side, None, "randomized", generator).frame,
        "warm": lambda: refresh(new, rank, side, before, "randomized", generator).frame,
        "warm, bare": lambda: refresh(new, rank, side, before, "randomized", generator, oversample=0).frame,
    }
    quality = {name: residual(new, make(), side) for name, make in methods.items()}  # and a first run, which is not timed
    quality["the old one"] = residual(new, before, side)
    times: dict[str, list[float]] = {name: [] for name in (*methods, "step")}
    for _ in range(repeats):
        for name, make in methods.items():
            times[name].append(timed(make, device))
        times["step"].append(timed(optimizer.step, device))
    return {
        "shape": [out, wide],
        "rank": rank,
        "decay": decay,
        "share": share,
        "milliseconds": {name: round(1000 * statistics.median(runs), 2) for name, runs in times.items()},
        "residual_over_best": {name: round(value / quality["svd"], 4) for name, value in quality.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1024x1024:128,1024x4096:256,2048x2048:128")
    parser.add_argument("--decay", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--share", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {options.threads} thread(s), {platform.machine()}"
    runs = []
    for text in options.shapes.split(","):
        shape, rank = text.split(":")
        out, wide = map(int, shape.split("x"))
        for decay in options.decay:
            for share in options.share:
                runs.append(measure(out, wide, int(rank), decay, share, options.repeats, options.device))
                print(json.dumps(runs[-1]), flush=True)
                if options.json:  # after each one, so that an interrupted run keeps what it has
                    report = {"device": name, "torch": torch.__version__, "repeats": options.repeats, "runs": runs}
                    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
