"""extract: what a training did to a whole model, as a low-rank adapter of its base.

    up @ down  ~  W_tuned - W_base        for each linear layer, cut to a rank or to a part of its squared norm

So results of full fine-tuning and of GaLore can be served side by side on one base. Tensors are read one by one. What is no linear layer
and changed all the same (norms, embeddings, the output head) has no place in the adapter: it is named, and its loss is in the difference
that is measured.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rankwise.checkpoint.card import card, facts, put_card
from rankwise.checkpoint.lowrank import Cut, check_cut, cut_dense
from rankwise.checkpoint.proof import Proof, logits_on, prompt_batches, prove, tolerance_of
from rankwise.checkpoint.servable import DTYPES, RANKS, SIDECAR, about_base, padded, padded_rank, write_servable
from rankwise.checkpoint.served import as_served
from rankwise.checkpoint.weights import Weights
from rankwise.errors import CheckpointError, ConfigError
from rankwise.matching import find_sites, kind_of, widths_of
from rankwise.recipe import Targets
from rankwise.training.exporting import copy_tokenizer, refuse_existing
from rankwise.training.folder import write_json
from rankwise.training.models import check_weights, load_config_only, load_model, model_folder
from rankwise.updates import Site


@dataclass(frozen=True)
class Extracted:
    """What was taken, what was left, and how near it comes."""

    folder: Path
    cuts: dict[str, Cut]  # layer -> pair
    left: dict[str, float]  # tensors that changed and are left out -> relative change
    rank: int
    proof: Proof
    unchanged: list[str] = field(default_factory=list)

    def text(self) -> str:
        """What the command prints: a line for each layer, then the sums."""
        lines = [f"{name}: rank {cut.rank}, {cut.kept:.2%} kept" for name, cut in self.cuts.items()]
        kept = [cut.kept for cut in self.cuts.values()]
        lines.append(f"extracted to {self.folder}: {len(kept)} layers at rank {self.rank}")
        lines.append(f"kept of the squared norm of each change: {sum(kept) / len(kept):.2%} on average, {min(kept):.2%} at least")
        if self.left:
            named = ", ".join(f"{name} ({change:.1e})" for name, change in list(self.left.items())[:5])
            more = f" and {len(self.left) - 5} more" if len(self.left) > 5 else ""
            lines.append(f"Note  {len(self.left)} tensors of other kinds changed too and are left out: {named}{more}")
        return "\n".join([*lines, self.proof.text()])


def extract(
    base: str, tuned: str, output: str | Path, rank: int | None = None, energy: float | None = None, dtype: str | None = None
) -> Extracted:
    """Takes the difference of two model folders as an adapter that servers load.

    Args:
        base: folder or name of the model that the training began from.
        tuned: folder of the trained model; the same architecture and vocabulary.
        output: the new folder.
        rank: ranks of each layer, at most 512. energy: as many as keep this part of each layer's squared norm. One of the two.
        dtype: 'fp32', 'bf16' or 'fp16' of the adapter; None takes the trained model's own.

    Raises:
        ConfigError: neither rank nor energy, an output that exists, no such folders. CheckpointError: the folders are of two architectures,
            no linear layer changed, or the adapter is no nearer to the trained model than the base.
    """
    from rankwise.checkpoint.atomic import write_folder

    output = Path(output)
    refuse_existing(output)
    if (rank is None) == (energy is None):
        raise ConfigError("give either a rank (--rank 16) or the part of each change's squared norm to keep (--energy 0.9)")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown; use {', '.join(DTYPES)}")
    check_cut(rank, energy)
    if rank is not None and rank > RANKS[-1]:
        raise CheckpointError(f"rank={rank} is more than servers accept; use at most {RANKS[-1]}")
    folders = [model_folder(name) for name in (base, tuned)]
    for folder in folders:
        check_weights(folder)
    model = load_config_only(folders[0], "text")
    before, after = (Weights(folder) for folder in folders)
    cuts, sites = _cuts(model, before, after, rank, energy)
    left = _left(before, after, {before.key_of(name, model.base_model_prefix) for name in sites})
    own = after.dtype(after.key_of(next(iter(cuts)), model.base_model_prefix))
    kind = DTYPES[dtype] if dtype else own if own in DTYPES.values() else torch.float32
    width = padded_rank(max(cut.rank for cut in cuts.values()))
    pairs = {name: padded(cut, width, kind) for name, cut in cuts.items()}
    exact = not left and min(cut.kept for cut in cuts.values()) > 1 - 1e-9
    with write_folder(output) as folder:
        loaded = load_model(base, "text", dtype="auto")
        batches = prompt_batches(loaded.tokenizer)
        about = {
            "format": "lora",
            "base": about_base(loaded.model) | {"fingerprint": before.fingerprint(model, [sites[name] for name in cuts])},
            "method": {"name": "extract", "rank": rank, "energy": energy},
            "exact": exact,
            "sites": {name: {"rank": cut.rank, "kept": cut.kept} for name, cut in cuts.items()},
            "left_out": left,
        }
        write_servable(folder, loaded.model, pairs, about)
        base_logits = logits_on(loaded.model, batches)
        with as_served(loaded.model, folder) as served:
            found = logits_on(served, batches)
        known, computed = facts(loaded.model), next(loaded.model.parameters()).dtype
        del loaded
        trained = logits_on(load_model(tuned, "text", dtype="auto").model, batches)
        proof = prove(found, trained, base_logits, tolerance_of(kind, computed) if exact else None, "the extracted adapter")
        write_json(folder / SIDECAR, about | {"proof": proof.to_dict()})
        result = Extracted(output, cuts, left, width, proof)
        method = [f"- method: the difference of two models, cut to rank {width} at {len(cuts)} layers"]
        lines = [f"- {line}" for line in result.text().splitlines()[len(cuts) + 1 :]]
        put_card(folder, card(known, "peft", method, about["base"]["fingerprint"], "lora", proof=lines, rank=width))
        _changed_tokenizer(folders[0], folders[1], folder)
    return result


def _cuts(model: Any, before: Weights, after: Weights, rank: int | None, energy: float | None) -> tuple[dict[str, Cut], dict[str, Site]]:
    cuts: dict[str, Cut] = {}
    sites: dict[str, Site] = {}
    for name, (module, _) in find_sites(model, Targets(include=("all-linear",))).items():
        inputs, outputs = widths_of(module)
        sites[name] = Site(name, kind_of(module) or "linear", inputs, outputs, 0, 1.0)
        one, other = before.weight(model, name), after.weight(model, name)
        if one.shape != other.shape:
            raise CheckpointError(
                f"{name} is {tuple(one.shape)} in the base and {tuple(other.shape)} in the trained model: two architectures"
            )
        wide = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
        delta = other.to(wide) - one.to(wide)
        if not bool(torch.isfinite(delta).all()):
            raise CheckpointError(f"{name} holds values that are not finite; take another checkpoint")
        cut = cut_dense(delta, rank, energy)
        if cut.rank:
            cuts[name] = cut
    if not cuts:
        raise CheckpointError("no linear layer differs between the two folders, so there is nothing to extract; are both the base?")
    return cuts, sites


def _left(before: Weights, after: Weights, taken: set[str]) -> dict[str, float]:
    """Tensors that changed and are no linear layers, with their relative change."""
    left: dict[str, float] = {}
    for key in before.files:
        if key in taken:
            continue
        if key not in after:
            raise CheckpointError(f"{after.folder} holds no {key}: the two folders are of two architectures")
        one, other = before.tensor(key), after.tensor(key)
        if one.shape != other.shape:
            raise CheckpointError(
                f"{key} is {tuple(one.shape)} in the base and {tuple(other.shape)} in the trained model, such as after adding tokens; an "
                "adapter cannot hold that: serve the trained model itself"
            )
        if one.is_floating_point() and not torch.equal(one, other):
            left[key] = float((other.double() - one.double()).norm() / one.double().norm().clamp(min=1e-30))
    return left


def _changed_tokenizer(base: Path, tuned: Path, folder: Path) -> None:
    """The trained model's tokenizer files, where one of them is not the base's."""
    from rankwise.training.exporting import TOKENIZER_FILES

    mine = {name: (tuned / name).read_bytes() for name in TOKENIZER_FILES if (tuned / name).is_file()}
    if any(not (base / name).is_file() or (base / name).read_bytes() != content for name, content in mine.items()):
        copy_tokenizer(tuned, folder)
