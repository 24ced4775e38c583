"""A probe: ordinary adapters, trained for a few steps on a sample, measured, and taken off again.

The base is as it was afterwards, bit for bit, and so are modes, gradients, flags and the random state, so that what is trained next does
not depend on there having been a probe. A start is subtracted here even where the recipe folds it, and weights stay as they were loaded
even where the recipe holds them in 4 bits: both would change the base.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rankwise.adapting import build, unadapt
from rankwise.calibration import checked_batches, loss_of, untouched
from rankwise.errors import CalibrationError
from rankwise.importance import Importance, measure
from rankwise.inits import Beginning
from rankwise.optim import optimizer
from rankwise.planning import plan
from rankwise.recipe import Recipe
from rankwise.sites import adapted_sites

MOST_STEPS = 200  # of one pass over the sample, unless a number of steps is asked for
CLIP = 1.0  # largest norm of a step's gradient, as in training


class Probed(NamedTuple):
    """What a probe leaves."""

    importance: Importance
    trained: dict[str, dict[str, Tensor]]  # site -> parameter name within the site -> its value at the end


def probe(model: nn.Module, recipe: Recipe, batches: Iterable[Mapping[str, Any]], steps: int | None = None) -> Importance:
    """How much each site of a recipe matters on this data, after a short training of all of them. The model is left as it was.

    Args:
        model: the base, not adapted.
        recipe: the adapters to probe with; its learning rate and seed are the probe's. Its schedule and storage are not used.
        batches: dicts of tensors as the model takes them, with labels: the sample, trained on and measured on.
        steps: optimizer steps, one batch each; None for one pass, at most 200. With 0 nothing has an output yet.

    Raises:
        TargetError, RecipeError: as `plan`.
        CalibrationError: no batches, no labels, a loss or an output that is no number, a site that no batch reaches.
    """
    return run_probe(model, recipe, batches, steps).importance


def run_probe(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Mapping[str, Any]] | None,
    steps: int | None = None,
    begun: Mapping[str, Beginning] | None = None,
) -> Probed:
    """The same, with the trained values, and with the starting pairs of an init that was calibrated already."""
    recipe = recipe.replace(schedule="none", storage="keep", base="keep")
    made = plan(model, recipe)
    if begun is None and recipe.init.calibration is not None:
        from rankwise.calibration import beginnings

        batches = None if batches is None else list(batches)
        begun = beginnings(model, recipe, made.sites, batches)
    data = checked_batches(model, batches, "a probe trains on real data", needs_loss=True)
    count = _fewest(min(len(data), MOST_STEPS) if steps is None else steps)
    with untouched(model), torch.enable_grad():
        torch.manual_seed(recipe.seed)  # dropout of the probe; `untouched` puts the state back
        build(model, recipe, made, begun=begun)
        try:
            _train(model, data, count)
            importance = measure(model, data)
            trained = {
                name: {key: p.detach().clone() for key, p in module.named_parameters() if p.requires_grad}
                for name, module in adapted_sites(model).items()
            }
        finally:
            unadapt(model)
    return Probed(Importance(importance.sites, count), trained)


def _train(model: nn.Module, batches: Sequence[Mapping[str, Any]], steps: int) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()  # running statistics belong to the base
    # what learns on a second level takes its steps on the sample too: it is thrown away with the rest
    stepping = optimizer(model, total_steps=max(1, steps), validation=batches)
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in range(steps):
        loss = loss_of(model(**batches[step % len(batches)]))
        if not math.isfinite(float(loss.detach())):
            raise CalibrationError(
                f"the loss of the probe is {float(loss.detach())} at step {step + 1}; lower lr, or look for broken rows or weights"
            )
        loss.backward()
        _average([p for p in trained if p.grad is not None])
        nn.utils.clip_grad_norm_(trained, CLIP)
        stepping.step()
        stepping.zero_grad()
    stepping.rankwise_session.close()  # type: ignore[attr-defined]


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _average(parameters: Sequence[nn.Parameter]) -> None:
    """The mean gradient of all processes, which train one probe on their shares of the sample."""
    count = _processes()
    for parameter in parameters if count > 1 else ():
        assert parameter.grad is not None
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad.div_(count)


def _fewest(steps: int) -> int:
    """The number of steps that every process can take."""
    if _processes() == 1:
        return steps
    counts: list[Any] = [None] * _processes()
    torch.distributed.all_gather_object(counts, steps)
    return min(counts)
