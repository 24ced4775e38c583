"""doctor for adapters: diagnose a folder with its base at hand, and write it again with what can be repaired repaired."""

from pathlib import Path
from typing import Any

import torch

from rankwise.checkpoint.card import card, facts, put_card
from rankwise.checkpoint.diagnosis import Diagnosis, diagnose, mended
from rankwise.checkpoint.proof import logits_on, prompt_batches, prove, tolerance_of
from rankwise.checkpoint.servable import DTYPES, SIDECAR, about_base, padded, padded_rank, write_servable
from rankwise.checkpoint.served import as_served
from rankwise.checkpoint.weights import Weights
from rankwise.errors import ConfigError, RankwiseError
from rankwise.training.exporting import copy_tokenizer, refuse_existing
from rankwise.training.folder import write_json
from rankwise.training.models import check_weights, load_config_only, load_model, model_folder
from rankwise.training.use import about_adapter, adapter_folder
from rankwise.updates import Site


def check(adapter: str | Path, model: str | None = None) -> Diagnosis:
    """Diagnoses an adapter (or a run's) folder; with a base, its names, shapes and fingerprint too.

    Raises:
        ConfigError: the base cannot be read.
    """
    folder = _folder(adapter)
    if model is None:
        return diagnose(folder)
    base = model_folder(model)
    check_weights(base)
    about = about_adapter(folder) if folder.is_dir() else {"task": "text", "labels": None}
    weights = Weights(base)
    meta = load_config_only(base, about["task"], about["labels"])
    return diagnose(folder, meta, lambda sites: weights.fingerprint(meta, sites))


def _folder(adapter: str | Path) -> Path:
    try:
        return adapter_folder(adapter)
    except RankwiseError:
        return Path(adapter)  # what is missing there is for the diagnosis to say


def repair(found: Diagnosis, model: str | None, output: str | Path) -> str:
    """Writes a plain LoRA of what a folder holds: PEFT's names, one rank, lora_alpha = r, the scale in lora_B; loaded again and proven.

    Args:
        found: what `check` gave, with the base.
        model: the base.
        output: the new folder.

    Returns:
        What to print.

    Raises:
        ConfigError: no base, or an output that exists. CheckpointError: it cannot be repaired, or changes nothing.
    """
    from rankwise.checkpoint.atomic import write_folder

    output = Path(output)
    refuse_existing(output)
    cuts = mended(found)
    if model is None:
        raise ConfigError("a repair needs the base, to find its modules and to prove the result; give it with --model")
    kinds = {tensor.dtype for pair in found.pairs.values() for tensor in pair.values()}
    kind = kinds.pop() if len(kinds) == 1 and kinds <= set(DTYPES.values()) else torch.float32
    rank = padded_rank(max(cut.rank for cut in cuts.values()))
    task = about_adapter(found.folder)
    loaded = load_model(model, task["task"], task["labels"], "auto")
    modules = dict(loaded.model.named_modules())
    batches = prompt_batches(loaded.tokenizer)
    base_logits = logits_on(loaded.model, batches)
    with _summed(loaded.model, cuts):
        wanted = logits_on(loaded.model, batches)
    sites = [Site(name, "linear", cut.down.shape[1], cut.up.shape[0], cut.rank, 1.0) for name, cut in cuts.items()]
    about: dict[str, Any] = {
        "format": "lora",
        "base": about_base(loaded.model) | {"fingerprint": _fingerprint(modules, sites)},
        "method": {"name": "repair"},
        "exact": True,
        "sites": {name: {"rank": cut.rank, "kept": 1.0} for name, cut in cuts.items()},
    }
    with write_folder(output) as folder:
        write_servable(folder, loaded.model, {name: padded(cut, rank, kind) for name, cut in cuts.items()}, about)
        with as_served(loaded.model, folder) as served:
            again = logits_on(served, batches)
        proof = prove(again, wanted, base_logits, tolerance_of(kind, next(loaded.model.parameters()).dtype), "the repaired adapter")
        write_json(folder / SIDECAR, about | {"proof": proof.to_dict()})
        lines = [f"- {finding.text}" for finding in found.findings if finding.repair]
        text = card(facts(loaded.model), "peft", ["- repaired from another folder:", *lines], about["base"]["fingerprint"], rank=rank)
        put_card(folder, text)
        copy_tokenizer(found.folder, folder)
    return f"repaired into {output}: {len(cuts)} layers at rank {rank}\n{proof.text()}"


def _fingerprint(modules: dict[str, Any], sites: list[Site]) -> str:
    from rankwise.checkpoint.fingerprint import base_fingerprint

    return base_fingerprint(modules, sites)


def _summed(model: Any, cuts: dict[str, Any]) -> Any:
    """Within the block the model computes with the pairs as they were before they were padded and rounded."""
    from contextlib import ExitStack

    from rankwise.checkpoint.served import Added

    stack, modules = ExitStack(), dict(model.named_modules())
    device = next(model.parameters()).device
    for name, cut in cuts.items():
        handle = modules[name].register_forward_hook(Added(cut.down.to(device), cut.up.to(device), 1.0))
        stack.callback(handle.remove)
    return stack
