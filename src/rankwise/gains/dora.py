"""DoRA: every row of the adapted weight is set to a trained length.

    gain = magnitude / ||V||_row,   V = W + dW          magnitude (out,), V (out, in)

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equations 5 and 11. One magnitude per output row, as the
official code and PEFT have it (the paper's text says per input). The norm is taken from the factors, V is never made:

    ||V||^2 = ||W||^2 + 2 rowsum(up' * (W down'^T)) + rowsum((up' (down' down'^T)) * up')

where up' (out, k), down' (k, in) are the whole update, start subtracted. ||W||^2 is constant and kept; the rest is made in each forward.
The magnitude trains as a delta on an fp32 buffer, so that casting the parameters to bf16 (FSDP2's mixed precision) leaves its digits alone.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankwise.equation import Factors, Start, stacked
from rankwise.errors import RecipeError
from rankwise.gains.base import Gain, GainChoice
from rankwise.storage import Storage
from rankwise.updates import Site, Slot


class DoraGain(Gain):
    """(magnitude0 + delta) / row norm of the adapted weight."""

    magnitude: Tensor  # (out,), the trained delta; named for its role
    magnitude0: Tensor  # (out,) fp32, where the magnitude started
    weight_norm_sq: Tensor  # (out,) fp32, squared row norms of the frozen weight

    def __init__(self, choice: Any, site: Site, frozen: frozenset[str], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(choice, site, frozen, device, dtype)
        for name in ("magnitude0", "weight_norm_sq"):
            self.register_buffer(name, torch.zeros(site.out_features, device=device, dtype=dtype), persistent=False)
        self._evaluated: tuple[tuple[Tensor, ...], Tensor] | None = None

    @torch.no_grad()
    def begin(
        self, layer: nn.Module, storage: Storage, factors: Factors | None, start: Start | None, original: Tensor | None = None
    ) -> None:
        weight = storage.read(layer)
        self.weight_norm_sq.copy_(row_norms_squared(weight, self.weight_norm_sq.dtype))
        if original is None:
            self.magnitude0.copy_(self.norm(layer, storage, factors, start))
        else:
            self.magnitude0.copy_(row_norms_squared(original, self.magnitude0.dtype).sqrt())
        self.magnitude.zero_()

    def norm(self, layer: nn.Module, storage: Storage, factors: Factors | None, start: Start | None) -> Tensor:
        """||V||_row, (out,), in fp32; differentiable in the factors."""
        if factors is None:
            return self.weight_norm_sq.sqrt()
        with torch.autocast(self.weight_norm_sq.device.type, enabled=False):
            down, up = stacked(factors, start)  # (k, in), (out, k)
            wide = self.weight_norm_sq.dtype
            cross = storage.linear(layer, down).to(wide).T  # W down'^T, (out, k)
            down, up = down.to(wide), up.to(wide)
            squared = self.weight_norm_sq + 2 * (up * cross).sum(1) + ((up @ (down @ down.T)) * up).sum(1)
        # The expansion can end a hair below zero where V is about zero; a root of zero would have an infinite gradient.
        alive = squared > 0
        return torch.where(alive, torch.where(alive, squared, 1.0).sqrt(), 0.0)

    def forward(self, layer: nn.Module, storage: Storage, factors: Factors | None, start: Start | None) -> Tensor:
        norm = self._norm(layer, storage, factors, start)
        magnitude = self.magnitude0 + self.magnitude
        # a row of zeros (pruned, padded) has no direction: its gain is 1 and gets no gradient
        dead = norm == 0
        return torch.where(dead, torch.ones_like(norm), magnitude / torch.where(dead, torch.ones_like(norm), norm))

    def _norm(self, layer: nn.Module, storage: Storage, factors: Factors | None, start: Start | None) -> Tensor:
        if factors is None or torch.compiler.is_compiling():
            return self._graded_norm(layer, storage, factors, start)
        if self.training or torch.is_grad_enabled():
            self._evaluated = None
            return self._graded_norm(layer, storage, factors, start)
        # In evaluation the norm is kept beside a copy of what it was made from, and used while that has not changed: no version counter
        # (fused optimizers and writes through .data do not move it), so no way to be stale.
        made_from = tuple(t for t in (factors.down, factors.up, factors.core, factors.tail) if t is not None)
        kept = self._evaluated
        if kept is None or not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(kept[0], made_from, strict=True)):
            kept = (tuple(t.detach().clone() for t in made_from), self.norm(layer, storage, factors, start))
            self._evaluated = kept
        return kept[1]

    def _graded_norm(self, layer: nn.Module, storage: Storage, factors: Factors | None, start: Start | None) -> Tensor:
        if self.choice.norm_grad == "full":
            return self.norm(layer, storage, factors, start)
        with torch.no_grad():
            return self.norm(layer, storage, factors, start)

    def train(self, mode: bool = True) -> "DoraGain":
        self._evaluated = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_evaluated": None}

    def saved(self) -> dict[str, Tensor]:
        return {"magnitude": self.magnitude0 + self.magnitude.detach()}

    @torch.no_grad()
    def restore(self, **values: Tensor) -> None:
        # The delta starts anew from the saved length: magnitude0 + (saved - magnitude0) could differ from it in the last bit.
        self.magnitude0.copy_(values["magnitude"])
        self.magnitude.zero_()
        self._evaluated = None

    def anchors(self) -> dict[str, Tensor]:
        return {"magnitude0": self.magnitude0}


def row_norms_squared(weight: Tensor, dtype: torch.dtype, rows: int = 1024) -> Tensor:
    """Squared row norms (out,) of a weight (out, in), accumulated in `dtype`, `rows` rows at a time."""
    return torch.cat([chunk.to(dtype).square().sum(1) for chunk in weight.split(rows)])


@dataclass(frozen=True)
class Dora(GainChoice):
    """Trained row lengths over the adapted weight.

    norm_grad: 'detached' lets the norm follow the factors without a gradient (section 4.3, what the official code and PEFT do), 'full' is
    the gradient of equation 6; it costs O(out in rank) per step whatever the number of tokens.
    dropout: 'adapter' drops the branch's input only. 'paper' (official code and PEFT in training, y = W x + (gain - 1) W drop(x) + ...)
    is refused: it multiplies a second time by W in each step, and the equation has one base product.
    axis: 'out', one magnitude per output row, as official code, PEFT and every checkpoint have it. 'in' (the letter of the paper) is
    refused: it scales inputs, and the equation has a gain on outputs only.
    lengths: over a base that is quantized here, 'held' starts from the row lengths of the quantized weight (the gain is exactly 1, the
    start exactly the base), 'original' from those before, which undoes what quantization did to them (up to 1.6% of a length).
    """

    name: ClassVar[str] = "dora"
    module: ClassVar[Any] = DoraGain
    norm_grad: Literal["detached", "full"] = "detached"
    dropout: Literal["adapter", "paper"] = "adapter"
    axis: Literal["out", "in"] = "out"
    lengths: Literal["held", "original"] = "held"

    @property
    def needs_original(self) -> bool:
        return self.lengths == "original"

    def __post_init__(self) -> None:
        if self.lengths not in ("held", "original"):
            raise RecipeError(f"lengths={self.lengths!r} of the dora gain is unknown; use 'held' or 'original'")
        if self.norm_grad not in ("detached", "full"):
            raise RecipeError(f"norm_grad={self.norm_grad!r} of the dora gain is unknown; use 'detached' or 'full'")
        if self.dropout != "adapter":
            raise RecipeError(
                f"dropout={self.dropout!r} of the dora gain is not available: the official form needs a second product with the base "
                "weight in each step, which the equation does not have; use dropout='adapter' (equal in evaluation and at dropout 0)"
            )
        if self.axis != "out":
            raise RecipeError(
                f"axis={self.axis!r} of the dora gain is not available: one magnitude per input scales x, and the equation scales outputs; "
                "use axis='out', as the official code and every checkpoint do"
            )

    def slots(self, site: Site) -> dict[str, Slot]:
        return {"magnitude": Slot("gain", (site.out_features,), "lora_magnitude_vector")}
