"""Rows of unequal length to one batch, padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Collator:
    """Pads input_ids with `pad_id`, labels with `label_pad`, and makes the attention mask from the lengths.

    The mask never comes from comparing with `pad_id`: where the padding token is also the end token, a real end token must be attended to
    and trained. An integer label (classification) gives labels of shape (batch,). Lengths are rounded up to `pad_to_multiple_of`.
    A plain frozen dataclass, so that worker processes can have it.
    """

    pad_id: int
    label_pad: int = -100
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """{'input_ids', 'attention_mask', 'labels'}, int64 tensors (batch, length); labels, and sample_types (batch,), only if the features
        have them."""
        import torch

        rows = [list(feature["input_ids"]) for feature in features]
        masks = [list(feature.get("attention_mask") or [1] * len(row)) for feature, row in zip(features, rows, strict=True)]
        length = max(map(len, rows))
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.tensor([row + [self.pad_id] * (length - len(row)) for row in rows], dtype=torch.long),
            "attention_mask": torch.tensor([mask + [0] * (length - len(mask)) for mask in masks], dtype=torch.long),
        }
        if "labels" in features[0]:
            labels = [feature["labels"] for feature in features]
            if not isinstance(labels[0], int):
                labels = [list(label) + [self.label_pad] * (length - len(label)) for label in labels]
            batch["labels"] = torch.tensor(labels, dtype=torch.long)
        if "sample_types" in features[0]:
            batch["sample_types"] = torch.tensor([feature["sample_types"] for feature in features], dtype=torch.long)
        return batch
