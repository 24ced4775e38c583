"""The documentation tells the truth: every recipe has its page, the made parts are fresh, and what the pages show runs."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import llama, token_ids

from rankwise.recipes import RECIPES
from rankwise.training.config import make_config, resolve

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


def test_every_recipe_has_a_page_whose_made_part_is_fresh() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "make_method_pages.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run python tools/make_method_pages.py"
    assert {path.stem for path in PAGES} == set(RECIPES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_a_page_shows_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    configurations, scripts = blocks(path, "yaml"), blocks(path, "python")
    assert configurations, "a page shows a configuration"
    assert scripts, "a page shows a script"
    for text in configurations:
        plain = yaml.safe_load(text)
        assert resolve(make_config(plain)).name == path.stem
    ids = token_ids(rows=4, length=9)
    for text in scripts:
        names: dict[str, Any] = {"model": llama(hidden_size=64), "batch": {"input_ids": ids, "labels": ids}}
        exec(compile(text, str(path), "exec"), names)


def test_links_between_pages_lead_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")]:
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)  # code has brackets of its own
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
