"""Writes the files of a new method and its lines in the registries; what it writes is complete in form and fails until it is filled.

usage: python tools/new_method.py NAME --axis init|update|gradient [--root FOLDER]

NAME is that of the recipe and of the axis value, such as lora-ga. Written: src/rankwise/AXISs/NAME.py and tests/test_NAME.py; lines in the
axis' __init__.py, recipes.py and methods.py. The page follows from `python tools/make_method_pages.py`. What to fill says
docs/adding-a-method.md.
"""

import argparse
import re
import sys
from pathlib import Path

KINDS = {
    "init": ("inits", "Init"),
    "update": ("updates", "UpdateChoice"),
    "gradient": ("gradients", "GradientRule"),
}

SKELETONS = {
    "init": '''"""{title}: TODO one sentence.

    TODO the equation, with shapes:    down (rank, in),  up (out, rank)

TODO authors, year, title, arXiv number, section.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.inits.base import Beginning, Init, Statistics
from rankwise.updates import Site


@dataclass(frozen=True)
class {cls}(Init):
    """TODO what it is, and each option."""

    name: ClassVar[str] = "{name}"
    # TODO declare what is true, and take out the rest: moves_base (the pair is subtracted from the base), steps (it is not zero and stays),
    # zero_role ('up' or 'down' starts at zero), needs_weight; a property `calibration` for statistics of real data
    zero_role: ClassVar[str] = "up"

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        raise NotImplementedError("TODO the starting pair of {name}")
''',
    "update": '''"""{title}: TODO one sentence.

    TODO the equation as  dW = scaling * diag(tail) @ up @ core @ down,  with shapes

TODO authors, year, title, arXiv number, section.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.equation import Factors
from rankwise.updates.base import Site, Slot, Update, UpdateChoice
from rankwise.updates.lowrank import lora_slots


class {cls}Update(Update):
    """TODO the product of its factors."""

    def factors(self) -> Factors:
        raise NotImplementedError("TODO the factors of {name}")

    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        raise NotImplementedError("TODO where {name} starts; with `moves` the product must be up @ down")


@dataclass(frozen=True)
class {cls}(UpdateChoice):
    """TODO what it is, and each option."""

    name: ClassVar[str] = "{name}"
    module: ClassVar[Any] = {cls}Update
    # TODO the roles that can train; own_start and zero_role if it brings its own starting values
    roles: ClassVar[frozenset[str]] = frozenset({{"down", "up"}})

    def slots(self, site: Site) -> dict[str, Slot]:
        return lora_slots(site)
''',
    "gradient": '''"""{title}: TODO one sentence.

    TODO the rule, by role

TODO authors, year, title, arXiv number, section.
"""

from dataclasses import dataclass
from typing import ClassVar

from rankwise.gradients.base import GradientRule


@dataclass(frozen=True)
class {cls}(GradientRule):
    """TODO what it is, and each option. A rule with a state of its own overrides `begin`."""

    name: ClassVar[str] = "{name}"

    def rate(self, role: str) -> float:
        raise NotImplementedError("TODO what {name} multiplies the learning rate of a role by")
''',
}

TEST = '''"""{title}: TODO against what it is checked."""

from pathlib import Path
from typing import Any

import pytest
from method_checks import comes_back_from_its_file, resumes_bit_for_bit, trained_a_little
from tiny_models import llama, token_ids
from training_models import make_world

import rankwise as rw


def batch() -> dict[str, Any]:
    ids = token_ids(4, 9)
    return {{"input_ids": ids, "labels": ids}}


@pytest.mark.check("{name}", 1)
def test_the_equation_against_a_dense_reference() -> None:
    pytest.fail("TODO the update, or the start, written out in fp64")


@pytest.mark.check("{name}", 2)
def test_the_official_implementation() -> None:
    pytest.fail("TODO the same numbers from the paper's code or PEFT, or the analytic identity that the paper proves")


@pytest.mark.check("{name}", 3)
def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    model = trained_a_little(rw.adapt(llama(), rw.recipes.{function}(rank=4), calibration=[batch()]), batch())
    comes_back_from_its_file(model, llama, tmp_path / "adapter")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.check("{name}", 4)
def test_a_run_from_yaml_resumes_bit_for_bit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumes_bit_for_bit(world, tmp_path, monkeypatch, {{"name": "{name}"}})


def test_bad_input_is_refused_with_the_remedy() -> None:
    pytest.fail("TODO options out of range, data that are missing or too few")
'''

RECIPE = '''def {function}(**fields: Any) -> Recipe:
    """{title} (TODO authors year, arXiv 0000.00000): TODO one sentence."""
    return _recipe(fields, name="{name}", {axis}={cls}())


'''

ABOUT = """    "{name}": About(
        "TODO what it is.",
        "TODO when to take it.",
        "TODO what it costs.",
    ),
"""


def registered(text: str, axis: str, module: str, cls: str) -> str:
    """An axis' __init__.py with one value more: its import, its entry, its name in __all__."""
    folder = KINDS[axis][0]
    line = f"from rankwise.{folder}.{module} import {cls}\n"
    imports = [found.end() for found in re.finditer(rf"^from rankwise\.{folder}\.\S+ import .*\n", text, re.M)]
    text = text[: imports[-1]] + line + text[imports[-1] :]
    # the tuple of classes: the last one before __all__
    head, mark, tail = text.partition("__all__ = [")
    close = max(head.rfind(",\n)"), head.rfind(")}"), head.rfind(")\n}"))
    assert mark
    assert close > 0, f"{folder}/__init__.py has another form than this tool knows"
    head = head[:close].rstrip(",") + f", {cls}" + head[close:]
    return head + mark + f'"{cls}", ' + tail


def before(text: str, anchor: str, addition: str, after: str = "") -> str:
    """The text with an addition before the first `anchor` that follows `after`."""
    start = text.index(after)
    place = text.index(anchor, start)
    return text[:place] + addition + text[place:]


def write(root: Path, name: str, axis: str) -> list[Path]:
    """Writes the files and lines of a method; returns what was touched.

    Raises:
        SystemExit: the name is no plain name, or is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise SystemExit(f"{name!r} must be small letters, digits and single hyphens, such as lora-ga")
    source, function, folder = root / "src" / "rankwise", name.replace("-", "_"), KINDS[axis][0]
    names = {"name": name, "function": function, "axis": axis, "title": name, "cls": "".join(part.capitalize() for part in name.split("-"))}
    module, test = source / folder / f"{function}.py", root / "tests" / f"test_{function}.py"
    recipes, methods, listed = source / "recipes.py", source / "methods.py", source / folder / "__init__.py"
    for path in (module, test):
        if path.exists():
            raise SystemExit(f"{path} is there already; choose another name")
    text = recipes.read_text(encoding="utf-8")
    if f'    "{name}": ' in text:
        raise SystemExit(f"{name!r} is a recipe already; choose another name")
    text = before(text, "RECIPES: dict[", RECIPE.format(**names))
    text = before(text, "}\n", f'    "{name}": {function},\n', after="RECIPES: dict[")
    new = {
        module: SKELETONS[axis].format(**names),
        test: TEST.format(**names),
        recipes: before(text, "from rankwise.recipe import", f"from rankwise.{folder} import {names['cls']}\n"),
        methods: before(methods.read_text(encoding="utf-8"), "\n}\n", "\n" + ABOUT.format(**names).rstrip("\n"), after="ABOUT: dict["),
        listed: registered(listed.read_text(encoding="utf-8"), axis, function, names["cls"]),
    }
    for path, content in new.items():
        path.write_text(content, encoding="utf-8")
    return list(new)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="of the recipe and the axis value, such as lora-ga")
    parser.add_argument("--axis", choices=sorted(KINDS), required=True, help="where the new value stands")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="the checkout; this one by default")
    given = parser.parse_args()
    for path in write(given.root, given.name, given.axis):
        print(path)
    print("next: ruff check --fix . && ruff format . (sorts the imports), then fill every TODO: see docs/adding-a-method.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
