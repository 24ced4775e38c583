"""Run by test_nf4_triton.py with TRITON_INTERPRET=1: the kernel on a CPU against the plain form, every number to the last bit."""

import torch

from rankwise.errors import RecipeError
from rankwise.storage import nf4_triton
from rankwise.storage.nf4_codes import Codes, dequantize, quantize

SHAPES = [(1,), (3, 5), (64,), (7, 37), (65, 64), (129, 130)]
EVERY = (7, 37)


def equal() -> None:
    plain = [(64, True, torch.bfloat16, torch.bfloat16), (64, False, torch.float32, torch.float32)]
    every = [
        (blocksize, double_quant, rounded, dtype)
        for blocksize, double_quant in ((32, True), (4096, False), (64, True))
        for rounded in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        for dtype in dict.fromkeys((rounded, torch.float32, torch.bfloat16))
    ]
    for number, shape in enumerate(SHAPES):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.02
        for blocksize, double_quant, rounded, dtype in every if shape == EVERY else plain:
            held = quantize(weight, blocksize, double_quant)
            out = torch.full((weight.numel(),), float("nan"), dtype=dtype)
            nf4_triton.dequantize_into(out, held, blocksize, rounded)
            expected = dequantize(held, shape, rounded, blocksize).to(dtype).flatten()
            assert torch.equal(out, expected), (shape, blocksize, double_quant, rounded, dtype)
    zero = quantize(torch.zeros(300))
    assert not nf4_triton.dequantize_into(torch.ones(300), zero, 64, torch.float32).any()
    # nothing is written past the end
    room = torch.full((20,), 7.0)
    nf4_triton.dequantize_into(room[:15], quantize(torch.randn(15)), 64, torch.float32)
    assert (room[15:] == 7).all()
    nf4_triton.dequantize_into(torch.empty(0), Codes(torch.empty(0, 1, dtype=torch.uint8), torch.empty(0)), 64, torch.float32)


def refused() -> None:
    held = quantize(torch.randn(256))
    for out, codes, blocksize, dtype in (
        (torch.empty(300), held, 64, torch.float32),
        (torch.empty(16, 16), held, 64, torch.float32),
        (torch.empty(512)[::2], held, 64, torch.float32),
        (torch.empty(256), held, 128, torch.float32),
        (torch.empty(256), held, 63, torch.float32),
        (torch.empty(256, dtype=torch.int32), held, 64, torch.float32),
        (torch.empty(256), held, 64, torch.int8),
        (torch.empty(256), held._replace(absmax=held.absmax.int()), 64, torch.float32),
        (torch.empty(256), held._replace(offset=None), 64, torch.float32),
        (torch.empty(256, device="meta"), held, 64, torch.float32),
    ):
        try:
            nf4_triton.dequantize_into(out, codes, blocksize, dtype)
        except RecipeError:
            continue
        raise AssertionError((out.shape, out.dtype, blocksize, dtype))


if __name__ == "__main__":
    equal()
    refused()
