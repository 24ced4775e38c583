"""Codes of the nearest level by look-up, against the binary search that they replace."""

import pytest
import torch
from torch import Tensor

from rankwise.eightbit import bins_of, dequantize, dynamic_map, nearest, quantize
from rankwise.storage.nf4_codes import nf4_table

CPU = torch.device("cpu")
LEVELS = {"signed": dynamic_map(CPU), "unsigned": dynamic_map(CPU, signed=False), "nf4": nf4_table(CPU)}


def searched(values: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


@pytest.mark.parametrize("name", LEVELS)
def test_codes_are_those_of_a_search_everywhere(name: str) -> None:
    levels = LEVELS[name]
    bins, middles = bins_of(levels), (levels[:-1] + levels[1:]) / 2
    # both ends of each bin, the middles and their neighbours, and what lies between
    upper = torch.arange(65536, dtype=torch.int32) << 16
    ends = torch.cat([(upper | low).view(torch.float32) for low in (0, 1, 0x8000, 0xFFFF)])
    inf = torch.tensor(torch.inf)
    near = torch.cat([middles, torch.nextafter(middles, inf), torch.nextafter(middles, -inf), levels])
    drawn = torch.empty(300_001).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    tiny = drawn * 10.0 ** torch.empty(len(drawn)).uniform_(-9, 0, generator=torch.Generator().manual_seed(1))
    values = torch.cat([ends[~ends.isinf()], near, drawn, tiny])
    assert torch.equal(nearest(values, bins), searched(values, levels))


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 7), (1000, 3), (5, 2, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    held = quantize(tensor)
    assert held.codes.shape == shape
    flat = torch.nn.functional.pad(tensor.float().flatten(), (0, -tensor.numel() % 256)).view(-1, 256)
    scaled = (flat * (1 / flat.abs().amax(1).clamp_min(1e-38))[:, None]).clamp(-1, 1)
    assert torch.equal(held.codes.flatten(), searched(scaled, LEVELS["signed"]).flatten()[: tensor.numel()])
    assert torch.equal(quantize(dequantize(held)).codes, held.codes)


def test_a_positive_number_never_becomes_zero() -> None:
    tensor = torch.tensor([1.0, 1e-12, 0.0]).repeat(100)
    zero = int((LEVELS["unsigned"] == 0).nonzero())
    codes = quantize(tensor, signed=False, positive=True).codes.view(-1, 3)
    assert zero == 0
    assert (codes[:, 1] == 1).all()
    assert (codes[:, 2] == 0).all()
    assert (quantize(tensor, signed=False).codes.view(-1, 3)[:, 1] == 0).all()


def test_levels_that_one_comparison_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="more bins"):
        bins_of(1 + torch.arange(5) * 2.0**-10)
