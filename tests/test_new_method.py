"""The generator of new methods: what it writes can be named at once, and fails until it is filled."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "new_method.py"
AXES = {"init": "inits", "update": "updates", "gradient": "gradients"}


def written(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *words, "--root", str(root)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with a new method on each axis that has a skeleton."""
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "*.jsonl"))
    (root / "tests").mkdir()
    for axis in AXES:
        done = written(root, f"new-{axis}", "--axis", axis)
        assert done.returncode == 0, done.stderr
    return root


def test_what_is_written_is_registered_and_fails_until_it_is_filled(tree: Path) -> None:
    script = (
        "import torch, rankwise as rw\n"
        "from rankwise.methods import ABOUT\n"
        "from rankwise.recipes import RECIPES\n"
        "from rankwise.training.config import make_config, resolve\n"
        "for axis in ('init', 'update', 'gradient'):\n"
        "    recipe = RECIPES[f'new-{axis}'](rank=2)\n"
        "    assert getattr(recipe, axis).name == f'new-{axis}' and ABOUT[f'new-{axis}'].what.startswith('TODO')\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "    try:\n"
        "        rw.adapt(model, recipe)\n"
        "        rw.optimizer(model).step()\n"
        "    except NotImplementedError as error:\n"
        "        assert f'new-{axis}' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(f'{axis} works without being filled')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(tree / "src")})
    assert done.returncode == 0, done.stderr


def test_the_skeletons_of_tests_compile_and_number_their_checks(tree: Path) -> None:
    for axis in AXES:
        text = (tree / "tests" / f"test_new_{axis}.py").read_text()
        compile(text, axis, "exec")
        assert re.findall(rf'mark\.check\("new-{axis}", (\d)\)', text) == ["1", "2", "3", "4"]
        assert text.count("pytest.fail(") == 3


@pytest.mark.parametrize(
    ("name", "message"), [("lora-ga", "is there already"), ("rslora", "is a recipe already"), ("Bad_Name", "small letters")]
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_written(tree: Path, name: str, message: str) -> None:
    before = {path: path.read_bytes() for path in tree.rglob("*.py")}
    done = written(tree, name, "--axis", "init")
    assert done.returncode == 1
    assert message in done.stderr
    assert before == {path: path.read_bytes() for path in tree.rglob("*.py")}
