"""The list of planted faults stands: each text is there exactly once, and every part of the package has some; `make faults` plants them."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "rankwise"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planted_faults", ROOT / "tools" / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules["planted_faults"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_every_planted_fault_can_still_be_planted(tool: ModuleType) -> None:
    faults = tool.read_faults()
    assert len(faults) >= 150
    for fault in faults:
        content = (SOURCE / fault.file).read_text(encoding="utf-8")
        compile(fault.planted(content), fault.file, "exec")  # raises where the text is not there exactly once, or is no Python any more
        assert fault.why.endswith("."), fault.name
        assert fault.tests, fault.name
        for test in fault.tests:
            path, _, name = test.partition("::")
            text = (ROOT / "tests" / path).read_text(encoding="utf-8")
            assert not name or f"def {name.partition('[')[0]}(" in text, f"{fault.name}: {test}"


def test_every_part_of_the_package_has_planted_faults(tool: ModuleType) -> None:
    parts = Counter(fault.file.partition("/")[0] for fault in tool.read_faults())
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")} - {"demo"}
    assert packages <= set(parts)
    assert all(parts[package] >= 4 for package in packages), parts


def test_a_text_that_is_not_there_exactly_once_is_an_error(tool: ModuleType) -> None:
    fault = tool.Fault("name", "file.py", "x + y", "x - y", ("test_faults.py",), "why")
    assert fault.planted("z = x + y") == "z = x - y"
    for content in ("z = x", "x + y + x + y"):
        with pytest.raises(ValueError, match="must stand there once"):
            fault.planted(content)


def test_a_fault_in_a_copy_is_caught_by_an_assertion_alone(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy tree: what fails by an assertion is caught; what crashes, cannot be collected or passes is not."""
    root = tmp_path / "clean"
    (root / "src" / "rankwise").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "src" / "rankwise" / "__init__.py").write_text("def double(x):\n    return 2 * x\n")
    (root / "tests" / "test_toy.py").write_text("import rankwise\n\n\ndef test_double():\n    assert rankwise.double(2) == 4\n")
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["tests"]\n')
    tool.write_plugin(root)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rankwise"]:  # the child forks from here and imports its own
        monkeypatch.delitem(sys.modules, name)
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_CURRENT_TEST"):
        monkeypatch.delenv(name, raising=False)
    wanted = {"3 * x": True, "2 * y": False, "2 * (": False, "x + x": False}
    for number, (instead, caught) in enumerate(wanted.items()):
        fault = tool.Fault(f"toy-{number}", "__init__.py", "2 * x", instead, ("test_toy.py::test_double",), "why")
        assert tool.plant(fault, root, tmp_path).caught == caught, instead
