"""What a step is made of, one piece at a time: the base's products and the adapters' skinny ones, dropout, gains, norms, attention.

    python -m benchmarks.passes --threads 1

Pieces of one shape run in turns; the rate of a product is in GFLOP/s. Here one sees which term of the cost model is left.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import interleave, machine, spread, table, tune_allocator


def products(tokens: int, width: int, out: int, rank: int, make: Callable[..., Tensor]) -> dict[str, tuple[Callable[[], object], float]]:
    """Name -> (what runs, its floating-point operations): a base layer's forward, and the six products of its adapter."""
    x, g, h, w = make(tokens, width), make(tokens, out), make(tokens, rank), make(out, width)
    down, up, y, dx = make(rank, width), make(out, rank), make(tokens, out), make(tokens, width)
    inner, outer = 2.0 * tokens * width * rank, 2.0 * tokens * out * rank
    return {
        "x W^T": (lambda: F.linear(x, w), 2.0 * tokens * width * out),
        "x down^T": (lambda: x @ down.T, inner),
        "y += h up^T": (lambda: y.addmm_(h, up.T), outer),
        "g up": (lambda: g @ up, outer),
        "g^T h": (lambda: g.T @ h, outer),
        "dx += gh down": (lambda: dx.addmm_(h, down), inner),
        "gh^T x": (lambda: h.T @ x, inner),
    }


def passes(tokens: int, width: int, make: Callable[..., Tensor]) -> dict[str, Callable[[], object]]:
    """Name -> what runs, over (tokens, width): ours beside torch's or transformers' own."""
    from rankwise.kernels.dropout import Dropped
    from rankwise.kernels.gain import reference_times_gain, times_gain
    from rankwise.kernels.gated import gated, reference_gated
    from rankwise.kernels.norm import normed, reference_normed

    x, g, u = make(tokens, width), make(tokens, width), make(tokens, width)
    gain, weight = 1 + 0.1 * torch.rand(width, device=x.device), make(width)
    seeds = iter(range(10**9))

    def both(function: Callable[..., Tensor], *leaves: Tensor, **fixed: Any) -> Callable[[], object]:
        trained = [leaf.detach().requires_grad_(True) for leaf in leaves]
        return lambda: torch.autograd.grad(function(*trained, **fixed), trained, g)

    return {
        "dropout, torch": lambda: F.dropout(x, 0.05),
        "dropout, ours": lambda: Dropped(x.numel(), 0.05, next(seeds), x.device).of(x),
        "gain, in fp32": lambda: reference_times_gain(x, gain),
        "gain, ours": lambda: times_gain(x, gain),
        "norm with backward, plain": both(lambda t: reference_normed(t, weight, 1e-6, False), x),
        "norm with backward, ours": both(lambda t: normed(t, weight, 1e-6, False), x),
        "gated with backward, plain": both(lambda a, b: reference_gated(a, b, "silu"), x, u),
        "gated with backward, ours": both(lambda a, b: gated(a, b, "silu"), x, u),
    }


def attention(batch: int, heads: int, length: int, make: Callable[..., Tensor]) -> dict[str, Callable[[], object]]:
    """Causal attention of one layer, heads of 64."""
    q, k, v = (make(batch, heads, length, 64).requires_grad_(True) for _ in range(3))
    g = make(batch, heads, length, 64)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return {"attention forward": forward, "attention with backward": lambda: torch.autograd.grad(forward(), (q, k, v), g)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    options = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(options.threads)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    print(machine()["text"])
    rows: list[dict[str, Any]] = []
    for width, out in ((768, 768), (768, 2048), (2048, 768)):
        named = products(options.tokens, width, out, options.rank, make)
        times = interleave({name: run for name, (run, _) in named.items()}, options.rounds)
        for name, (_, operations) in named.items():
            measured = spread(times[name])
            rows.append({"shape": f"{width} -> {out}", "piece": name, **measured, "GFLOP/s": operations / measured["ms"] / 1e6})
    for width in (768, 2048):
        times = interleave(passes(options.tokens, width, make), options.rounds)
        rows += [{"shape": f"{options.tokens} x {width}", "piece": name, **spread(times[name])} for name in times]
    times = interleave(attention(max(options.tokens // 256, 1), 12, 256, make), options.rounds)
    rows += [{"shape": "12 heads, 256", "piece": name, **spread(times[name])} for name in times]
    print(table(rows))


if __name__ == "__main__":
    main()
