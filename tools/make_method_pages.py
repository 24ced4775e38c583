"""Writes the made part of docs/methods/NAME.md for every recipe: what `rankwise methods NAME` says, as a page.

usage: python tools/make_method_pages.py [--check]      --check writes nothing and exits 1 where a page is missing or stale

What stands outside of the two marks is written by hand and stays.
"""

import inspect
import re
import sys
from pathlib import Path

from rankwise.methods import ABOUT, paper
from rankwise.recipe import AXES
from rankwise.recipes import RECIPES

PAGES = Path(__file__).parent.parent / "docs" / "methods"
BEGIN, END = "<!-- made by tools/make_method_pages.py -->", "<!-- end of the made part -->"


def made_part(name: str) -> str:
    """The part of a page that follows from the code: three sentences, paper, axes, options."""
    about, recipe = ABOUT[name], RECIPES[name]()
    number = re.search(r"arXiv ([\d.]+)", paper(name))
    link = f"[{paper(name)}](https://arxiv.org/abs/{number[1]})" if number else paper(name)
    lines = [BEGIN, "", about.what, about.when, f"Cost: {about.cost[0].lower()}{about.cost[1:]}", "", f"Paper: {link}.", ""]
    lines += ["| axis | choice |", "|---|---|"]
    for axis in AXES:
        lines.append(f"| {axis} | `{getattr(recipe, axis).name}` |")
    if recipe.frozen:
        lines.append(f"| frozen roles | {', '.join(f'`{role}`' for role in sorted(recipe.frozen))} |")
    alpha = recipe.alpha_of(recipe.rank)
    scaled = f", alpha {alpha:g}" if recipe.update.scaled else ""
    lines += ["", f"Rank {recipe.rank}{scaled}, dropout {recipe.dropout:g}, learning rate {recipe.lr:g} (worth searching: "]
    lines[-1] += f"{recipe.lr_bracket[0]:g} to {recipe.lr_bracket[1]:g}) unless the configuration says otherwise."
    own = [item for key, item in inspect.signature(RECIPES[name]).parameters.items() if key != "fields"]
    if own:
        lines += ["", "| option under `method` | default | values |", "|---|---|---|"]
        lines += [f"| `{item.name}` | `{item.default!r}` | {_values(item.annotation)} |" for item in own]
    return "\n".join([*lines, "", END])


def _values(annotation: object) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
    return text.replace("|", "or")


def page(name: str, was: str | None) -> str:
    """The whole page: the made part renewed, or put below the title where it is not there yet."""
    if was is None:
        return f"# `{name}`\n\n{made_part(name)}\n"
    if BEGIN in was:
        head, _, rest = was.partition(BEGIN)
        return head + made_part(name) + rest.partition(END)[2]
    title, _, rest = was.partition("\n")
    return f"{title}\n\n{made_part(name)}\n\n{rest.lstrip()}"


def main() -> int:
    stale = 0
    for name in RECIPES:
        path = PAGES / f"{name}.md"
        was = path.read_text(encoding="utf-8") if path.is_file() else None
        now = page(name, was)
        if now != was:
            stale += 1
            print(f"{path.name} is {'missing' if was is None else 'stale'}")
            if "--check" not in sys.argv:
                path.write_text(now, encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
