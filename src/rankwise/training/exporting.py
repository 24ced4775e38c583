"""export: an adapter to where it is served, loaded again and compared with the trained model before anything stands at the output.

lora        a plain LoRA of one rank that every server loads (`checkpoint/servable.py`)
peft        what `save` writes
merged      an ordinary model folder
gguf-lora   a LoRA for llama.cpp
"""

import copy
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankwise.checkpoint.card import card, facts, method_lines, put_card
from rankwise.checkpoint.proof import (
    Batch,
    Proof,
    batches_of,
    difference,
    logits_on,
    prompt_batches,
    prove,
    tolerance_of,
    vocabulary_batches,
)
from rankwise.checkpoint.servable import DTYPES, Pairs, about_base, padded, padded_rank, pairs_of, write_servable
from rankwise.errors import CheckpointError, ConfigError, TargetError, nearest
from rankwise.routing.static import Mixture, mean_mixture
from rankwise.sites import adapted_sites
from rankwise.training.folder import RunFolder, run_of
from rankwise.training.models import Loaded, load_model
from rankwise.training.use import Opened, adapter_folder, open_adapter

Format = Literal["lora", "peft", "merged", "gguf-lora"]
FORMATS = ("lora", "peft", "merged", "gguf-lora")
#: files of a tokenizer; an adapter's own stand above its base's
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and how it was proven."""

    folder: Path
    format: str
    dtype: str
    proof: Proof
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """What the command prints."""
        return "\n".join([f"exported to {self.folder} ({self.format}, {self.dtype})", *self.notes, self.proof.text()])


def export(
    source: str | Path | nn.Module,
    output: str | Path,
    format: Format = "lora",
    base: str | nn.Module | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    static: bool = False,
    tokenizer: Any = None,
) -> Exported:
    """Writes an adapter in the form that other software takes, loads that again, and compares it with the trained model.

    Args:
        source: folder of an adapter or of a run; or an adapted model, of which a copy is made.
        output: the new folder.
        format: 'lora', 'peft', 'merged' or 'gguf-lora'.
        base: the base: its folder or name where the training did not note it, or the model itself, of which a
            copy is made.
        rank, energy: for 'lora' and 'gguf-lora': cut each site to a rank, or to as many as keep this part of its squared norm. Needed where
            the change is not of low rank; on request elsewhere.
        dtype: 'fp32', 'bf16' or 'fp16' of the weights written; None takes the base's own (fp32 for 'peft').
        static: hold gates that depend on the input still, at their mean over the rows of the proof: an approximation.
        tokenizer: for the prompts of the proof where `base` or `source` is a model; without one, rows of ids are taken.

    Raises:
        ConfigError: an unknown format or dtype, an output that exists, options that the format does not take.
        CheckpointError: the adapter does not fit the format (with the remedy), changes nothing, or the proof fails; nothing is left at the
            output then.
    """
    output = _checked(output, format, rank, energy, dtype, static)
    if format == "merged":
        from rankwise.training.use import merge

        if isinstance(source, nn.Module) or isinstance(base, nn.Module):
            raise ConfigError("format='merged' is written from an adapter's folder and a base's folder; save the adapter first")
        done = merge(source, output, base, dtype)
        return Exported(output, format, done["dtype"], done["proof"])
    return _written(_opened(source, base, tokenizer), output, format, rank, energy, dtype, static)


def _checked(output: str | Path, format: str, rank: int | None, energy: float | None, dtype: str | None, static: bool) -> Path:
    output = Path(output)
    if format not in FORMATS:
        raise ConfigError(f"format={format!r} is unknown; use {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown; use {', '.join(DTYPES)}")
    if format in ("peft", "merged") and (rank is not None or energy is not None):
        raise ConfigError(f"rank and energy cut the update of a plain LoRA; format={format!r} writes it whole: leave them out")
    if format in ("peft", "merged") and static:
        raise ConfigError(f"static=True holds a mixture's gates still for a plain LoRA; format={format!r} has no use for it: leave it out")
    if format == "peft" and dtype not in (None, "fp32"):
        raise ConfigError(f"dtype={dtype!r}: format='peft' holds the masters, which are fp32; use format='lora' for a narrower file")
    refuse_existing(output)
    return output


def refuse_existing(output: Path) -> None:
    """Raises ConfigError where something is at the output already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output {output} exists; choose a new folder")


@dataclass
class _Work:
    """An adapted model, what it is compared on, and how to get its base back."""

    model: Any
    batches: list[Batch]
    loaded: Loaded | None = None
    adapter: Path | None = None
    task: str = "text"
    labels: list[str] | None = None
    run: RunFolder | None = None


def _opened(source: str | Path | nn.Module, base: str | nn.Module | None, tokenizer: Any) -> _Work:
    import rankwise as rw

    if isinstance(source, nn.Module):
        if base is not None:
            raise ConfigError("base is known where the source is an adapted model; leave it out")
        # the caller's parameters stay the ones that their optimizer knows; the proof takes the adapters off a copy
        own = copy.deepcopy(source)
        if any(module.merged for module in adapted_sites(own).values()):
            rw.unmerge(own)
        return _Work(own, _prompts(source, tokenizer))
    if isinstance(base, nn.Module):
        folder = adapter_folder(source)
        # a start that is folded into the base comes out of it again only to rounding: not on the caller's model
        own = rw.load(copy.deepcopy(base), folder)
        return _Work(own, _prompts(base, tokenizer), adapter=folder, run=run_of(folder))
    opened = open_adapter(source, base)
    run = run_of(opened.adapter)
    return _Work(opened.model, proof_batches(opened), opened.loaded, opened.adapter, opened.task, opened.labels, run)


def _prompts(model: Any, tokenizer: Any) -> list[Batch]:
    return vocabulary_batches(model.config.vocab_size) if tokenizer is None else prompt_batches(tokenizer)


def proof_batches(opened: Opened) -> list[Batch]:
    """What an adapter is proven on: held-out rows of its run where their files still lie there, else built-in prompts."""
    rows = []
    if opened.config is not None:
        from rankwise.errors import DataError
        from rankwise.training.prepare import prepare

        try:
            prepared = prepare(opened.config, opened.loaded.tokenizer, opened.labels)
        except (ConfigError, DataError, OSError):
            prepared = None  # the data have gone elsewhere since; the proof needs prompts, not these
        if prepared is not None:
            encoded = prepared.scored.get("task", prepared.train)
            rows = [encoded[index]["input_ids"] for index in range(min(5, len(encoded)))]
    own = batches_of(rows)
    return own + prompt_batches(opened.loaded.tokenizer)[: 8 - len(own)]


def _written(
    work: _Work, output: Path, format: str, rank: int | None, energy: float | None, dtype: str | None, static: bool = False
) -> Exported:
    import rankwise as rw
    from rankwise.checkpoint.atomic import write_folder

    model: Any = work.model
    record, about = model.rankwise, facts(model)
    sidecar: dict[str, Any] = {}
    kind = next(model.parameters()).dtype
    method = method_lines(record.recipe, record.plan.sites)
    trained = logits_on(model, work.batches)
    mixture = mean_mixture(model, work.batches) if static else None
    pairs = None if format == "peft" else pairs_of(model, rank, energy, mixture)
    file_dtype = DTYPES[dtype] if dtype else _own_dtype(work, pairs, kind)
    ready = {} if pairs is None else _ready(pairs, format, file_dtype)
    notes = [] if pairs is None else _cut_notes(pairs, ready, mixture)
    tolerance = tolerance_of(file_dtype, kind) if pairs is None or pairs.exact else None
    with write_folder(output) as folder:
        if format == "peft":
            rw.save(model, folder)
        bare = _bare(work)
        base_logits = logits_on(bare, work.batches)
        fingerprint = record.fingerprint
        if pairs is not None:
            fingerprint = _fingerprint(work, bare, pairs, record)
            sidecar = {
                "format": format,
                "base": about_base(bare) | {"fingerprint": fingerprint},
                "method": record.recipe.to_dict(),
                "exact": pairs.exact,
                "sites": {name: {"rank": cut.rank, "kept": cut.kept} for name, cut in pairs.cuts.items()},
            }
            if format == "lora":
                write_servable(folder, bare, ready, sidecar)
        with tempfile.TemporaryDirectory() as scratch:
            place = folder
            if format == "gguf-lora" and pairs is not None:
                place = Path(scratch) / "read"
                _write_gguf(folder, place, bare, ready, sidecar)
            found, note = _reload(work, bare, place, pairs is not None, record.recipe.storage.quantizes)
        proof = prove(found, trained, base_logits, tolerance, note=note)
        if pairs is not None:
            sidecar["proof"] = proof.to_dict()
            _sidecar(folder, sidecar)
        _dress(work, folder, format, about, method, fingerprint, record.recipe.name, notes, proof, ready)
    return Exported(output, format, str(file_dtype).removeprefix("torch."), proof, notes)


def _own_dtype(work: _Work, pairs: Pairs | None, kind: torch.dtype) -> torch.dtype:
    """What servers will compute in: the dtype of the base as its folder holds it. `save` writes masters, which are fp32."""
    if pairs is None:
        return torch.float32
    if work.loaded is not None:
        from rankwise.checkpoint.weights import Weights

        weights = Weights(work.loaded.folder)
        kind = weights.dtype(weights.key_of(next(iter(pairs.cuts)), getattr(work.model, "base_model_prefix", "")))
    return kind if kind in DTYPES.values() else torch.float32


def _ready(pairs: Pairs, format: str, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    # llama.cpp takes any rank; one for all keeps alpha / rank at 1
    rank = padded_rank(pairs.largest) if format == "lora" else pairs.largest
    return {name: padded(cut, rank, dtype) for name, cut in pairs.cuts.items()}


def _cut_notes(pairs: Pairs, ready: Mapping[str, tuple[Tensor, Tensor]], mixture: Mixture | None) -> list[str]:
    rank = len(next(iter(ready.values()))[0])
    least, mean = pairs.kept()
    notes = [f"{len(ready)} layers at rank {rank} (the largest has {pairs.largest}), lora_alpha {rank}, every scale in lora_B"]
    if mixture is not None:
        worst = max(mixture.errors.values())
        notes.append(f"gates held at their mean; on these rows their mean distance from it is {worst:.2g} at the worst layer")
    if pairs.exact:
        return [*notes, "exact: nothing was cut"]
    if least > 1 - 1e-9:
        return notes
    return [*notes, f"kept of the squared norm of each change: {mean:.2%} on average, {least:.2%} at least"]


def _bare(work: _Work) -> Any:
    """The base of the work's model, its adapters taken off; read again from its folder where a training wrote over it."""
    import rankwise as rw

    try:
        return rw.unadapt(work.model)
    except TargetError as error:
        if work.loaded is None:
            raise CheckpointError(f"{error}; export from the adapter's folder, with the base's folder as base") from None
    kind = next(work.model.parameters()).dtype
    work.loaded = load_model(str(work.loaded.folder), work.task, work.labels, kind)
    work.model = work.loaded.model
    return work.model


def _fingerprint(work: _Work, bare: Any, pairs: Pairs, record: Any) -> str:
    """Of the base as its folder holds it, over the sites that were written; never of a 4-bit form of it, where that can be helped."""
    from rankwise.checkpoint.fingerprint import base_fingerprint
    from rankwise.checkpoint.weights import Weights

    if set(pairs.sites) == {site.name for site in record.plan.sites}:
        return record.fingerprint
    if work.loaded is not None:
        return Weights(work.loaded.folder).fingerprint(bare, list(pairs.sites.values()))
    return base_fingerprint(dict(bare.named_modules()), list(pairs.sites.values()))


def _reload(work: _Work, bare: Any, place: Path, plain: bool, quantized: bool) -> tuple[Tensor, str]:
    """(logits of what was written on the base that it was trained on, a note on the base as it lies on the disk where that is another)"""
    found = _logits_with(bare, place, work.batches, plain)
    if not quantized or work.loaded is None:
        return found, ""
    dense = load_model(str(work.loaded.folder), work.task, work.labels, next(bare.parameters()).dtype).model
    served = difference(_logits_with(dense, place, work.batches, plain), found)
    return found, f"trained over a 4-bit base; on the base as its folder holds it, the logits differ by {served.text()}"


def _logits_with(base: Any, folder: Path, batches: list[Batch], plain: bool) -> Tensor:
    """Logits of a base with a written adapter: as a server reads it, or as `load` does."""
    import rankwise as rw
    from rankwise.checkpoint.served import as_served

    if plain:
        with as_served(base, folder) as served:
            return logits_on(served, batches)
    rw.load(base, folder, any_base=True)
    found = logits_on(base, batches)
    rw.unadapt(base)
    return found


def _write_gguf(folder: Path, place: Path, bare: Any, ready: Mapping[str, tuple[Tensor, Tensor]], about: Mapping[str, Any]) -> None:
    """Writes the file, reads it back, compares every number, and puts what was read where `load` can load it."""
    from rankwise.checkpoint.gguf_lora import FILE, read_gguf, write_gguf

    write_gguf(folder / FILE, bare, ready)
    read = read_gguf(folder / FILE, bare, ready)
    for name, wanted in ready.items():
        for tensor, other in zip(read[name], wanted, strict=True):
            if not torch.equal(tensor, other.float()):
                raise CheckpointError(f"{FILE} does not hold {name} as it was written; nothing was kept")
    place.mkdir()
    write_servable(place, bare, read, about)


def _sidecar(folder: Path, about: Mapping[str, Any]) -> None:
    from rankwise.checkpoint.servable import SIDECAR
    from rankwise.training.folder import write_json

    write_json(folder / SIDECAR, dict(about))


def _dress(
    work: _Work,
    folder: Path,
    format: str,
    about: Mapping[str, Any],
    method: list[str],
    fingerprint: str | None,
    recipe_name: str,
    notes: list[str],
    proof: Proof,
    ready: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """The card, and the tokenizer's files where the adapter has its own."""
    from rankwise.checkpoint.peft_layout import NATIVE
    from rankwise.checkpoint.saving import saved_type
    from rankwise.training.carding import run_lines

    native = format == "peft" and saved_type(folder) == NATIVE
    layout = {"gguf-lora": "gguf"}.get(format, "native" if native else "peft")
    rank = len(next(iter(ready.values()))[0]) if format == "lora" else None
    data, metrics = run_lines(work.run)
    lines = [f"- {line}" for line in [*notes, *proof.text().splitlines()]]
    put_card(folder, card(about, layout, method, fingerprint, recipe_name or "lora", data, metrics, lines, rank))
    if work.adapter is not None:
        copy_tokenizer(work.adapter, folder)
        if format != "gguf-lora" and (work.adapter / "training.json").is_file():
            shutil.copy2(work.adapter / "training.json", folder / "training.json")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a folder's tokenizer files as they are: what loading makes of them (a pad token, a side) is not what was there."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, folder / name)
