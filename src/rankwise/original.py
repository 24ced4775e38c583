"""The base of an adapted model as it was: for a block, or as a model of its own beside the adapted one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise.errors import TargetError
from rankwise.merging import swap_in, swap_out
from rankwise.record import adapted
from rankwise.sites import AdaptedLinear, adapted_sites, switched


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is exactly its base, bit for bit (to rounding where a recipe rewrote the base, as its plan says).

    Nothing is frozen, thawed or moved; nesting is fine. A merged model is unmerged for the block; where a schedule has written into the
    base, the original weights stand in their places for the block.

    Raises:
        TargetError: a schedule has written into the base and its original weights were not kept.
    """
    adapted(model)
    with base_weights(model), original_weights(model), switched(model, enabled=False):
        yield model


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Within the block the base layers of a merged model hold their own weights again."""
    # a site that is off already has its base weight back, from the block around this one
    merged_sites = [module for module in adapted_sites(model).values() if module.merged and module.enabled]
    for module in merged_sites:
        swap_in(module)
    try:
        yield
    finally:
        for module in merged_sites:
            swap_out(module)


@contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """Within the block the base layers that a schedule has written into hold their original weights again."""
    written = [module for module in adapted_sites(model).values() if module.written and module.enabled]
    for module in written:
        needs_original(module)
    for module in written:
        module.aside = module.storage.read(module.base_layer).to("cpu", copy=True)
        module.storage.write(module.base_layer, cast(Tensor, module.original).to(module.weight.device))
    try:
        yield
    finally:
        for module in written:
            module.storage.write(module.base_layer, cast(Tensor, module.aside).to(module.weight.device))
            module.aside = None


def has_base(model: nn.Module) -> bool:
    """Whether `disabled` can give the base back: not once a schedule has written into weights whose originals were dropped."""
    return all(module.original is not None for module in adapted_sites(model).values() if module.written)


def needs_original(module: AdaptedLinear) -> None:
    """Raises TargetError where a schedule has written into the base and the original weight was not kept."""
    if module.original is None:
        raise TargetError(
            f"the training has written into {module.site.name}, and the original weights were not kept (original='drop'); load the base "
            "again, or take the trained model with rankwise.merge(model, keep_base=False)"
        )


class Reference(nn.Module):
    """The base of an adapted model as a callable model of its own, sharing every tensor: DPO's `ref_model` without a second copy.

    Runs in evaluation mode and without gradients, called or asked to `generate`; has no parameters of its own; other attributes are the
    model's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "adapted_model", model)  # unregistered: its parameters are not ours

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # around the whole call: a trainer may put a `forward` of its own in the place of ours, which runs parts of the model (TRL's fused
        # head) or has bound the old one (accelerate's autocast)
        with self._as_base():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_base() as model:
            return model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's `generate`."""
        with self._as_base() as model:
            return cast(Any, model).generate(*args, **kwargs)

    @contextmanager
    def _as_base(self) -> Iterator[nn.Module]:
        model: nn.Module = self.adapted_model
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with torch.no_grad(), disabled(model):
                yield model
        finally:
            for module, mode in modes:
                module.training = mode

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("adapted_model")
            if model is None:
                raise
            return getattr(model, name)


def reference(model: nn.Module) -> Reference:
    """The base of an adapted model, as a callable model that shares its tensors."""
    adapted(model)
    return Reference(model)
