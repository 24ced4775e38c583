"""The model card: README.md of a folder, with the front matter that the Hub reads and how to load what lies there.

Only what is known is written: a base that lies in a local folder gets no Hub name, and what software cannot load is not said to load.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rankwise.checkpoint.atomic import write_file
from rankwise.recipe import Recipe

FILE = "README.md"
MARK = "<!-- written by rankwise -->"
PIPELINES = (("ForCausalLM", "text-generation"), ("LMHeadModel", "text-generation"), ("ForSequenceClassification", "text-classification"))


def hub_name(name: str | None) -> str | None:
    """A base's name if it is one of the Hub and not a local folder."""
    if not name or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or Path(name).expanduser().exists():
        return None
    return name


def facts(model: nn.Module) -> dict[str, Any]:
    """What a model says about itself: name and revision of its base, class, pipeline; as the card takes them."""
    plain = getattr(model, "_orig_mod", model)
    config = getattr(plain, "config", None)
    kind = type(plain).__name__
    return {
        "base": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "kind": kind,
        "pipeline": next((pipeline for ending, pipeline in PIPELINES if kind.endswith(ending)), None),
    }


def method_lines(recipe: Recipe, sites: Sequence[Any]) -> list[str]:
    """What was trained, as list items."""
    from rankwise.recipe import AXES

    ranks = sorted({site.rank for site in sites})
    axes = ", ".join(f"{axis} `{getattr(recipe, axis).name}`" for axis in AXES)
    scalings = sorted({round(site.scaling, 6) for site in sites})
    return [
        f"- method: `{recipe.name}` ({axes})",
        f"- rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}, scale {', '.join(f'{value:g}' for value in scalings[:4])}, "
        f"at {len(sites)} layers",
    ]


def scores_lines(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A table of scores before and after training."""
    rows = [
        f"| {name} | {score} | {before.get(name, {}).get(score, float('nan')):.4f} | {value:.4f} |"
        for name, each in after.items()
        for score, value in each.items()
        if isinstance(value, float) and score not in ("tokens", "rows")
    ]
    return ["| rows | score | base | with the adapter |", "|---|---|---|---|", *rows] if rows else []


def card(
    about: Mapping[str, Any],
    layout: str,
    method: Sequence[str],
    fingerprint: str | None = None,
    recipe_name: str = "lora",
    data: Sequence[str] = (),
    metrics: Sequence[str] = (),
    proof: Sequence[str] = (),
    rank: int | None = None,
) -> str:
    """The text of a card.

    Args:
        about: what `facts` gave.
        layout: 'peft' (PEFT loads it), 'native' (only rankwise does), 'merged' (an ordinary model folder) or 'gguf'.
        method: lines on how it was made.
        fingerprint: of the base.
        recipe_name: a tag.
        data, metrics, proof: lines, each left out where there are none.
        rank: of the LoRA, for vLLM's limit.
    """
    base, hub = about["base"], hub_name(about["base"])
    tags = [recipe_name, "rankwise"] + (["transformers"] if layout != "gguf" else ["gguf"])
    if layout != "merged":
        tags = ([f"base_model:adapter:{hub}"] if hub else []) + (["lora"] if "lora" not in tags and layout != "native" else []) + tags
    front: dict[str, Any] = {"library_name": {"merged": "transformers", "native": "rankwise", "gguf": "gguf"}.get(layout, "peft")}
    if hub:
        front["base_model"] = hub
    if about["pipeline"]:
        front["pipeline_tag"] = about["pipeline"]
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "tags:", *(f"- {tag}" for tag in tags), "---", MARK, ""]
    lines += [f"# {'Model' if layout == 'merged' else 'Adapter'} made with rankwise", ""]
    said = f"`{base}`" if hub else f"`{Path(base).name}` (a local folder)" if base else "not named by its configuration"
    lines += [f"- base: {said}, {about['kind']}" + (f", revision `{about['revision']}`" if about["revision"] else "")]
    lines += [f"- fingerprint of the base: `{fingerprint}`"] if fingerprint else []
    lines += [*method, "", "## How to load", "", *_loading(hub or "BASE", layout, about["kind"], rank)]
    for title, body in (("Data", data), ("Scores", metrics), ("Proof", proof)):
        lines += ["", f"## {title}", "", *body] if body else []
    lines += ["", "## Versions", "", ", ".join(f"{name} {version}" for name, version in _versions().items()), ""]
    return "\n".join(lines)


def _loading(base: str, layout: str, kind: str, rank: int | None) -> list[str]:
    auto = "AutoModelForSequenceClassification" if "SequenceClassification" in kind else "AutoModelForCausalLM"
    start = ["```python", f"from transformers import {auto}", ""]
    where = [] if base != "BASE" else ["`BASE` is the folder of the base model, `FOLDER` this one.", ""]
    if layout == "merged":
        text = [*start, f'model = {auto}.from_pretrained("FOLDER")', "```"]
        return [*text, *(["", "vLLM: `vllm serve FOLDER`"] if auto.endswith("CausalLM") else [])]
    if layout == "gguf":
        return ["llama.cpp, with the base converted by its `convert_hf_to_gguf.py`: `llama-cli -m base.gguf --lora adapter.gguf`"]
    own = ["```python", f"from transformers import {auto}", "import rankwise as rw", ""]
    own += [f'model = rw.load({auto}.from_pretrained("{base}"), "FOLDER")', "```"]
    if layout == "native":
        export = "For other software export it: `rankwise export FOLDER OUTPUT --format lora` (or `merged`)."
        return [*where, *own, "", f"PEFT, transformers and vLLM refuse this folder. {export}"]
    text = [*where, "PEFT:", "", "```python", "from peft import PeftModel", f"from transformers import {auto}", ""]
    text += [f'model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "FOLDER")', "```", "", "transformers:", "", *start]
    text += [f'model = {auto}.from_pretrained("{base}")', 'model.load_adapter("FOLDER")', "```", ""]
    if rank is None:
        return [*text, "vLLM and other servers: export it first, `rankwise export FOLDER OUTPUT --format lora`."]
    return [*text, f"vLLM: `vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter=FOLDER`"]


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    from rankwise import __version__

    found = {"rankwise": __version__}
    for name in ("torch", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def put_card(folder: Path, text: str, kept: Path | None = None) -> None:
    """Writes a card into a folder, unless somebody else's README stands there, or in the folder `kept` that it will replace."""
    for place in (folder, kept):
        path = None if place is None else place / FILE
        if path is not None and path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            return
    write_file(folder / FILE, text)
