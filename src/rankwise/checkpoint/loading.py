"""load: an adapter folder, ours or PEFT's, onto a base. Everything is checked before the base is touched; nothing is ever unpickled."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rankwise.adapting import build, shared_part
from rankwise.checkpoint.atomic import recover, unfinished
from rankwise.checkpoint.fingerprint import base_fingerprint, forecast_fingerprint
from rankwise.checkpoint.json_text import read_object
from rankwise.checkpoint.peft_fields import DEFAULTS
from rankwise.checkpoint.peft_layout import NATIVE, PREFIX, decode, gate_keys, is_stacked, pool_keys, shapes
from rankwise.checkpoint.peft_reader import understand
from rankwise.checkpoint.saving import CONFIG, FORMAT_VERSION, NATIVE_FILE, WEIGHTS, checksum
from rankwise.errors import CheckpointError, RecipeError, TargetError
from rankwise.importance import Importance
from rankwise.patterns import PatternError
from rankwise.planning import Plan, plan
from rankwise.recipe import Recipe
from rankwise.record import Stored
from rankwise.routing import Block
from rankwise.sites import trained_modules
from rankwise.updates import UPDATES


@dataclass(frozen=True)
class _Opened:
    """A folder, understood but not yet checked tensor by tensor."""

    folder: Path
    peft_type: str
    recipe: Recipe
    plan: Plan
    tensors: dict[str, Tensor]
    checksum: str | None  # of VeRA's pair, where the file says it
    with_projections: bool
    notes: tuple[str, ...]
    rounds: Mapping[str, int] = field(default_factory=dict)  # site -> rounds in its ledger


def load(base: nn.Module, folder: str | Path, any_base: bool = False, tasks: int | None = None) -> nn.Module:
    """Puts a saved adapter on its base, in place, and returns the adapted model.

    On the same base the model computes bit for bit what it did when it was saved; factors and starts come from the file, so no
    decomposition is run. Folders that PEFT wrote (LoRA and its kin, DoRA, VeRA, AdaLoRA) load too
    (docs/peft.md).

    Args:
        base: the model that the adapter was trained on, not adapted. It is not touched when an error is raised.
        folder: what `save` or PEFT's save_pretrained wrote; a local path.
        any_base: load onto a base whose weights differ from those the adapter was trained on.
        tasks: of an adapter with a LoRA per task (AM-LoRA) only those of the first tasks, as after them. What trains in full, such as a
            classifier's head, is that of the end.

    Raises:
        CheckpointError: no such folder, a file that is missing, truncated or unknown, tensors that are missing, unexpected, wrong-shaped
            or not finite, another base, a method that is unknown here.
    """
    folder = Path(folder)
    recover(folder)
    _check_folder(folder)
    config = read_object(folder / CONFIG)
    tensors = _read_tensors(folder)
    with _explained(folder):
        opened = _open_own(base, folder, config, tensors, any_base) if os.path.lexists(folder / NATIVE_FILE) else None
        opened = opened or _open_peft(base, folder, config, tensors)
        expected, heads, pool = _expected(base, opened)
        _check_tensors(opened, expected)
        _check_unexpected(opened, expected)
        _check_kinds(base, opened, heads)
    recipe, made = opened.recipe, opened.plan
    stored = {site.name: decode(site, recipe, opened.peft_type, opened.tensors) for site in made.sites}
    if tasks is not None:
        made, stored = _first_tasks(opened, stored, tasks)
    gates = {block.name: _gate(block, opened) for block in made.blocks}
    model = build(base, recipe, made, stored, pool, gates=gates)
    for name, module in trained_modules(model).items():
        module.trained.load_state_dict({key: opened.tensors[full] for key, full in heads[name].items()})
    model.rankwise.notes.extend(opened.notes)  # pyright: ignore
    return model


def _first_tasks(opened: _Opened, stored: dict[str, Stored], tasks: int) -> tuple[Plan, dict[str, Stored]]:
    made = opened.plan
    there = min(site.experts for site in made.sites)
    if not opened.recipe.update.grows or not 1 <= tasks <= there:
        raise CheckpointError(f"tasks={tasks}: the adapter in {opened.folder} holds the LoRAs of {there} tasks; give one of 1 to {there}")
    choice = opened.recipe.update
    found = {site.name: replace(stored[site.name], update=choice.first(site, stored[site.name].update, tasks)) for site in made.sites}
    return made.grown({site.name: tasks for site in made.sites}), found


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turns errors of planning into errors of the checkpoint: they say that the adapter does not fit this base."""
    try:
        yield
    except (TargetError, RecipeError) as error:
        raise CheckpointError(f"the adapter in {folder} does not fit this model: {error}") from error


# --- files -----------------------------------------------------------------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        left = unfinished(folder)
        hint = f"; a save that was killed before its end left {left}, which is incomplete" if left and not folder.exists() else ""
        raise CheckpointError(f"{folder} {what}{hint}; give the folder that holds {CONFIG} (adapters are never downloaded)")
    pickled = folder / "adapter_model.bin"
    if not (folder / WEIGHTS).exists() and pickled.exists():
        raise CheckpointError(f"{pickled} is a pickle, which is never loaded; load it with PEFT and save_pretrained it as safetensors")
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if inside and not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder} holds no {CONFIG}, and its sub-directories {', '.join(inside)} do: PEFT saves an adapter of another name than "
            f"'default' there; give one of them, such as {folder / inside[0]}"
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}: the adapter is incomplete; copy or save the whole folder again")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError, RuntimeError) as error:  # also dtypes that torch lacks
        raise CheckpointError(
            f"{folder / WEIGHTS} is truncated or no safetensors file ({error}); copy or save the adapter again"
        ) from error


# --- what kind of folder ---------------------------------------------------------------------------------------------------------------


def _open_own(base: nn.Module, folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], any_base: bool) -> _Opened:
    about = read_object(folder / NATIVE_FILE)
    version = about.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / NATIVE_FILE} has format_version={version!r}, and this version reads {FORMAT_VERSION}; it was written by rankwise "
            f"{about.get('rankwise_version', 'of an unknown version')}: use that one or a newer one"
        )
    _check_fields(folder / NATIVE_FILE, about)
    peft_type = about["peft_type"]
    known = sorted({NATIVE, *(choice.peft_type for choice in UPDATES.values() if choice.peft_type)})
    if peft_type not in known:
        raise CheckpointError(f"{folder / NATIVE_FILE} has peft_type={peft_type!r}, which is unknown; use {', '.join(known)}")
    if config.get("peft_type") != peft_type:
        raise CheckpointError(
            f"{CONFIG} says peft_type={config.get('peft_type')!r} and {NATIVE_FILE} says {peft_type!r}: {folder} holds files of two "
            f"adapters; save again, or remove {NATIVE_FILE} if PEFT wrote the others"
        )
    try:
        recipe = Recipe.from_dict(about["recipe"])
    except (RecipeError, TargetError) as error:
        raise CheckpointError(f"{folder / NATIVE_FILE}: {error}; it may come from a newer version of rankwise") from error
    start = None if not recipe.moves_base else "stacked" if is_stacked(recipe, peft_type) else "separate"
    if about["start"] != start:
        raise CheckpointError(
            f"{folder / NATIVE_FILE} has start={about['start']!r}, and its recipe needs {start!r}; save the adapter again"
        )
    made = _with_saved_owners(_with_saved_ranks(plan(base, recipe, trained=True), about, len(tensors)), about, folder / NATIVE_FILE)
    _compare_plan(made, about)
    _compare_base(base, made, about, any_base)
    with_projections = any(key.startswith(("base_model.vera_", "base_model.pool.")) for key in tensors)
    rounds = {name: site["rounds"] for name, site in about["sites"].items() if type(site.get("rounds")) is int and site["rounds"] >= 0}
    return _Opened(folder, peft_type, recipe, made, tensors, about["pool_checksum"], with_projections, (), rounds)


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "peft_type": str, "recipe": dict, "base": dict, "sites": dict, "modules_to_save": list, "start": (str, type(None)),
    "pool_checksum": (str, type(None)), "notes": list,
}  # fmt: skip


def _check_fields(path: Path, about: Mapping[str, Any]) -> None:
    missing = [name for name in _FIELDS if name not in about]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; copy or save the adapter again")
    for name, kind in _FIELDS.items():
        if not isinstance(about[name], kind):
            wanted = kind.__name__ if isinstance(kind, type) else "string or null"
            raise CheckpointError(f"{path}: {name} must be a {wanted}, and is {about[name]!r}; copy or save the adapter again")
    if not all(isinstance(site, dict) for site in about["sites"].values()):
        raise CheckpointError(f"{path}: sites must be a dict of dicts; copy or save the adapter again")
    if not all(isinstance(name, str) for name in about["modules_to_save"]):
        raise CheckpointError(f"{path}: modules_to_save={about['modules_to_save']!r} must be names; copy or save the adapter again")


def _with_saved_ranks(made: Plan, about: Mapping[str, Any], most: int) -> Plan:
    """The plan with the ranks that a schedule has left, and the experts it has added, at most as many as there are tensors in the file;
    `_compare_plan` refuses any other difference."""
    if made.recipe.update.grows:
        saved = {site.name: about["sites"].get(site.name, {}).get("experts", 1) for site in made.sites}
        made = made.grown(
            {site.name: count for site in made.sites if type(count := saved[site.name]) is int and site.experts < count <= most}
        )
    if not made.recipe.schedule.changes_ranks:
        return made
    saved = {site.name: about["sites"].get(site.name, {}).get("rank") for site in made.sites}
    return made.resized({site.name: rank for site in made.sites if type(rank := saved[site.name]) is int and 0 <= rank < site.rank})


def _with_saved_owners(made: Plan, about: Mapping[str, Any], path: Path) -> Plan:
    """The plan with the sites that were allocated an update, and whose; any other difference is for `_compare_plan` to refuse."""
    owners = {site.name: str(owner) for site in made.sites if (owner := about["sites"].get(site.name, {}).get("owner"))}
    if "importance" not in about:
        return made.allocated(owners) if owners else made
    try:
        importance = Importance.from_dict(about["importance"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: importance is broken ({error!r}); copy or save the adapter again") from error
    measured = {site.site for site in importance.sites}
    removed = [site.name for site in made.sites if site.name in measured and site.name not in about["sites"]]
    return made.allocated(owners, removed, importance)


def _compare_plan(made: Plan, about: Mapping[str, Any]) -> None:
    sites, here = about["sites"], {site.name: site for site in made.sites}
    heads = [name for name, _ in made.trained_modules]
    for label, saved, found in (("sites", list(sites), list(here)), ("modules_to_save", about["modules_to_save"], heads)):
        for name in sorted(set(saved) - set(found)):
            raise CheckpointError(
                f"the adapter has {name} among its {len(saved)} {label}, which this base lacks; load the base it was made for"
            )
        for name in sorted(set(found) - set(saved)):
            raise CheckpointError(
                f"this base has {name}, which is not among the adapter's {len(saved)} {label}; load the base it was made for"
            )
    for name, site in here.items():
        for label, value in (("rank", site.rank), ("scaling", site.scaling), ("experts", site.experts)):
            if (found := sites[name].get(label, 1 if label == "experts" else None)) != value:
                raise CheckpointError(f"{name}: {label}={found!r} in the adapter, {value!r} by its recipe; save it again")


def _compare_base(base: nn.Module, made: Plan, about: Mapping[str, Any], any_base: bool) -> None:
    saved, found = about["base"].get("fingerprint"), base_fingerprint(dict(base.named_modules()), made.sites)
    held = about["base"].get("held")
    if any_base or found in (saved, held):
        return
    # trained on the 4-bit form of this base, loaded as such
    if held is not None and forecast_fingerprint(dict(base.named_modules()), made) == held:
        return
    name, here = about["base"].get("name_or_path"), getattr(getattr(base, "config", None), "_name_or_path", None)
    raise CheckpointError(
        f"the adapter was trained on another base: {name or 'unnamed'} with fingerprint {str(saved)[:16]}, and this one is "
        f"{here or 'unnamed'} with {found[:16]}; load that base, or pass any_base=True to use this one all the same"
    )


def _open_peft(base: nn.Module, folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> _Opened:
    peft_type = config.get("peft_type")
    if peft_type == NATIVE:
        raise CheckpointError(f"{folder} holds no {NATIVE_FILE}: the adapter is incomplete; copy or save the whole folder again")
    if not isinstance(peft_type, str) or peft_type not in DEFAULTS:
        raise CheckpointError(
            f"{folder / CONFIG} has peft_type={peft_type!r}, and of PEFT's types {', '.join(DEFAULTS)} are read here; merge it with PEFT "
            "(merge_and_unload) and use the merged model as the base"
        )
    try:
        found = understand(config, base, tensors)
    except PatternError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}; write it as PEFT does") from error
    except (TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG} has a value of the wrong type ({error}); write it as PEFT does") from error
    made = plan(base, found.recipe, trained=True).resized(found.ranks)
    tensors = found.complete(base, made.sites)
    with_projections = peft_type == "VERA" and bool(config.get("save_projection", True))
    notes = (f"loaded from a folder of PEFT, {folder}", *found.notes)
    return _Opened(folder, found.peft_type, found.recipe, made, tensors, None, with_projections, notes)


# --- tensors ---------------------------------------------------------------------------------------------------------------------------


def _expected(base: nn.Module, opened: _Opened) -> tuple[dict[str, tuple[int, ...]], dict[str, dict[str, str]], Any]:
    """(key -> shape of a complete file, head -> its keys -> those in the file, the shared pool with the file's projections)."""
    expected: dict[str, tuple[int, ...]] = {}
    for site in opened.plan.sites:
        expected |= shapes(site, opened.recipe, opened.peft_type, opened.rounds.get(site.name, 0))
    for block in opened.plan.blocks:
        slots = opened.recipe.routing.slots(block)
        expected |= {key: slots[name].shape for name, key in gate_keys(block.name, slots).items()}
    heads: dict[str, dict[str, str]] = {}
    for name, _ in opened.plan.trained_modules:
        state = base.get_submodule(name).state_dict()
        heads[name] = {key: f"{PREFIX}{name}.{key}" for key in state}
        expected |= {f"{PREFIX}{name}.{key}": tuple(tensor.shape) for key, tensor in state.items()}
    _check_tensors(opened, expected)  # before memory is taken for the pool, whose size follows from ranks that the file only claims
    pool: Any = shared_part(base, opened.recipe, opened.plan)
    if pool is not None:
        projections = pool.projections()
        if opened.with_projections:
            keys = pool_keys(opened.peft_type, projections)
            expected |= {keys[name]: tuple(tensor.shape) for name, tensor in projections.items()}
            if all(key in opened.tensors and opened.tensors[key].shape == expected[key] for key in keys.values()):
                projections = {name: opened.tensors[key] for name, key in keys.items()}
                pool.take(**projections)
        if opened.checksum is not None and checksum(projections) != opened.checksum:
            raise CheckpointError(
                f"the shared projections of {opened.folder} have another checksum than when the adapter was saved: this version of "
                "torch draws other numbers from the seed, or the file was changed; where it was trained, save the adapter again with "
                "save_projection=True"
            )
    return expected, heads, pool


def _gate(block: Block, opened: _Opened) -> dict[str, Tensor]:
    """Slot name -> tensor, of the gate of one block."""
    return {name: opened.tensors[key] for name, key in gate_keys(block.name, opened.recipe.routing.slots(block)).items()}


def _check_tensors(opened: _Opened, expected: Mapping[str, tuple[int, ...]]) -> None:
    file = opened.folder / WEIGHTS
    missing = [key for key in expected if key not in opened.tensors]
    if missing:
        raise CheckpointError(f"{file} lacks {len(missing)} tensors, such as {missing[0]}; copy or save the adapter again")
    for key, shape in expected.items():
        tensor = opened.tensors[key]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{file}: {key} has shape {tuple(tensor.shape)}, and this base needs {shape}; load the base it was made for"
            )
        if tensor.dtype in _FLOATS and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{file}: {key} is not finite; the run that wrote it had failed: take an earlier checkpoint")


def _check_unexpected(opened: _Opened, expected: Mapping[str, tuple[int, ...]]) -> None:
    file = opened.folder / WEIGHTS
    unexpected = [key for key in opened.tensors if key not in expected]
    if unexpected:
        raise CheckpointError(
            f"{file} holds {len(unexpected)} tensors that nothing here takes, such as {unexpected[0]}; is it the right base?"
        )


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_kinds(base: nn.Module, opened: _Opened, heads: Mapping[str, Mapping[str, str]]) -> None:
    """All tensors are floats of a kind that adapters are held in, but those of modules that hold others themselves."""
    own = {full: base.get_submodule(name).state_dict()[key].dtype for name, keys in heads.items() for key, full in keys.items()}
    for key, tensor in opened.tensors.items():
        here = own.get(key, torch.float32)
        if tensor.dtype != here and not (tensor.dtype in _FLOATS and here in _FLOATS):
            raise CheckpointError(
                f"{opened.folder / WEIGHTS}: {key} is {tensor.dtype}, and must be a float of 16, 32 or 64 bits"
                + ("" if here in _FLOATS else f" or {here}")
                + "; copy or save the adapter again"
            )
