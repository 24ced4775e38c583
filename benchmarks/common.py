"""What every benchmark shares: one allocator setting, contenders run in turns in one process, and a description of the machine."""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def tune_allocator() -> bool:
    """Keeps glibc from unmapping large results after each operation; the same for all contenders. False where there is no glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    threshold = libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    trim = libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    return bool(threshold and trim)


def synchronize() -> None:
    """Waits for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(
    contenders: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, shuffle: bool = True
) -> dict[str, list[float]]:
    """Seconds of each call of each contender, which run in turns, so that what disturbs the machine disturbs all of them.

    Args:
        contenders: name -> what is timed.
        repeats: timed rounds; round i of one contender belongs to round i of another.
        warmup: rounds before them.
        shuffle: another order in each round, drawn from a fixed seed.
    """
    order, generator = list(contenders), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in order}
    for round_ in range(warmup + repeats):
        if shuffle:
            generator.shuffle(order)
        for name in order:
            gc.collect()
            synchronize()
            begin = time.perf_counter()
            contenders[name]()
            synchronize()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - begin)
    return times


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, p10 and p90 in milliseconds; of one run the same number three times."""
    if len(seconds) < 2:
        return {"ms": 1000 * seconds[0], "p10_ms": 1000 * seconds[0], "p90_ms": 1000 * seconds[0]}
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"ms": 1000 * statistics.median(seconds), "p10_ms": 1000 * deciles[0], "p90_ms": 1000 * deciles[-1]}


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over rounds of one time over the other of the same round."""
    return statistics.median(mine / theirs for mine, theirs in zip(seconds, baseline, strict=True))


def peak_bytes(step: Callable[[], object], times: int = 2) -> int:
    """Bytes above what is held now at the worst moment of some steps. On a CPU of the whole process, so it wants one of its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        with contextlib.suppress(OSError, AttributeError):  # what was needed and freed before, by a calibration say, would hide the peak
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _process("VmRSS") or 0
    for _ in range(times):
        step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() - before
    return (_process("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) - before


def _process(what: str) -> int | None:
    """A size of this process in bytes, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    known = next((line for line in lines if line.startswith(what)), None)
    return None if known is None else int(known.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """What the figures were measured on, in general terms: the kind of processor or accelerator, threads, load, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores} cores of {_processor()}"
    versions = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "galore-torch", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "text": f"{device}, torch {torch.__version__}",
        "device": device,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "a CPU"
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    maker = "an Intel" if "GenuineIntel" in text else "an AMD" if "AuthenticAMD" in text else "a"
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    sets = [vectors, "bf16 products" if "avx512_bf16" in flags else "", "AMX" if "amx_bf16" in flags else ""]
    return f"{maker} server CPU" + (f" with {', '.join(filter(None, sets))}" if any(sets) else "")


def listed(parser: argparse.ArgumentParser, given: str, known: Mapping[str, Any] | tuple[str, ...], what: str) -> list[str]:
    """The names in a list with commas."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{what}: {', '.join(unknown)} is none of {', '.join(known)}")
    return names


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as aligned text: words to the left, numbers to the right with three digits that count."""
    columns = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else list(columns)
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    words = [all(isinstance(row.get(column), str | None) for row in rows) for column in columns]

    def line(parts: Sequence[str]) -> str:
        padded = (part.ljust(width) if left else part.rjust(width) for part, width, left in zip(parts, widths, words, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
