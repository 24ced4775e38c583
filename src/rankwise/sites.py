"""The modules that stand in for a base layer: with an update, or trained in full."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rankwise.context import required
from rankwise.equation import Start, dense_update, operate
from rankwise.errors import TargetError, TrainingError
from rankwise.gains import Gain
from rankwise.ledger import Round
from rankwise.routing.base import BlockGate
from rankwise.sharing import SharedMember
from rankwise.storage import Storage, storage_of
from rankwise.storage.workspace import read_once
from rankwise.updates import Part, Site, Update


class Offset(nn.Module):
    """The frozen start of a method that begins away from zero; buffers, saved with adapters so that no decomposition is ever repeated."""

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        # contiguous copies: slices of a decomposition would keep all of it alive
        self.register_buffer("down", down.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("up", up.detach().clone(memory_format=torch.contiguous_format))

    def start(self) -> Start:
        """As the equation takes it."""
        return Start(self.down, self.up)


class AdaptedLinear(nn.Module):
    """Stands in for one base layer: the base, one update, and where needed an offset and a gain.

    Shapes: x (..., in) -> (..., out); at an embedding x holds token ids. `enabled` False gives the base alone. `folded` says that the
    start was
    written into the base, so that the forward does not subtract it and the disabled forward adds it back. `place` is where the gate of a
    block keeps this site's weight: the block's name and the column.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        site: Site,
        update: Update | None,
        gain: Gain | None,
        offset: Offset | None,
        dropout: float,
        folded: bool = False,
        shared: SharedMember | None = None,
        place: tuple[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.update: Update | None
        self.offset: Offset | None
        if site.owner:
            # Another site's: held as plain references, so that every tensor has one registered owner and is counted, stepped, clipped and
            # saved once. They follow moves and casts, which act on the owner's modules in place, and copies and pickles of the model.
            self.__dict__.update(update=update, offset=offset)
        else:
            self.update = update
            self.offset = offset
        self.gain = gain
        self.site = site
        self.dropout = dropout
        self.folded = folded
        self.shared = shared
        self.place = place
        self.enabled = True
        self.merged = False
        self.kept_weight: Tensor | None = None  # the base weight on the CPU while merged, for an exact way back
        self.kept_bias: tuple[nn.Parameter, ...] = ()  # the base's bias while merged, where the update has one of its own
        self.kept_layer: tuple[nn.Module, ...] = ()  # the base layer itself, where merging put a dense one in its place
        self.original: Tensor | None = None  # the base weight on the CPU before a schedule wrote into it; None if it never does
        self.written = False  # whether a schedule has written into the base weight
        self.aside: Tensor | None = None  # the weight that a schedule has written, while the original stands in its place
        self.master: Tensor | None = None  # the rewritten weight on the CPU in fp32 or wider, for a schedule that folds into that
        self.ledger: list[Round] | None = None  # what was folded into the base weight, for a schedule that keeps a ledger
        self.tied: tuple[nn.Parameter, ...] = ()  # the weight shared with another module, while merging has given the base its own
        # in the mode of what it replaces: a new module would otherwise train inside a model that evaluates
        self.training = base_layer.training
        for part in (self.own_update, gain, None if site.owner else offset):
            if part is not None:
                part.train(base_layer.training)

    @property
    def own_update(self) -> Update | None:
        """The update, where it is this site's own and not another one's that it uses."""
        return None if self.site.owner else self.update

    @property
    def storage(self) -> Storage:
        """How the base layer holds its weight."""
        return storage_of(self.base_layer)

    def subtracted(self) -> Start | None:
        """The start that the forward subtracts: none where there is none or where it is folded into the base."""
        return None if self.offset is None or self.folded else self.offset.start()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.enabled:
            return self._base_forward(x)
        if self.merged:
            return self.base_layer(x)
        storage, update = self.storage, self.update
        factors = None if update is None else update.factors()
        start = self.subtracted()
        # a gain reads the weight just before the product does: in 4 bits that is one dequantization for both
        with nullcontext() if self.gain is None or torch.compiler.is_compiling() else read_once():
            gain = None if self.gain is None else self.gain(self.base_layer, storage, factors, start)
            return operate(
                x,
                self.base_layer,
                storage,
                factors,
                start,
                gain,
                self.dropout if self.training else 0.0,
                None if update is None else update.token_core,
                self.shared,
                None if self.place is None else self._route(x, *self.place),
            )

    def _route(self, x: Tensor, block: str, column: int) -> Tensor:
        """The weight of this site for each sample, from the gate of its block: (batch, 1, ...) with as many dimensions as x."""
        c = required(f"the gate of {block}").routes[block][:, column]
        if len(c) != x.shape[0]:
            raise TrainingError(
                f"{self.site.name} got an input of shape {tuple(x.shape)} in a batch of {len(c)}: its rows are no samples, so routes of "
                "samples cannot act on it; take it out with targets.exclude"
            )
        return c.view(-1, *[1] * (x.dim() - 1))

    @property
    def depends_on_input(self) -> bool:
        """Whether the update is another one for each token or sample, so that no dense weight equals it."""
        return self.place is not None or (self.update is not None and self.update.token_core is not None)

    def _base_forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        # the base holds W - start: give the start back (once a schedule has written into it, the original stands there instead)
        if self.folded and self.offset is not None and not self.written:
            h = nn.functional.linear(x.to(y.dtype), self.offset.down.to(y.dtype))
            y = y + nn.functional.linear(h, (self.offset.up * self.site.scaling).to(y.dtype))
        return y

    def base_weight(self) -> Tensor:
        """The weight that the update stands on, dense (out, in), also while the site is merged or switched off."""
        kept = self.aside if self.aside is not None else self.kept_weight
        return self.storage.read(self.base_layer) if kept is None else kept

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """gain * (W + update - start), dense (out, in), in fp32 (fp64 for an fp64 base); the base layer is not touched."""
        if self.depends_on_input:
            raise TargetError(
                f"{self.site.name} cannot be merged: its update depends on the {'prompt' if self.place else 'token'}; keep the adapter "
                "beside the base"
            )
        storage = self.storage
        weight = storage.read(self.base_layer)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        factors = None if self.update is None else self.update.factors()
        start = self.subtracted()
        delta = dense_update(factors, start)
        gain = None if self.gain is None else self.gain(self.base_layer, storage, factors, start)
        if delta is not None:
            weight = weight + delta.to(weight.dtype)
        return weight if gain is None else weight * gain.to(weight.dtype)[:, None]

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """bias + scaling * shift, (out,), in fp32 at least; None where the update shifts nothing, so that the bias stays as it is."""
        factors = None if self.update is None else self.update.factors()
        if factors is None or factors.shift is None:
            return None
        if self.bias is None:
            raise TargetError(
                f"{self.site.name} cannot be merged: its update adds a trained bias (bias=True), and the layer has none to hold it; keep "
                "the adapter beside the base"
            )
        wide = torch.promote_types(self.bias.dtype, torch.float32)
        return self.bias.to(wide) + (factors.scaling * factors.shift).to(wide)

    # what other code reads of a linear layer
    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return cast("Tensor | None", getattr(self.base_layer, "bias", None))

    @property
    def in_features(self) -> int:
        """Input width."""
        return self.site.in_features

    @property
    def out_features(self) -> int:
        """Output width."""
        return self.site.out_features

    def extra_repr(self) -> str:
        return f"{self.site.in_features} -> {self.site.out_features}, rank={self.site.rank}, scaling={self.site.scaling:g}"


class TrainedModule(nn.Module):
    """A module that trains in full beside the adapters (a classification head); the original is kept for `disabled` and `unadapt`.

    Where originals are dropped, `trained` is the original itself: no second copy, and weights that it shares stay shared.
    """

    def __init__(self, base_layer: nn.Module, trained: nn.Module, name: str) -> None:
        super().__init__()
        self.dtype = _dtype_of(base_layer)  # of the base, also where the original itself becomes an fp32 master
        self.base_layer = base_layer
        self.trained = trained
        self.name = name
        self.enabled = True
        self.training = base_layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled and self.trained is not self.base_layer:
            return self.base_layer(*args, **kwargs)
        masters, base = _dtype_of(self.trained), self.dtype
        if masters == base or torch.is_autocast_enabled(next(self.trained.parameters()).device.type):
            return self.trained(*args, **kwargs)
        # fp32 masters beside a 16-bit base: computed in fp32, handed on in the base's dtype
        args, kwargs = tree_map(lambda value: _cast(value, masters), (args, kwargs))
        return tree_map(lambda value: _cast(value, base), self.trained(*args, **kwargs))

    @property
    def weight(self) -> Tensor:
        """The weight that acts, where other code reads one (TRL's loss at the output head): the trained one, or the base's while off."""
        return cast(Tensor, self._acting.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias that acts, where other code reads one."""
        return cast("Tensor | None", getattr(self._acting, "bias", None))

    @property
    def _acting(self) -> nn.Module:
        return self.trained if self.enabled else self.base_layer


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def adapted_sites(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Site name -> AdaptedLinear, in the model's order."""
    return {module.site.name: module for module in model.modules() if isinstance(module, AdaptedLinear)}


def parts_of(model: nn.Module) -> Iterator[Part]:
    """Every module that holds tensors of an adapter: updates, gains, and gates of blocks."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            yield from (part for part in (module.own_update, module.gain) if part is not None)
        elif isinstance(module, BlockGate):
            yield module


def trained_modules(model: nn.Module) -> dict[str, TrainedModule]:
    """Name -> TrainedModule."""
    return {module.name: module for module in model.modules() if isinstance(module, TrainedModule)}


@contextmanager
def switched(model: nn.Module, enabled: bool) -> Iterator[None]:
    """All sites, gates and trained modules of a model on or off, as they were before at the end."""
    modules = [module for module in model.modules() if isinstance(module, AdaptedLinear | TrainedModule | BlockGate)]
    before = [module.enabled for module in modules]
    try:
        for module in modules:
            module.enabled = enabled
        yield
    finally:
        for module, flag in zip(modules, before, strict=True):
            module.enabled = flag
