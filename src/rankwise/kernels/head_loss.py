"""Cross-entropy over a frozen output head, without ever holding all logits.

    loss = sum over supervised tokens of  logsumexp(W x + bias) - (W x + bias)[label]

The rows are taken in chunks: logits of a chunk, their loss, and at once their gradient  (softmax - onehot) W,  so that what stays for the
backward is one (tokens, width) tensor. Rows without a label never meet the head. The idea is that of Liger's fused linear cross-entropy
(arXiv 2410.10989, section 3.2) for a head that does not train; nothing waits for the device.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from rankwise.storage import Storage

IGNORED = -100
_CHUNK_BYTES = 64 * 2**20  # fp32 logits of one chunk
_ROWS_ON_GPU = 1024  # fewer rows leave a large GPU without work


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, storage: "Storage") -> Tensor:
    """The summed loss, 0-d fp32, with gradients for `hidden` alone.

    Args:
        hidden: (tokens, width), what the head reads.
        weight: (vocabulary, width), frozen.
        bias: (vocabulary,) or None, frozen.
        labels: (tokens,), the class of each row; all of them are in the vocabulary.
        storage: what multiplies by the weight.
    """
    return _HeadLoss.apply(hidden, weight, bias, labels, storage)


def reference_head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """The same number in plain autograd, all logits at once."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose logits are alive at once."""
    rows = max(_CHUNK_BYTES // (4 * vocabulary), 16)
    return max(rows, _ROWS_ON_GPU) if device.type == "cuda" else rows


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, storage: "Storage") -> Tensor:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = chunk_rows(weight.shape[0], hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            of_label = labels[part, None]
            logits = storage.product(hidden[part], bias, weight)  # (rows, vocabulary), in the head's dtype; from here on fp32
            logp = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            total -= logp.gather(1, of_label).sum()
            if gradient is not None:
                slope = logp.exp_()
                slope.scatter_add_(1, of_label, torch.full_like(of_label, -1, dtype=slope.dtype))
                gradient[part] = storage.product_t(logits.copy_(slope), weight)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * grads[0].to(gradient.dtype), None, None, None, None
