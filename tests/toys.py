"""Small modules and helpers that several test files use."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rankwise.sites import AdaptedLinear, adapted_sites


class Qkv(nn.Module):
    """Three linear layers that read one x."""

    def __init__(self, width: int = 32, out: int = 32, bias: bool = True) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, out, bias)
        self.k_proj = nn.Linear(width, out, bias)
        self.v_proj = nn.Linear(width, out, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


class Mlp(nn.Module):
    """Two linear layers with a nonlinearity between."""

    def __init__(self, width: int = 24, hidden: int = 40, out: int = 16, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden, bias)
        self.second = nn.Linear(hidden, out, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Counted(nn.Linear):
    """A subclass of nn.Linear, so opaque: counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def one(width: int, out: int, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A model of one linear layer, whose site is called '0'."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, out, bias, dtype=dtype))


def only_site(model: nn.Module) -> AdaptedLinear:
    """The one site of a model."""
    (site,) = adapted_sites(model).values()
    return site


@torch.no_grad()
def stir(model: nn.Module, size: float = 0.1, seed: int = 1) -> nn.Module:
    """Moves every trained adapter parameter away from its start by a normal draw."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    return model


@contextmanager
def saved_storages(model: nn.Module | None = None) -> Iterator[dict[int, tuple[int, Tensor]]]:
    """Storage address -> (bytes, a tensor in it), of all that autograd keeps inside the block; the model's own tensors left out."""
    own = set() if model is None else {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def saved_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that autograd keeps of a call, each storage counted once, the model's parameters and buffers left out."""
    with saved_storages(model) as found:
        kept = call()  # noqa: F841  keeps the graph alive until the count
        return sum(size for size, _ in found.values())
