"""Planted faults: is there a test for everything that could go wrong here?

`python tools/faults.py` plants every fault of tests/faults/*.toml, one at a time, in a copy of src and tests, and runs the few tests
that must notice it. A fault is caught where one of them fails by an assertion: a crash, or a test that cannot be collected, does not
count. Exit code 1 if one survives.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "faults"
SOURCE = Path("src") / "rankwise"
SECONDS = 240  # of one fault's tests, which take a few

# Loaded into pytest: refuses another package than the copy's, and writes down how each test ended.
PLUGIN = """
import json, os, sys
from pathlib import Path
import pytest

_ENDED = {}

def pytest_configure(config):
    import rankwise
    assert Path(rankwise.__file__).resolve().is_relative_to(Path(os.environ["FAULTS_TREE"]).resolve()), rankwise.__file__

@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed:
        raised = call.excinfo.value
        kind = type(raised)
        several = raised.exceptions if isinstance(raised, BaseExceptionGroup) else (raised,)  # hypothesis gives all it has found
        asserted = all(isinstance(one, (AssertionError, pytest.fail.Exception)) for one in several) and "Timeout" not in str(raised)[:20]
        _ENDED[item.nodeid] = ("assertion " if asserted and call.when == "call" else "error ") + kind.__name__
    elif report.when == "call" and report.passed:
        _ENDED.setdefault(item.nodeid, "passed")

def pytest_sessionfinish(session):
    Path(os.environ["FAULTS_ENDED"]).write_text(json.dumps(_ENDED))
"""


@dataclass(frozen=True)
class Fault:
    """One fault: in `file`, `text` (there exactly once) becomes `instead`, and one of `tests` must fail."""

    name: str
    file: str  # below src/rankwise
    text: str
    instead: str
    tests: tuple[str, ...]  # below tests/, as pytest names them
    why: str

    @property
    def digest(self) -> str:
        """Of what is planted and who must notice it."""
        return hashlib.sha256(repr((self.file, self.text, self.instead, self.tests)).encode()).hexdigest()[:12]

    def planted(self, content: str) -> str:
        """The file's content with the fault in it.

        Raises:
            ValueError: the text is not there exactly once.
        """
        count = content.count(self.text)
        if count != 1 or self.text == self.instead:
            raise ValueError(f"fault {self.name!r}: its text stands {count} times in {self.file}, and must stand there once; mend the list")
        return content.replace(self.text, self.instead)


@dataclass(frozen=True)
class Found:
    """What became of one fault."""

    fault: Fault
    caught: bool
    how: str  # the test that failed and by what, or what happened instead
    seconds: float


def read_faults(folder: Path = LIST) -> list[Fault]:
    """All faults of the list, in its order.

    Raises:
        ValueError: two of one name, or an entry that lacks something.
    """
    faults: list[Fault] = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]:
            if set(entry) != {"name", "file", "text", "instead", "tests", "why"}:
                raise ValueError(f"{path}: {entry.get('name')!r} has the keys {sorted(entry)}")
            faults.append(Fault(**{**entry, "tests": tuple(entry["tests"])}))
    names = [fault.name for fault in faults]
    if double := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two faults are named {', '.join(sorted(double))}")
    return faults


def copy_tree(target: Path, source: Path = ROOT) -> Path:
    """A copy of src and tests; what is no Python is linked. File times stay, so that byte code goes with its source."""

    def take(one: str, other: str) -> object:
        return shutil.copy2(one, other) if one.endswith((".py", ".pyc")) else os.symlink(os.path.realpath(one), other)

    for name in ("src", "tests"):
        shutil.copytree(source / name, target / name, copy_function=take, ignore=shutil.ignore_patterns("*.egg-info", ".pytest_cache"))
    shutil.copy2(source / "pyproject.toml", target / "pyproject.toml")
    return write_plugin(target)


def write_plugin(tree: Path) -> Path:
    """Puts the plugin beside src and tests; returns the tree."""
    (tree / "faults_plugin.py").write_text(PLUGIN)
    return tree


def run_tests(tree: Path, tests: Sequence[str], first: bool = True) -> tuple[dict[str, str], str]:
    """(test -> how it ended, the end of what was printed) of tests over a tree; `first` stops at the first that fails."""
    ended, printed = tree / "ended.json", tree / "printed.txt"
    ended.unlink(missing_ok=True)
    words = ["-p", "faults_plugin", "-n", "0", "-q", "--durations", "0", "-p", "no:cacheprovider", *(["-x"] if first else [])]
    child = multiprocessing.get_context("fork").Process(
        target=_pytest, args=(tree, ended, printed, [*words, *(f"tests/{test}" for test in tests)])
    )
    child.start()
    child.join(SECONDS if first else None)
    if child.is_alive():
        child.kill()
        child.join()
        return {}, f"no end within {SECONDS} s"
    text = printed.read_text(errors="replace").strip()
    return json.loads(ended.read_text()) if ended.is_file() else {}, text


def _pytest(tree: Path, ended: Path, printed: Path, words: list[str]) -> None:
    """In a process of its own, which has the libraries of `preload` already."""
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": f"{tree / 'src'}{os.pathsep}{tree}", "FAULTS_TREE": str(tree), "FAULTS_ENDED": str(ended)}
    sys.pycache_prefix = str(tree / "compiled")  # a fault of the same length within the same second would else run as it was before
    sys.path[:0] = [str(tree / "src"), str(tree)]  # before the place of the installed package
    import pytest

    os._exit(int(pytest.main(words)))


def preload() -> None:
    """Imports what the tests need and a fault cannot touch, once for all processes; never the package itself."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("torch", "pytest", "safetensors.torch", "transformers", "peft", "trl.trainer.sft_trainer", "pydantic"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    if "rankwise" in sys.modules:
        raise RuntimeError("the package was imported before a copy of it could be")


def broken_selections(tree: Path, selections: set[str], jobs: int) -> dict[str, str]:
    """Selection -> why it is no measure of a fault: it fails, or runs nothing, without one. All are run once, file by file."""
    files: dict[str, list[str]] = {}
    for selection in sorted(selections):
        files.setdefault(selection.partition("::")[0], []).append(selection)
    shares: list[list[str]] = [[] for _ in range(jobs)]
    for number, each in enumerate(sorted(files.values(), key=len, reverse=True)):
        shares[number % jobs] += each
    trees = [tree, *(copy_tree(tree.parent / f"{tree.name}-{number}", tree) for number in range(1, jobs))]
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda pair: run_tests(pair[0], pair[1], first=False), zip(trees, shares, strict=True)))
    ended = {test: how for found, _ in results for test, how in found.items()}
    broken = {}
    for selection in selections:
        mine = {test: how for test, how in ended.items() if _belongs(test, f"tests/{selection}")}
        failed = [f"{test}: {how}" for test, how in mine.items() if how != "passed"]
        if failed or not mine:
            broken[selection] = failed[0] if failed else "it runs no test: " + results[0][1][-300:]
    return broken


def _belongs(test: str, selection: str) -> bool:
    return test == selection or test.startswith((f"{selection}[", f"{selection}::"))


def plant(fault: Fault, clean: Path, folder: Path) -> Found:
    """Plants one fault in a fresh copy of a clean tree and runs its tests."""
    began = time.perf_counter()
    tree = copy_tree(folder / fault.name, clean)
    path = tree / SOURCE / fault.file
    path.write_text(fault.planted(path.read_text(encoding="utf-8")), encoding="utf-8")
    for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        stale.unlink()  # byte code of the source without the fault, which a clock of whole seconds might not tell apart
    ended, text = run_tests(tree, fault.tests)
    shutil.rmtree(tree, ignore_errors=True)
    failed = [(test, how) for test, how in ended.items() if how != "passed"]
    caught = bool(failed) and failed[0][1].startswith("assertion ")
    how = " ".join(failed[0]) if failed else "all its tests pass" if ended else text[-300:]
    return Found(fault, caught, how.removeprefix("tests/"), time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite, or a part of it; 1 if a fault survives."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="one fault, or all whose names begin so; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="faults at once")
    parser.add_argument("--list", action="store_true", help="print the list and run nothing")
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args(argv)
    faults = [fault for fault in read_faults() if not given.only or fault.name.startswith(tuple(given.only))]
    if not faults:
        parser.error(f"--only: no fault's name begins with {' or '.join(given.only or [])}; --list prints them all")
    for fault in faults:
        fault.planted((ROOT / SOURCE / fault.file).read_text(encoding="utf-8"))
    if given.list:
        for fault in faults:
            print(f"{fault.name:44} {fault.file:36} {fault.why}")
        print(f"{len(faults)} faults")
        return 0
    preload()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        clean = copy_tree(Path(name) / "clean")
        broken = broken_selections(clean, {test for fault in faults for test in fault.tests}, given.jobs)
        for selection, why in broken.items():
            print(f"without a fault: {selection} does not pass: {why}")
        with ThreadPoolExecutor(given.jobs) as pool:
            found = []
            for one in pool.map(lambda fault: plant(fault, clean, Path(name)), faults):
                if unfit := [selection for selection in one.fault.tests if selection in broken]:
                    one = Found(one.fault, False, f"{unfit[0]} fails without it too", one.seconds)
                found.append(one)
                print(f"{'caught  ' if one.caught else 'SURVIVED'} {one.fault.name:44} {one.seconds:5.1f} s  {one.how}", flush=True)
    survivors = [one.fault.name for one in found if not one.caught]
    print(
        f"{len(found) - len(survivors)} of {len(found)} planted faults caught"
        + (f"; survived: {', '.join(survivors)}" if survivors else "")
    )
    if given.json:
        _write(given.json, found, read_faults())
    return 1 if survivors else 0


def _write(path: Path, found: Sequence[Found], faults: Sequence[Fault]) -> None:
    """Writes the result; what a run of a part has not planted stands there as an earlier run left it, where the fault is still the same."""
    earlier = json.loads(path.read_text(encoding="utf-8"))["faults"] if path.is_file() else []
    rows = {row["name"]: row for row in earlier}
    rows |= {
        one.fault.name: {"name": one.fault.name, "file": one.fault.file, "is": one.fault.digest, "caught": one.caught, "by": one.how}
        for one in found
    }
    kept = [rows[fault.name] for fault in faults if fault.name in rows and rows[fault.name]["is"] == fault.digest]
    result: dict[str, Any] = {"command": "make faults", "planted": len(kept), "caught": sum(row["caught"] for row in kept), "faults": kept}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
