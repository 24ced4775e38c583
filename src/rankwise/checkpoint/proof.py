"""Proof that what was written computes what was trained: logits on real prompts, compared position by position.

    largest = max |z' - z| / max |z|,    KL = mean over positions of sum_v p(v) (log p(v) - log p'(v)),    p = softmax(z)

z are the trained model's logits, z' those of what was written and loaded again, (positions, vocabulary). A proof fails where `largest` is
above the tolerance of the dtypes involved, and where z' is as far from z as the base is: then the adapter got lost on the way.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import CheckpointError

#: what rounding to a dtype explains, as a part of the largest logit
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: What is the capital of France?\nAnswer:",
    "def add(a, b):\n    return",
    "In 1969, two people walked on the Moon for the first time, and",
    "Dear Sir or Madam, I am writing to ask whether 3 + 4 = 7;",
)
COUNT, LENGTH = 8, 96  # prompts and tokens of each, at most

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """How far one model's logits are from another's."""

    largest: float  # largest difference over the largest magnitude
    kl: float  # mean over positions, nats
    positions: int

    def text(self) -> str:
        """One phrase."""
        return f"{self.largest:.1e} of the largest logit, KL {self.kl:.1e} ({self.positions:,} positions)"


@dataclass(frozen=True)
class Proof:
    """What was measured of an export, and what was allowed."""

    difference: Difference  # of the export from the trained model
    change: Difference  # of the base from the trained model: what there was to lose
    tolerance: float | None  # None where the export is an approximation, and only said how good it is
    note: str = ""

    def text(self) -> str:
        """Two lines."""
        allowed = "an approximation, measured" if self.tolerance is None else f"{self.tolerance:g} is allowed"
        lines = [
            f"loaded again, it differs from the trained model by {self.difference.text()}; {allowed}",
            f"the adapter moves its base by {self.change.text()}",
        ]
        return "\n".join([*lines, *([self.note] if self.note else [])])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for files."""
        return {
            "difference": self.difference.largest,
            "kl": self.difference.kl,
            "change_of_base": self.change.largest,
            "positions": self.difference.positions,
            "tolerance": self.tolerance,
        }


def batches_of(rows: Iterable[Sequence[int]]) -> list[Batch]:
    """One batch of one row for each prompt's ids: nothing is padded, so no mask can hide a difference."""
    found = []
    for row in rows:
        ids = torch.tensor([list(row)[:LENGTH]], dtype=torch.long)  # (1, length)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        if len(found) == COUNT:
            break
    return found


def prompt_batches(tokenizer: Any, prompts: Iterable[str] = PROMPTS) -> list[Batch]:
    """Built-in prompts, through the chat template too where there is one."""
    texts = list(prompts)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    if getattr(tokenizer, "chat_template", None):
        for text in texts[:2]:
            try:
                chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
            except Exception:  # templates may refuse a conversation without a system message; the plain prompts remain
                continue
            rows.append(tokenizer(chat, add_special_tokens=False)["input_ids"])
    return batches_of(row for row in rows if row)


def vocabulary_batches(size: int) -> list[Batch]:
    """Rows of ids spread over a vocabulary, where no tokenizer is at hand."""
    generator = torch.Generator().manual_seed(0)
    return batches_of(torch.randint(size, (4, 24), generator=generator).tolist())


@torch.no_grad()
def logits_on(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Logits of all positions of all prompts, (positions, vocabulary) or (prompts, classes), fp32 (fp64 from an fp64 model) on the CPU."""
    device = next(model.parameters()).device
    mode = model.training
    model.eval()
    try:
        found = [model(**{name: value.to(device) for name, value in batch.items()}).logits for batch in batches]
    finally:
        model.train(mode)
    return torch.cat([each.flatten(0, -2).to("cpu", torch.promote_types(each.dtype, torch.float32)) for each in found])


def difference(found: Tensor, wanted: Tensor) -> Difference:
    """How far `found` is from `wanted`; infinitely far where a value is not finite.

    Raises:
        CheckpointError: the shapes differ: another vocabulary, or another number of classes.
    """
    if found.shape != wanted.shape:
        raise CheckpointError(f"the logits have shapes {tuple(found.shape)} and {tuple(wanted.shape)}: another vocabulary or other classes")
    largest = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    kl = 0.0
    for mine, theirs in zip(found.split(256), wanted.split(256), strict=True):  # fp64 of the whole would be large
        log_found, log_wanted = mine.double().log_softmax(-1), theirs.double().log_softmax(-1)
        kl += float((log_wanted.exp() * (log_wanted - log_found)).sum())
    return Difference(largest if largest == largest else float("inf"), kl / len(found), len(found))


def tolerance_of(*dtypes: torch.dtype) -> float:
    """What rounding to the coarsest of these dtypes explains."""
    return max(TOLERANCES.get(dtype, 0.05) for dtype in dtypes)


def prove(found: Tensor, trained: Tensor, base: Tensor, tolerance: float | None, what: str = "the export", note: str = "") -> Proof:
    """Compares logits and refuses what is not what was trained.

    Args:
        found: of what was written, loaded again.
        trained: of the trained model.
        base: of the base without the adapter.
        tolerance: largest allowed difference, as a part of the largest logit; None for an approximation, which must only be nearer to the
            trained model than the base is.
        what: how to call it in errors.
        note: one more line of the proof.

    Raises:
        CheckpointError: it differs by more than the tolerance, or is no nearer to the trained model than the base.
    """
    proof = Proof(difference(found, trained), difference(base, trained), tolerance, note)
    if proof.change.largest == 0:
        raise CheckpointError(
            f"the adapter changes nothing: its logits are those of the base, bit for bit, so {what} would be empty; train it"
        )
    if tolerance is not None and not proof.difference.largest <= tolerance:
        raise CheckpointError(
            f"{what} differs from the trained model by {proof.difference.largest:.2g} of the largest logit, more than {tolerance:g}, which "
            "rounding does not explain; nothing was written"
        )
    if not proof.difference.largest < proof.change.largest:
        raise CheckpointError(
            f"{what} lost the adapter: it is {proof.difference.largest:.2g} of the largest logit away from the trained model, and the bare "
            f"base only {proof.change.largest:.2g}; nothing was written: take a wider dtype or a higher rank"
        )
    return proof
