"""What is wrong with an adapter folder of PEFT's layout, found in its files and, where the base is known, in the base's modules.

Nothing is loaded onto a model. A finding says what is so, what follows from it, and what to do; `mended` gives the pairs of what can be
repaired: names of modules, the scale, the rank.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rankwise.checkpoint.lowrank import Cut
from rankwise.checkpoint.peft_fields import LORA_DEFAULTS
from rankwise.checkpoint.peft_layout import NATIVE, PREFIX
from rankwise.checkpoint.saving import CONFIG, NATIVE_FILE, WEIGHTS
from rankwise.checkpoint.servable import RANKS, SIDECAR
from rankwise.errors import CheckpointError
from rankwise.matching import kind_of, widths_of
from rankwise.patterns import PatternError, expression
from rankwise.updates import Site

_FACTOR = re.compile(r"(?P<stem>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>\w+))?\.weight")


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    level: Literal["error", "warning", "note"]
    kind: str  # one word, for tests and scripts
    text: str
    repair: bool = False  # whether `mended` repairs it


@dataclass
class Diagnosis:
    """All that was found in a folder, and the pairs that it holds under the names that its keys have."""

    folder: Path
    findings: list[Finding] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # stem of the key, without PEFT's prefix -> A, B
    modules: dict[str, str] = field(default_factory=dict)  # stem -> module of the base, where that is known

    @property
    def healthy(self) -> bool:
        """Whether nothing worse than a note was found."""
        return all(finding.level == "note" for finding in self.findings)

    @property
    def broken(self) -> bool:
        """Whether something was found that makes it useless or wrong."""
        return any(finding.level == "error" for finding in self.findings)

    def add(self, level: Literal["error", "warning", "note"], kind: str, text: str, repair: bool = False) -> None:
        """Notes a finding."""
        self.findings.append(Finding(level, kind, text, repair))

    def text(self) -> str:
        """What the command prints."""
        if not self.findings:
            return f"{self.folder}: nothing wrong was found"
        lines = [f"{each.level}: {each.text}" + (" [--repair mends this]" if each.repair else "") for each in self.findings]
        return "\n".join([f"{self.folder}:", *lines])


def diagnose(folder: Path, base: nn.Module | None = None, fingerprint: Callable[[list[Site]], str] | None = None) -> Diagnosis:
    """Looks at an adapter folder.

    Args:
        folder: the folder.
        base: the base, for names and shapes; the meta device will do.
        fingerprint: of the base over sites, to be compared with what the folder says it stands on.
    """
    found = Diagnosis(folder)
    tensors = _files(found)
    if tensors is None:
        return found
    kind = found.config.get("peft_type")
    if kind == NATIVE:
        found.add("note", "native", "the method has no form in PEFT; only rankwise loads it: for servers, rankwise export")
    elif kind != "LORA":
        found.add("error", "type", f"peft_type is {kind!r}; servers take LORA: rankwise export, or merge it with PEFT")
    infinite = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if infinite:
        found.add("error", "nan", f"{len(infinite)} tensors hold values that are not finite, such as {infinite[0]}: take another")
    _base_matches(found, base, fingerprint)
    if kind == "LORA":
        _keys(found, tensors)
        _scale_and_rank(found)
        _dead(found)
        if base is not None:
            _modules(found, base)
    return found


def _files(found: Diagnosis) -> dict[str, Tensor] | None:
    folder = found.folder
    if not folder.is_dir():
        found.add("error", "missing", f"{folder} is no folder; give the one that holds {CONFIG}")
        return None
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        pickled = "; its weights are a pickle: save it with PEFT as safetensors" if (folder / "adapter_model.bin").is_file() else ""
        found.add("error", "missing", f"{', '.join(missing)} is missing, so nothing loads it{pickled}")
        return None
    try:
        found.config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(found.config, dict):
            raise ValueError("it holds no object")
        _check_types(found)
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, OSError, SafetensorError) as error:
        found.add("error", "unreadable", f"a file is truncated or broken ({error}); copy the folder again")
        return None
    if not tensors or (folder / WEIGHTS).stat().st_size < 200:
        found.add("error", "empty", f"{WEIGHTS} holds {len(tensors)} tensors: sharded parameters were not gathered when it was saved")
    return tensors


def _check_types(found: Diagnosis) -> None:
    """Values of a wrong type are found here once, and replaced by PEFT's defaults for the rest of the diagnosis."""
    for name, kinds in {"r": int, "lora_alpha": (int, float), "rank_pattern": dict, "alpha_pattern": dict}.items():
        value = found.config.get(name, LORA_DEFAULTS[name])
        numbers = value.values() if isinstance(value, dict) else [] if value is None else [value]
        fits = (value is None and kinds is dict) or isinstance(value, kinds)
        if not fits or not all(type(each) in (int, float) and math.isfinite(each) and each > 0 for each in numbers):
            found.add("error", "fields", f"{name} is {value!r}, which no loader takes; write it as PEFT does")
            found.config[name] = LORA_DEFAULTS[name]
    for pattern in found.config.get("alpha_pattern") or {}:
        try:
            expression(rf"(.*\.)?({pattern})$")
        except PatternError as error:
            found.add("error", "fields", f"alpha_pattern has {pattern!r}: {error}")


def _keys(found: Diagnosis, tensors: Mapping[str, Tensor]) -> None:
    groups: dict[str, list[str]] = {}
    adapters: set[str] = set()
    bare = 0
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match and tensor.dim() != 2:
            groups.setdefault("shape", []).append(key)
        elif match:
            stem = match["stem"]
            bare += not stem.startswith(PREFIX)
            adapters |= {match["adapter"]} if match["adapter"] else set()
            found.pairs.setdefault(stem.removeprefix(PREFIX), {})[match["side"]] = tensor
        elif "lora_magnitude_vector" in key:
            groups.setdefault("magnitude", []).append(key)
        elif "lora_embedding_" in key or key.endswith("base_layer.weight"):
            groups.setdefault("embedding", []).append(key)
        elif "token_adapter" in key or "trainable_tokens" in key:
            groups.setdefault("tokens", []).append(key)
        elif key.endswith("lora_B.bias"):
            groups.setdefault("bias", []).append(key)
        else:
            groups.setdefault("full", []).append(key)
    said = {
        "magnitude": "hold DoRA's magnitudes, which servers refuse or drop: rankwise export --energy, or --format merged",
        "embedding": "adapt an embedding, which servers refuse or skip: rankwise export --format merged",
        "tokens": "train single tokens, which servers refuse: merge it with PEFT",
        "shape": "are factors, and no matrices: save it again",
        "bias": "are biases of lora_B, which servers drop: merge it with PEFT",
        "full": "are no factors (modules_to_save and the like), which servers refuse: rankwise export --format merged",
    }
    for group, keys in groups.items():
        found.add("error", group, f"{len(keys)} tensors {said[group]}; the first is {keys[0]}")
    halves = [stem for stem, pair in found.pairs.items() if set(pair) != {"A", "B"}]
    if halves:
        found.add("error", "half", f"{len(halves)} layers have only one of lora_A and lora_B, such as {halves[0]}; save it again")
    if bare:
        found.add("error", "prefix", f"{bare} keys do not begin with {PREFIX!r}: PEFT only warns and computes the base", repair=True)
    if adapters:
        found.add("error", "prefix", f"keys hold the adapter's name ({', '.join(sorted(adapters))}), which no loader expects", repair=True)
    if not found.pairs:
        found.add("error", "empty", "there is no lora_A or lora_B in the file")


def _scale_and_rank(found: Diagnosis) -> None:
    config = found.config
    if config.get("use_rslora"):
        found.add("warning", "rslora", "use_rslora: several servers divide alpha by r, not by its root: too weak", repair=True)
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            found.add("warning", name, f"{name}: servers read one rank and one alpha for all layers and drop it silently", repair=True)
    if config.get("use_dora"):
        found.add("error", "magnitude", "use_dora: servers refuse it or drop the magnitudes: rankwise export --energy, or --format merged")
    unknown = sorted(name for name in config if name not in LORA_DEFAULTS)
    if unknown:
        found.add("warning", "fields", f"{CONFIG} has fields that PEFT may refuse: {', '.join(unknown)}", repair=True)
    ranks = sorted({len(pair["A"]) for pair in found.pairs.values() if "A" in pair})
    stated = config.get("r")
    if not config.get("rank_pattern") and ranks and ranks != [stated]:
        found.add("error", "rank", f"the tensors have rank {', '.join(map(str, ranks))}, and r is {stated!r}", repair=True)
    if len(ranks) > 1:
        found.add("warning", "ranks", f"ranks differ from layer to layer ({ranks[0]} to {ranks[-1]}); servers take one", repair=True)
    elif ranks and ranks[0] not in RANKS and ranks[0] < RANKS[-1]:
        found.add("note", "ranks", f"rank {ranks[0]} needs a --max-lora-rank of the list {', '.join(map(str, RANKS))}", repair=True)
    if ranks and ranks[-1] > RANKS[-1]:
        found.add("error", "ranks", f"rank {ranks[-1]} is more than servers accept ({RANKS[-1]}): rankwise export --rank {RANKS[-1]}")


def _dead(found: Diagnosis) -> None:
    whole = {stem: pair for stem, pair in found.pairs.items() if set(pair) == {"A", "B"}}
    dead = [stem for stem, pair in whole.items() if not bool(pair["A"].any()) or not bool(pair["B"].any())]
    if whole and len(dead) == len(whole):
        found.add("error", "dead", "every lora_B (or lora_A) is zero: the adapter changes nothing; no gradient has reached it")
    elif dead:
        found.add("warning", "dead", f"{len(dead)} of {len(whole)} layers are zero and change nothing, such as {dead[0]}", repair=True)


def _modules(found: Diagnosis, base: nn.Module) -> None:
    """Finds each key's module, by its whole name or by what it ends with, and compares shapes."""
    layers = {name: module for name, module in base.named_modules() if name and kind_of(module) in ("linear", "conv1d", "opaque")}
    lost: list[str] = []
    for stem, pair in found.pairs.items():
        if stem in layers:
            found.modules[stem] = stem
            continue
        parts = stem.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts))]
        candidates = next(
            (hits for ending in endings if "." in ending and (hits := [n for n in layers if n == ending or n.endswith("." + ending)])), []
        )
        shapes = (pair["A"].shape[1], pair["B"].shape[0]) if set(pair) == {"A", "B"} else None
        fitting = [name for name in candidates if shapes is None or widths_of(layers[name]) == shapes]
        if len(fitting) == 1 and fitting[0] not in found.pairs:
            found.modules[stem] = fitting[0]
            continue
        lost.append(stem)
    moved = [stem for stem, module in found.modules.items() if stem != module]
    if moved:
        first = f"{moved[0]} is {found.modules[moved[0]]}"
        found.add("error", "prefix", f"{len(moved)} keys match no module of this base by their whole name, such as {first}", repair=True)
    if lost:
        found.add("error", "unmatched", f"{len(lost)} keys match no module of this base, such as {lost[0]}; is it the right base?")
    for stem, module in found.modules.items():
        pair = found.pairs[stem]
        if set(pair) == {"A", "B"} and (pair["A"].shape[1], pair["B"].shape[0]) != widths_of(layers[module]):
            here, wanted = (pair["A"].shape[1], pair["B"].shape[0]), widths_of(layers[module])
            found.add("error", "shape", f"{module} maps {wanted[0]} to {wanted[1]}, and the adapter {here[0]} to {here[1]}: another base")
            return


def _base_matches(found: Diagnosis, base: nn.Module | None, fingerprint: Callable[[list[Site]], str] | None) -> None:
    """Compares the fingerprint that the folder states with that of the base given."""
    stated, names = None, []
    for file in (NATIVE_FILE, SIDECAR):
        path = found.folder / file
        if path.is_file():
            try:
                about = json.loads(path.read_text(encoding="utf-8"))
                stated, names = about["base"]["fingerprint"], [str(name) for name in about["sites"]]
            except (ValueError, KeyError, TypeError):
                found.add("error", "unreadable", f"{file} is broken; copy the folder again")
                return
    if base is None:
        found.add("note", "base", "give the base with --model to check names, shapes and whether it is the right one")
        return
    if stated is None:
        found.add("note", "base", "the folder does not say which weights it was trained on, so only names and shapes can be compared")
        return
    modules = dict(base.named_modules())
    if fingerprint is None or any(name not in modules for name in names):
        return
    sites = [Site(name, kind_of(modules[name]) or "linear", *widths_of(modules[name]), 0, 1.0) for name in names]
    here = fingerprint(sites)
    if here != stated:
        found.add("error", "base", f"it was trained on another base: fingerprint {str(stated)[:16]}, and this one has {here[:16]}")


def scale_of(config: Mapping[str, Any], stem: str, rank: int) -> float:
    """alpha / rank (or its root) of one layer, by PEFT's rule: a pattern is an expression for the end of a name; the first that fits."""
    alpha: float = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if expression(rf"(.*\.)?({pattern})$").match(stem):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def mended(found: Diagnosis) -> dict[str, Cut]:
    """Module of the base -> pair with its scale folded in; layers that change nothing are left out.

    Raises:
        CheckpointError: something was found that cannot be repaired, or the base is not known.
    """
    stuck = [finding for finding in found.findings if finding.level == "error" and not finding.repair]
    if stuck:
        raise CheckpointError(f"{found.folder} cannot be repaired: {stuck[0].text}")
    if set(found.modules) != set(found.pairs):
        raise CheckpointError("a repair needs the base, to find its modules and to prove the result; give it with --model")
    cuts: dict[str, Cut] = {}
    for stem, pair in found.pairs.items():
        down, up = pair["A"].float(), pair["B"].float()
        if bool(down.any()) and bool(up.any()):
            cuts[found.modules[stem]] = Cut(down, up * scale_of(found.config, stem, len(down)), 1.0)
    return cuts
