"""From a plan to an adapted model, and back to its base."""

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from rankwise import lean
from rankwise.calibration import beginnings
from rankwise.distributing import distributed
from rankwise.equation import shifted
from rankwise.errors import TargetError
from rankwise.folding import replay
from rankwise.fused_loss import unfuse_loss
from rankwise.guarding import guard
from rankwise.inits import Beginning, site_generator, stacked_beginnings
from rankwise.matching import placement
from rankwise.merging import refuse_while_disabled, unmerge
from rankwise.original import needs_original
from rankwise.planning import Plan, plan
from rankwise.preparing import needs_dense, prepare
from rankwise.recipe import Recipe
from rankwise.record import Adapted, Stored, adapted, put, thaw
from rankwise.routing import GATE, Block
from rankwise.routing.gating import install, uninstall
from rankwise.sharing import SharedProjection
from rankwise.sites import AdaptedLinear, Offset, TrainedModule, adapted_sites, trained_modules
from rankwise.storage import storage_of
from rankwise.storage.nf4 import NF4Storage
from rankwise.updates import Site


def adapt(model: nn.Module, recipe: Recipe | Plan, calibration: Iterable[Mapping[str, Tensor]] | None = None) -> nn.Module:
    """Puts adapters on a model in place, freezes everything else, and returns the model.

    Args:
        model: the base, weights loaded. Dtype and device stay; adapters are fp32 masters (fp64 on an fp64 base) beside their weights.
        recipe: what to put where; or a plan of this model, such as `allocate` has changed, which is built as it stands.
        calibration: batches (dicts of tensors, as the model takes them; with labels where gradients are needed) for inits that ask for
            statistics (LoRA-GA, CorDA) and schedules that probe (LoRA-drop). Other choices do not read them.

    Raises:
        TargetError, RecipeError: as `plan`; a plan of another model.
        CalibrationError: calibration data that is needed is missing, too small, or gives statistics that are no numbers.
    """
    made = _fitting(model, recipe) if isinstance(recipe, Plan) else plan(model, recipe)
    recipe = made.recipe
    batches = None if calibration is None else list(calibration)
    begun = None if recipe.init.calibration is None else beginnings(model, recipe, made.sites, batches)
    if begun is not None and recipe.init.distributes:
        made, begun = distributed(model, made, begun)
        recipe = made.recipe
    warm: Mapping[str, Mapping[str, Tensor]] = {}
    if recipe.schedule.sample is not None and made.importance is None:
        allocation = recipe.schedule.allocate(model, made, batches, begun)
        made, warm = allocation.plan, allocation.warm
    build(model, recipe, made, begun=begun)
    sites = adapted_sites(model)
    with torch.no_grad():
        for name, values in warm.items():
            for key, value in values.items():
                sites[name].get_parameter(key).copy_(value)
    return model


def _fitting(model: nn.Module, made: Plan) -> Plan:
    """The plan, if its sites are among those that its recipe finds in this model."""
    here = {site.name: site for site in plan(model, made.recipe).sites}
    for site in made.sites:
        if site.name not in here or replace(here[site.name], owner=site.owner, rank=site.rank) != site:
            raise TargetError(f"the plan was made for another model: {site.name} is not as it says; call rankwise.plan on this one")
    return made


def shared_part(model: nn.Module, recipe: Recipe, made: Plan) -> nn.Module | None:
    """What all sites of a plan share (VeRA's pool), made once, beside the first site; None where there is nothing."""
    device, dtype = placement(model.get_submodule(made.sites[0].name))
    return recipe.update.shared(made.sites, device, dtype)


def build(
    model: nn.Module,
    recipe: Recipe,
    made: Plan,
    stored: Mapping[str, Stored] | None = None,
    shared: nn.Module | None = None,
    begun: Mapping[str, Beginning] | None = None,
    gates: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> nn.Module:
    """Builds the adapters of a plan.

    Args:
        model: the base.
        recipe: the recipe of the plan.
        made: the plan.
        stored: site name -> tensors from a file, instead of the recipe's init: no decomposition is run, no number is drawn.
        shared: what `shared_part` made, where the caller had to look at it first.
        begun: site name -> starting pair, of an init that needed calibration.
        gates: block name -> slot name -> tensor, from a file.
    """
    from rankwise.checkpoint.fingerprint import base_fingerprint, held_fingerprint

    modules = dict(model.named_modules())
    record = Adapted(
        recipe,
        made,
        base_fingerprint(modules, made.sites),
        {name: p.requires_grad for name, p in model.named_parameters()},
        list(made.notes),
    )
    model.requires_grad_(False)
    lean.install(model)
    shared = shared_part(model, recipe, made) if shared is None else shared
    prepare(model, recipe, made.held, (site.name for site in made.sites))
    modules = dict(model.named_modules())
    record.held_fingerprint = held_fingerprint(modules, made)
    projections = _shared_projections(recipe, made.sites)
    places = {site: (block.name, column) for block in made.blocks for column, site in enumerate(block.sites)}
    late = set(made.held) if needs_dense(recipe) else set()
    built: dict[str, AdaptedLinear] = {}
    for position, site in enumerate(sorted(made.sites, key=lambda site: bool(site.owner))):  # owners first
        layer = modules[site.name]
        given = None if stored is None else stored[site.name]
        owner = built[site.owner] if site.owner else None
        adapter = built[site.name] = _adapter(
            layer, site, recipe, shared, projections.get(site.group), given, record.notes, begun, late, owner
        )
        adapter.place = places.get(site.name)
        if shared is not None and position == 0:
            adapter.register_module("pool", shared)  # the one registered owner of what all sites share
        put(model, site.name, adapter)
    for name, _ in made.trained_modules:
        base = modules[name]
        dropped = recipe.schedule.rewrites_base and recipe.schedule.original == "drop"
        module = TrainedModule(base, base if dropped else copy.deepcopy(base), name)
        module.trained.requires_grad_(True)
        for parameter in module.trained.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        put(model, name, module)
    for block in made.blocks:
        _gate(model, block, recipe, None if gates is None else gates[block.name])
    if recipe.reads_context:
        install(model)
    model.rankwise = record  # type: ignore[assignment]
    guard(model)
    return model


def _gate(model: nn.Module, block: Block, recipe: Recipe, stored: Mapping[str, Tensor] | None) -> None:
    assert recipe.routing.module is not None
    first = model.get_submodule(block.sites[0])
    assert isinstance(first, AdaptedLinear)
    device, dtype = placement(first.base_layer)
    gate = recipe.routing.module(recipe.routing, block, recipe.frozen_roles, device, torch.promote_types(dtype, torch.float32))
    if stored is None:
        gate.begin(site_generator(recipe.seed, f"{block.name}.{GATE}"))
    else:
        gate.put(**stored)
    module = model.get_submodule(block.name)
    module.register_module(GATE, gate.train(module.training))


def _shared_projections(recipe: Recipe, sites: Iterable[Site]) -> dict[str, SharedProjection]:
    if not recipe.update.shares_down:
        return {}
    members: dict[str, int] = {}
    for site in sites:
        if site.group:
            members[site.group] = members.get(site.group, 0) + 1
    return {group: SharedProjection(count) for group, count in members.items()}


def _adapter(
    layer: nn.Module,
    site: Site,
    recipe: Recipe,
    shared: nn.Module | None,
    projection: SharedProjection | None,
    stored: Stored | None,
    notes: list[str],
    made: Mapping[str, Beginning] | None,
    late_sites: Collection[str],
    owner: AdaptedLinear | None,
) -> AdaptedLinear:
    device, dtype = placement(layer)
    masters = torch.promote_types(dtype, torch.float32)
    storage = storage_of(layer)
    # dense until here where a residual is to be quantized, or the lengths of the original rows are wanted
    late = recipe.storage.quantizes and site.name in late_sites
    rewrites = recipe.schedule.rewrites_base
    untouched = storage.read(layer).to("cpu", copy=True) if rewrites and recipe.schedule.original == "keep" else None
    original = storage.read(layer) if late and recipe.gain.needs_original else None
    update = None if owner is None else owner.update
    offset = None if owner is None else owner.offset
    if owner is None and recipe.update.module is not None:
        update = recipe.update.module(recipe.update, site, recipe.frozen_roles, device, masters, shared)
        if stored is not None:
            update.put(**stored.update)
            if stored.start is not None:
                offset = Offset(*(t.to(device, masters) for t in stored.start))
        else:
            generator = site_generator(recipe.seed, site.name)
            if made is not None:
                begun = stacked_beginnings([made[site.name]] * site.experts)
            else:
                weight = storage.read(layer) if recipe.init.needs_weight else None
                begun = stacked_beginnings([recipe.init.begin(site, weight, None, generator) for _ in range(site.experts)])
                for _ in range(recipe.storage.iterations - 1 if late else 0):
                    begun = recipe.init.begin(site, _lost(weight, begun, site, recipe), None, generator)
            notes.extend(f"{site.name}: {note}" for note in begun.notes)
            down, up = (None if t is None else t.to(device, masters) for t in (begun.down, begun.up))
            update.begin(down, up, recipe.init.nonzero, generator)
            if recipe.moves_base:
                factors = update.factors()
                # without the scaling, which is multiplied last in both: while nothing has moved the two cancel to the last bit
                offset = Offset(factors.down, replace(factors, scaling=1.0).effective_up())
    folded = offset is not None and recipe.base == "fold"
    master = _master(storage.read(layer)) if rewrites and recipe.schedule.master == "fp32" else None
    if stored is not None and stored.weight is not None:
        storage.write(layer, stored.weight)
        if master is not None and folded and offset is not None:  # the file has no more digits; a resumed run puts its own master here
            master.copy_(moved(layer, offset, site.scaling, 1.0))
    elif stored is not None and stored.ledger is not None:
        pass  # replayed below
    elif folded and offset is not None:
        layer = recipe.storage.hold(layer, moved(layer, offset, site.scaling, -1.0), dtype)
    elif late:
        layer = recipe.storage.hold(layer, storage.read(layer), dtype)
    storage = storage_of(layer)
    gain = None
    if recipe.gain.module is not None:
        gain = recipe.gain.module(recipe.gain, site, recipe.frozen_roles, device, masters)
        start = None if offset is None or folded else offset.start()
        gain.begin(layer, storage, None if update is None else update.factors(), start, original)
        if stored is not None:
            gain.restore(**stored.gain)
    member = None if projection is None else projection.member()
    adapter = AdaptedLinear(layer, site, update, gain, offset, recipe.dropout, folded, member)
    adapter.original = untouched
    # a folded start counts too, where the original is there to go back to
    adapter.written = (stored is not None and stored.weight is not None) or (folded and untouched is not None)
    adapter.master = master
    if rewrites and recipe.schedule.ledger:
        adapter.ledger = [] if stored is None or stored.ledger is None else stored.ledger
        if stored is not None:
            replay(adapter)
            adapter.written = True
    return adapter


def _master(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32), copy=True)


@torch.no_grad()
def moved(layer: nn.Module, offset: Offset, scaling: float, sign: float) -> Tensor:
    """W + sign * start, dense (out, in), in fp32 (fp64 for an fp64 base); the layer is not touched."""
    return shifted(storage_of(layer).read(layer), offset.start(), scaling, sign)


@torch.no_grad()
def _lost(weight: Tensor | None, begun: Beginning, site: Site, recipe: Recipe) -> Tensor:
    """What a weight loses when its residual is quantized, the start left out: W - held(W - start), for the next round of QPiSSA."""
    assert weight is not None
    assert begun.up is not None
    assert begun.down is not None
    wide = weight.to(begun.up.dtype)
    return wide - recipe.storage.rounded(wide - site.scaling * begun.up @ begun.down)


@torch.no_grad()
def unadapt(model: nn.Module) -> nn.Module:
    """Takes the adapters off and gives back the base, bit for bit (to rounding where a recipe rewrote it), with its parameters set as
    before."""
    record = adapted(model)
    refuse_while_disabled(model, "unadapt")
    if any(module.merged for module in adapted_sites(model).values()):
        unmerge(model)
    for module in adapted_sites(model).values():
        if module.written:
            needs_original(module)
    for name, module in adapted_sites(model).items():
        base = module.base_layer
        if module.written:
            module.storage.write(base, cast(Tensor, module.original).to(module.weight.device))
        elif module.folded and module.offset is not None:
            base = _unfolded(module, moved(base, module.offset, module.site.scaling, 1.0))
        put(model, name, base)
    for name, trained in trained_modules(model).items():
        put(model, name, trained.base_layer.to(trained.dtype))
    uninstall(model)
    lean.uninstall(model)
    unfuse_loss(model)
    thaw(model, record)
    return model


def _unfolded(module: AdaptedLinear, weight: Tensor) -> nn.Module:
    """The base layer with its start given back: written into it, or a dense layer where it holds 4 bits, which would lose the start."""
    storage, layer = module.storage, module.base_layer
    if isinstance(storage, NF4Storage):
        return storage.replaced(layer, weight)
    storage.write(layer, weight)
    return layer
