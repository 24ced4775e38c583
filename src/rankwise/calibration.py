"""Calibration: statistics of the frozen base that an init asks for, gathered from a few batches and streamed.

    gradient     G = sum over tokens of g x^T, (out, in), g being the gradient of the loss at the site's output; each batch's mean loss
                 weighs as many as it has tokens with a loss
    covariance   C = mean over tokens of x x^T, (in, in); sites that read one input share it; W C instead where that is smaller

Sites are processed in chunks whose matrices fit a byte budget, each in passes of its own over the batches; the init makes its pair, of the
size of an adapter, and the matrices are dropped. Neither weights nor parameters' gradients are touched: a tap behind each base layer
sees its input and output, so any storage will do, and the backward stops at the first tap.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import CalibrationError
from rankwise.inits import Beginning, Calibration, Statistics, site_generator
from rankwise.recipe import Recipe
from rankwise.storage import storage_of
from rankwise.taps import Facts, Sum, first_input, gradient_tap, input_tap
from rankwise.updates import Site

BUDGET = 2**30  # bytes of matrices that are gathered at once, or one site's where that is more

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Unit:
    """Sites that one accumulator serves: one site, or those that read one input."""

    sites: tuple[Site, ...]
    direct: bool  # gather W C instead of C
    numel: int


def beginnings(
    model: nn.Module, recipe: Recipe, sites: Sequence[Site], calibration: Iterable[Batch] | None, budget: int = BUDGET
) -> dict[str, Beginning]:
    """Site name -> starting pair, of an init that asks for calibration. The model is left as it was: mode, gradients, random state.

    Args:
        model: the base, not adapted.
        recipe: its init asks for statistics.
        sites: of the plan.
        calibration: batches as the model takes them.
        budget: bytes of statistics that may be resident at once; a single site may take more.

    Raises:
        CalibrationError: no batches, no labels where gradients are needed, a site that no batch reaches, too few tokens, statistics that
            are no numbers.
    """
    ask = recipe.init.calibration
    assert ask is not None
    why = f"init={recipe.init.name!r} starts from the {ask.kind} on real data"
    batches = checked_batches(model, calibration, why, ask.kind != "covariance")
    begun: dict[str, Beginning] = {}
    with untouched(model):
        shared = _distinct_inputs(model, sites, batches[0])
        for chunk in chunks(units(sites, ask, shared), budget, sites[0].element):
            gathered = _gather(model, chunk, ask, batches, recipe.seed)
            for unit in chunk:
                statistics = gathered.pop(unit)
                for site in unit.sites:
                    layer = model.get_submodule(site.name)
                    weight = storage_of(layer).read(layer) if recipe.init.needs_weight else None
                    generator = site_generator(recipe.seed, site.name, "calibrated")
                    most = min(recipe.init.candidates(site.rank), max(site.rank, min(site.in_features, site.out_features)))
                    begun[site.name] = recipe.init.begin(replace(site, rank=most), weight, statistics, generator)
                del statistics
    return begun


# --- what is gathered together ---------------------------------------------------------------------------------------------------------


def units(sites: Sequence[Site], ask: Calibration, shared: Mapping[str, str] | None = None) -> list[Unit]:
    """The accumulators that these sites need, in order.

    Args:
        sites: of the plan.
        ask: what is gathered.
        shared: site name -> key of its input; None takes the sites' groups, which names alone suggest.
    """
    members: dict[str, list[Site]] = {}
    for site in sites:
        key = site.name if ask.kind != "covariance" else site.group or site.name if shared is None else shared[site.name]
        members.setdefault(key, []).append(site)
    return [_unit(tuple(group), ask) for group in members.values()]


def _unit(sites: tuple[Site, ...], ask: Calibration) -> Unit:
    site = sites[0]
    if ask.kind == "covariance":
        direct = ask.direct and len(sites) == 1 and site.out_features < site.in_features and not ask.by_sample
        return Unit(sites, direct, site.in_features * (site.out_features if direct else site.in_features))
    if ask.kind == "gradient-sketch":
        return Unit(sites, False, _width(site, ask) * (site.in_features + site.out_features))
    return Unit(sites, False, site.in_features * site.out_features)


def _width(site: Site, ask: Calibration) -> int:
    return min(ask.width * site.rank, site.in_features, site.out_features)


def chunks(parts: Sequence[Unit], budget: int, element: int = 4) -> list[list[Unit]]:
    """Parts in order, as many at once as fit the budget in bytes; at least one."""
    made: list[list[Unit]] = []
    left = 0
    for part in parts:
        size = part.numel * max(4, element)
        if not made or size > left:
            made.append([])
            left = budget
        made[-1].append(part)
        left -= size
    return made


def note(ask: Calibration, sites: Sequence[Site], budget: int = BUDGET) -> str:
    """What a plan says about the calibration to come."""
    from rankwise.report import human_bytes

    made = chunks(units(sites, ask), budget, sites[0].element)
    sweeps = len(made) * (2 if ask.kind == "gradient-sketch" else 1)
    most = max(sum(part.numel for part in chunk) for chunk in made) * max(4, sites[0].element)
    what = "forward only" if ask.kind == "covariance" else "forward and backward"
    times = "once" if sweeps == 1 else f"{sweeps} times"
    return (
        f"calibration runs before training ({ask.kind}): {ask.rows} rows of the training data, {what}, {times}; "
        f"at most {human_bytes(most)} of statistics at once"
    )


# --- batches and the model's state -----------------------------------------------------------------------------------------------------


def checked_batches(model: nn.Module, given: Iterable[Batch] | None, why: str, needs_loss: bool) -> list[dict[str, Any]]:
    """The batches in a list, on the model's device.

    Raises CalibrationError where there are none, with the reason `why` they are needed, or one has no loss where that is needed.
    """
    found = [] if given is None else list(given)
    if not found:
        what = "is missing" if given is None else "holds no batch"
        raise CalibrationError(
            f"calibration {what}, and {why}; pass calibration=[batch, ...] to adapt, each a dict of tensors as the model takes them "
            "(rankwise train takes rows of the training data by itself)"
        )
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    made: list[dict[str, Any]] = []
    for index, batch in enumerate(found):
        if not isinstance(batch, Mapping):
            raise CalibrationError(f"calibration[{index}] is a {type(batch).__name__}; give a dict of tensors as the model takes them")
        if needs_loss and _with_loss(batch) == 0:
            raise CalibrationError(f"calibration[{index}] has no token with a loss: all its labels are -100; leave it out")
        made.append({key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    return made


def _with_loss(batch: Batch) -> int:
    """How many terms the mean loss of a batch has: tokens with a label, shifted as causal models do, or rows."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return 1
    if labels.dim() < 2 or labels.is_floating_point():
        return labels.shape[0] if labels.dim() else 1
    return int((labels[:, 1:] != -100).sum())


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within the block the model evaluates and nothing of it asks for gradients; afterwards all is as before, random state included."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted({p.device.index or 0 for p, _ in flags if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            for parameter, _ in flags:
                parameter.requires_grad = False
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad = flag
            for module, mode in modes:
                module.training = mode


def _distinct_inputs(model: nn.Module, sites: Sequence[Site], batch: Batch) -> dict[str, str]:
    """Site name -> the first site that reads the very same tensor, found in one forward among the sites whose names suggest it.

    Raises CalibrationError for a site that the forward does not reach.
    """
    found: dict[str, str] = {}
    latest: dict[str, tuple[Any, str]] = {}  # group -> its latest input, not kept alive, and who read it first

    def watch(site: Site) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = first_input(args, kwargs)
            before = latest.get(site.group)
            if before is not None and _same(before[0](), x):
                found.setdefault(site.name, before[1])
                return
            found.setdefault(site.name, site.name)
            if site.group:
                latest[site.group] = (weakref.ref(x), site.name)

        return hook

    with torch.no_grad(), _hooked(model, {site.name: watch(site) for site in sites}):
        model(**batch)
    for site in sites:
        if site.name not in found:
            raise CalibrationError(f"{site.name} was not called by the calibration batches, so nothing is known of it; exclude this site")
    return found


def _same(one: Tensor | None, other: Tensor) -> bool:
    if one is None:
        return False
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride())


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    handles = []
    try:
        for name, hook in hooks.items():
            handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- one chunk -------------------------------------------------------------------------------------------------------------------------


def _gather(model: nn.Module, chunk: Sequence[Unit], ask: Calibration, batches: list[dict[str, Any]], seed: int) -> dict[Unit, Statistics]:
    """Unit -> its statistics, from one pass over the batches (two for a sketch)."""
    if ask.kind == "covariance":
        sums = {unit: Sum() for unit in chunk}
        _sum_inputs(model, sums, batches, ask)
        samples = sum(next(value.shape[0] for value in batch.values() if isinstance(value, Tensor)) for batch in batches)
        return {unit: _input_statistics(unit, sums.pop(unit), samples if ask.by_sample else None) for unit in chunk}
    if ask.kind == "gradient":
        sums = {unit: Sum() for unit in chunk}
        _sum_gradients(model, sums, batches)
        return {unit: _gradient_statistics(unit, sums.pop(unit)) for unit in chunk}
    sums = {}
    for unit in chunk:
        site = unit.sites[0]
        random = torch.randn(site.in_features, _width(site, ask), generator=site_generator(seed, site.name, "sketch"))
        sums[unit] = Sum(right=random)
    _sum_gradients(model, sums, batches)  # G random, (out, width)
    sums = {unit: Sum(left=torch.linalg.qr(_finite(unit, sums[unit])).Q) for unit in chunk}
    _sum_gradients(model, sums, batches)  # basis^T G, (width, in)
    return {unit: _gradient_statistics(unit, sums.pop(unit)) for unit in chunk}


def _sum_inputs(model: nn.Module, sums: Mapping[Unit, Sum], batches: Sequence[Batch], ask: Calibration) -> None:
    facts = [Facts({})]
    # the first site of a unit stands for the others, which read the same tensor
    taps = {unit.sites[0].name: input_tap(into, facts, unit.direct, ask.by_sample) for unit, into in sums.items()}
    with torch.no_grad(), _hooked(model, taps):
        for batch in batches:
            facts[0] = Facts(batch, labelled=ask.labelled)
            model(**batch)


def _sum_gradients(model: nn.Module, sums: Mapping[Unit, Sum], batches: Sequence[Batch]) -> None:
    facts = [Facts({})]
    anchor = torch.zeros((), requires_grad=True)
    taps = {unit.sites[0].name: gradient_tap(into, facts, anchor) for unit, into in sums.items()}
    total = sum(_with_loss(batch) for batch in batches)
    with torch.enable_grad(), _hooked(model, taps):
        for batch in batches:
            facts[0] = Facts(batch, _with_loss(batch) / total)
            loss = loss_of(model(**batch))
            if loss.requires_grad:  # else no site of this chunk was called
                loss.backward()
            del loss


def loss_of(output: Any) -> Tensor:
    """The loss that a model returned. Raises CalibrationError where there is none."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise CalibrationError(
            "the model returned no loss for a calibration batch, and the gradient is taken of it; put labels into the batches"
        )
    return loss


def _finite(unit: Unit, sums: Sum) -> Tensor:
    name = unit.sites[0].name
    if sums.matrix is None:
        raise CalibrationError(
            f"no gradient reached {name} from the calibration batches: the loss does not depend on it; exclude this site"
        )
    if not bool(torch.isfinite(sums.matrix).all()):
        raise CalibrationError(
            f"the calibration statistics at {name} are not finite; look for broken rows or weights, or load the base in a wider dtype"
        )
    return sums.matrix


def _gradient_statistics(unit: Unit, sums: Sum) -> Statistics:
    return Statistics(sums.tokens, gradient=_finite(unit, sums), basis=sums.left)


def _input_statistics(unit: Unit, sums: Sum, samples: int | None) -> Statistics:
    divisor = max(1, sums.tokens if samples is None else samples)
    matrix = _finite(unit, sums).div_(divisor)
    energy = sums.energy / divisor
    if unit.direct:
        return Statistics(sums.tokens, product=matrix, energy=energy)
    return Statistics(sums.tokens, covariance=matrix, energy=energy, mean=None if sums.total is None else sums.total / divisor)
