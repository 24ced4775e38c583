"""GaLore written out on ordinary weights in the weights' own precision, and the steps that its tests take again and again."""

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import Attention, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.recipe import Recipe
from rankwise.sites import adapted_sites

TARGETS = ["q_proj", "k_proj", "gate_proj", "down_proj"]  # 32x32, 16x32, 48x32, 32x48: square, wide, tall, wide

ATTENTION = ["q_proj", "k_proj", "v_proj"]  # of the toy: 16x16, 8x16, 8x16


class DenseGaLore:
    """Algorithm 2 of the paper with AdamW: full gradients, a singular value decomposition, and torch's Adam on a tensor fed R."""

    def __init__(self, weights: list[nn.Parameter], rank: int, interval: int, lr: float, scale: float, **options: Any) -> None:
        self.align, self.projection = options.pop("align", True), options.pop("projection", "std")
        self.decay, self.kind = options.pop("weight_decay", 0.0), options.pop("kind", torch.optim.Adam)
        self.weights, self.rank, self.interval, self.lr, self.scale, self.options = weights, rank, interval, lr, scale, options
        self.t = 0
        self.frames: dict[int, Tensor] = {}
        self.low: dict[int, tuple[nn.Parameter, torch.optim.Optimizer]] = {}

    def left(self, weight: Tensor) -> bool:
        short = weight.shape[0] < weight.shape[1]
        return {"std": short, "reverse_std": not short, "left": True, "right": False}[self.projection]

    def frame(self, weight: nn.Parameter) -> Tensor:
        assert weight.grad is not None
        u, _, vh = torch.linalg.svd(weight.grad, full_matrices=False)
        made = u[:, : self.rank] if self.left(weight) else vh[: self.rank].T
        before = self.frames.get(id(weight))
        if before is not None and self.align:
            made = made * torch.where((before * made).sum(0) < 0, -1.0, 1.0)
        return made

    def projected(self, weight: nn.Parameter) -> Tensor:
        """R as it would be now; the frame is renewed if it is due."""
        assert weight.grad is not None
        if self.t % self.interval == 0:
            self.frames[id(weight)] = self.frame(weight)
        frame = self.frames[id(weight)]
        return frame.T @ weight.grad if self.left(weight) else weight.grad @ frame

    @torch.no_grad()
    def step(self, clip: float = 1.0) -> None:
        for weight in self.weights:
            r = self.projected(weight) * clip
            if id(weight) not in self.low:
                low = nn.Parameter(torch.zeros_like(r))
                self.low[id(weight)] = low, self.kind([low], lr=self.lr, **self.options)
            low, adam = self.low[id(weight)]
            low.zero_()
            low.grad = r
            adam.step()
            frame = self.frames[id(weight)]
            weight += self.scale * (frame @ low if self.left(weight) else low @ frame.T)
            weight -= self.lr * self.decay * weight
            weight.grad = None
        self.t += 1


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the targets of a plain model, everything else frozen."""
    model.requires_grad_(False)
    found = [p for name, p in model.named_parameters() if name.endswith(tuple(f"{target}.weight" for target in TARGETS))]
    for parameter in found:
        parameter.requires_grad_(True)
    return found


def recipe(**options: Any) -> Recipe:
    """The paper's form at rank 4, every frame every third step, unless said otherwise."""
    return rw.recipes.galore(
        **{"rank": 4, "update_interval": 3, "scale": 0.5, "method": "svd", "stagger": False, "targets": TARGETS} | options
    )


def batch(step: int) -> dict[str, Tensor]:
    ids = token_ids(rows=2, length=9, seed=100 + step)
    return {"input_ids": ids, "labels": ids}


def gradients(model: nn.Module, *numbers: int, weight: float = 1.0) -> None:
    """One backward per batch."""
    for number in numbers:
        (weight * model(**batch(number)).loss).backward()


def steps(model: nn.Module, optimizer: Any, first: int, last: int, after: Callable[[int], None] = lambda step: None) -> None:
    model.train()
    for step in range(first, last):
        gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
        after(step)


def attention_loss(model: nn.Module, number: int) -> Tensor:
    """Of a toy that needs nothing but torch: other processes import it in a moment."""
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return (model(x) - x.sum()).square().mean()


def parallel_worker(rank: int, init: str, folder: str) -> None:
    """One of two processes that train on batches of their own; saves D's averaged gradient of step 0, and the weights at the end."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    model: Any = rw.adapt(Attention(), recipe(method="randomized", update_interval=2, targets=ATTENTION))
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = rw.optimizer(model, lr=1e-2)
    kept: dict[str, Tensor] = {}
    for step in range(4):
        attention_loss(wrapped, 2 * step + rank).backward()
        for name, module in adapted_sites(model).items():
            if step == 0:
                kept[f"grad.{name}"] = module.update.trained.grad.clone()  # type: ignore[union-attr]
                kept[f"frame.{name}"] = module.update.frame.clone()  # type: ignore[union-attr, operator]
        optimizer.step()
        optimizer.zero_grad()
    kept |= {f"weight.{name}": module.weight.detach() for name, module in adapted_sites(model).items()}
    torch.save(kept, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
