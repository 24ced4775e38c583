"""The kernel that makes an NF4 weight dense: through Triton's interpreter on a CPU, and itself where there is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rankwise.storage import nf4_codes
from rankwise.storage.nf4_codes import dequantize, dequantize_into, quantize

ROOT = Path(__file__).parents[1]


def test_the_kernel_through_the_interpreter() -> None:
    """Equal to the plain form on odd shapes, block sizes and dtypes, and refusing what it does not read."""
    pytest.importorskip("triton")
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(ROOT / "tests" / "triton_nf4.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(3, 5), (65, 64), (1024, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_kernel_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
    pytest.importorskip("triton")
    held = quantize(torch.randn(shape) * 0.02, double_quant=double_quant)
    there = nf4_codes.Codes(*(None if part is None else part.cuda() for part in held))
    out = dequantize_into(torch.empty(shape[0] * shape[1], dtype=dtype, device="cuda"), there, 64, dtype)
    assert nf4_codes._kernel() is not None
    assert torch.equal(out.cpu(), dequantize(held, shape, dtype).flatten())


def test_without_triton_there_is_no_kernel_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "rankwise.storage.nf4_triton", raising=False)
    nf4_codes._kernel.cache_clear()
    assert nf4_codes._kernel() is None
    nf4_codes._kernel.cache_clear()
