"""Fuzzes what reads files: adapter_config.json, rankwise.json, safetensors headers, YAML configurations and rows of data.

    python -m benchmarks.fuzz_loaders --inputs 20000 --output benchmarks/results/fuzz_loaders.json
    python -m benchmarks.fuzz_loaders --engine atheris --target config.yaml --inputs 20000

The mutations and what must hold are those of tests/hostile.py, which hypothesis draws in the test suite. `--engine random` (the default)
draws them with a seeded generator; `--engine atheris` lets coverage choose (pip install atheris; libFuzzer ends the process, so it takes
one target a call). Prints, for each kind of file, how many inputs were tried, loaded and refused, and every kind of failure with the
number of its input. The exit code says whether a promise broke.
"""

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

if "atheris" in sys.argv:  # coverage is of the modules that are imported here
    import atheris

    with atheris.instrument_imports(include=["rankwise"]):
        import hostile  # noqa: F401

        import rankwise.training.config
        import rankwise.training.shapes  # noqa: F401

from hostile import Broken, Fuzz, bounded_memory


class Tally:
    """What came of the inputs of one target."""

    def __init__(self, target: str, engine: str) -> None:
        self.target, self.engine, self.began = target, engine, time.perf_counter()
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, dict[str, Any]] = {}

    def one(self, trial: Any, below: Any) -> None:
        """Counts one input."""
        self.counts["inputs"] += 1
        try:
            self.counts["loaded" if trial(below) is None else "refused"] += 1
        except Broken as broken:
            self.counts["broken"] += 1
            key = "".join(character for character in str(broken)[:90] if not character.isdigit())
            if key not in self.failures:
                self.failures[key] = {"input": self.counts["inputs"], "what": str(broken), "where": _where(broken)}
                print(f"{self.target}: BROKEN {self.failures[key]}", file=sys.stderr, flush=True)

    def result(self) -> dict[str, Any]:
        """One row of the table."""
        counts = {key: self.counts[key] for key in ("inputs", "loaded", "refused", "broken")}
        seconds = round(time.perf_counter() - self.began, 1)
        return {"target": self.target, "engine": self.engine, **counts, "seconds": seconds, "failures": list(self.failures.values())}


def _where(error: BaseException) -> str:
    """The last line of ours that an error came through."""
    found, cause = "", error.__cause__
    trace = None if cause is None else cause.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "rankwise" in name and "tests" not in name:
            found = f"{Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def by_atheris(fuzz: Fuzz, target: str, inputs: int, seed: int, output: Path | None) -> None:
    """Runs one target under atheris, which ends the process."""
    import atheris

    tally, trial = Tally(target, "atheris"), fuzz.trials()[target]

    @atheris.instrument_func
    def test(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        rest = random.Random(data)  # where the bytes end, choices follow from all of them
        tally.one(trial, lambda n: provider.ConsumeIntInRange(0, n - 1) if provider.remaining_bytes() else rest.randrange(n))
        if tally.counts["inputs"] >= inputs:  # here, because libFuzzer leaves without Python's own end
            report([tally.result()], output, {"inputs": inputs, "seed": seed})
            fuzz.remove()
            os._exit(bool(tally.counts["broken"]))

    atheris.Setup([sys.argv[0], "-runs=-1", f"-seed={seed + 1}", "-max_len=512", "-rss_limit_mb=0", "-verbosity=0"], test)
    atheris.Fuzz()


def report(results: list[dict[str, Any]], output: Path | None, about: dict[str, Any]) -> None:
    """Prints the rows and appends them to the file of results."""
    for row in results:
        print(json.dumps(row), flush=True)
    if output:
        earlier = json.loads(output.read_text())["runs"] if output.exists() else []
        output.write_text(json.dumps({"about": about, "runs": [*earlier, *results]}, indent=1) + "\n")


def main() -> None:
    """Runs the targets and prints one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--engine", choices=["random", "atheris"], default="random")
    parser.add_argument("--target", action="append", help="only this file; may be given several times")
    parser.add_argument("--inputs", type=int, default=2000, help="for each target")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most, for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="results are appended to those that it holds")
    options = parser.parse_args()
    fuzz = Fuzz.temporary()
    if options.engine == "atheris":
        if not options.target or len(options.target) != 1:
            parser.error("--engine atheris takes one --target")
        with bounded_memory():
            by_atheris(fuzz, options.target[0], options.inputs, options.seed, options.output)
        return
    results = []
    try:
        for target, trial in fuzz.trials().items():
            if options.target and target not in options.target:
                continue
            tally = Tally(target, "random")
            with bounded_memory():
                for number in range(options.inputs):
                    if time.perf_counter() - tally.began > options.seconds:
                        break
                    generator = random.Random(f"{options.seed} {target} {number}")
                    tally.one(trial, generator.randrange)
            results.append(tally.result())
    finally:
        fuzz.remove()
    report(results, options.output, {"inputs": options.inputs, "seed": options.seed})
    sys.exit(any(row["broken"] for row in results))


if __name__ == "__main__":
    main()
