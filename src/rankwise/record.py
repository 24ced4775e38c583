"""What `adapt` leaves on a model, and the small steps that put modules and parameters in and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from rankwise.context import Meter
from rankwise.equation import Start
from rankwise.errors import TargetError
from rankwise.guarding import unguard
from rankwise.ledger import Round
from rankwise.planning import Plan
from rankwise.recipe import Recipe


@dataclass
class Adapted:
    """What adapt leaves on the model: the recipe, the plan, and how the base's parameters were set."""

    recipe: Recipe
    plan: Plan
    fingerprint: str
    trainable: dict[str, bool]  # base parameter name -> requires_grad before
    notes: list[str] = field(default_factory=list)
    held_fingerprint: str | None = None  # of the base as the storage holds it, where that is another form of the same weights
    meter: Meter = field(default_factory=Meter)  # of the losses that are attached to the graph
    untied_config: bool = False  # merging untied weights, and said so in the model's config


@dataclass(frozen=True)
class Stored:
    """The tensors of one site as an adapter file holds them: what `build` takes instead of making a start of its own."""

    update: Mapping[str, Tensor]  # slot name -> tensor
    gain: Mapping[str, Tensor]  # slot name -> what `Gain.saved` gave
    start: Start | None = None  # of a recipe whose init moves the base
    weight: Tensor | None = None  # the base weight as a schedule has written it
    ledger: list[Round] | None = None  # or the rounds that lead to it from the original weight


def adapted(model: nn.Module) -> Adapted:
    """The record of an adapted model.

    Raises:
        TargetError: the model is not adapted.
    """
    record = getattr(model, "rankwise", None)
    if not isinstance(record, Adapted):
        raise TargetError("the model has no adapters; call rankwise.adapt(model, recipe) first")
    return record


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of another, by its path."""
    parent_name, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent_name), last, module)


def thaw(model: nn.Module, record: Adapted) -> None:
    """The base's parameters set as they were before, and the guard against saving it by mistake taken off."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.trainable.get(name, False))
    unguard(model)
    del model.rankwise
