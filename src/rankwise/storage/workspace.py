"""One reusable buffer for dequantized weights per device and dtype, so that many layers hold one dense weight at a time between them.

A forward or backward dequantizes a weight into the buffer, multiplies, and lets go of it. The lock makes that one step, so a weight is
never overwritten by another thread between the two; on a GPU the work of one stream is done in order, so the buffer belongs to a stream.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_LOCK = threading.RLock()
_BUFFERS: dict[tuple[torch.device, torch.dtype, int], "_Buffer"] = {}
_READING = threading.local()


class _Buffer:
    """The memory, and what is in it as long as one `read_once` block lasts."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.holds: tuple[object, int] | None = None  # (the block, address of the codes)


@contextmanager
def read_once() -> Iterator[None]:
    """Within the block, reads of one weight that follow each other dequantize it once; frozen codes cannot change meanwhile."""
    outer = getattr(_READING, "block", None)
    _READING.block = outer or object()
    try:
        yield
    finally:
        _READING.block = outer


@contextmanager
def dense(codes: Tensor, shape: tuple[int, int], dtype: torch.dtype, fill: Callable[[Tensor], object]) -> Iterator[Tensor]:
    """A dense weight (out, in) in the buffer, for the length of the block; do not keep it.

    Args:
        codes: what the weight is made from; their address names it.
        fill: writes the weight into a flat tensor.
    """
    numel = shape[0] * shape[1]
    stream = torch.cuda.current_stream(codes.device).cuda_stream if codes.is_cuda else 0
    with _LOCK:
        buffer = _BUFFERS.setdefault((codes.device, dtype, stream), _Buffer())
        if buffer.memory is None or buffer.memory.numel() < numel:
            buffer.memory = None  # the smaller one goes before the larger one comes
            # not an inference tensor, whatever mode the first caller is in: others will write to it
            with torch.inference_mode(False):
                buffer.memory = torch.empty(numel, dtype=dtype, device=codes.device)
            buffer.holds = None
        flat = buffer.memory[:numel]
        block = getattr(_READING, "block", None)
        key = None if block is None else (block, codes.data_ptr())
        if key is None or buffer.holds != key:
            buffer.holds = None  # until it is whole
            fill(flat)
            buffer.holds = key
        yield flat.view(shape)


def free_workspaces() -> None:
    """Gives the memory of all buffers back; the next product makes a new one."""
    with _LOCK:
        _BUFFERS.clear()
