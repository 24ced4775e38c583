"""From a plan to an adapted model and back: adapt, disabled, reference, merge, unmerge, unadapt."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise import lean
from rankwise.calibration import beginnings
from rankwise.context import Meter
from rankwise.distributing import distributed
from rankwise.equation import Start, shifted
from rankwise.errors import TargetError
from rankwise.folding import replay
from rankwise.fused_loss import unfuse_loss
from rankwise.guarding import guard, unguard
from rankwise.inits import Beginning, site_generator, stacked_beginnings
from rankwise.ledger import Round
from rankwise.matching import placement
from rankwise.planning import Plan, plan
from rankwise.preparing import needs_dense, prepare
from rankwise.recipe import Recipe
from rankwise.routing import GATE, Block
from rankwise.routing.gating import install, uninstall
from rankwise.sharing import SharedProjection
from rankwise.sites import AdaptedLinear, Offset, TrainedModule, adapted_sites, switched, trained_modules
from rankwise.storage import storage_of
from rankwise.storage.nf4 import NF4Linear, NF4Storage
from rankwise.updates import Site


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
        _replace(model, site.name, adapter)
    for name, _ in made.trained_modules:
        base = modules[name]
        dropped = recipe.schedule.rewrites_base and recipe.schedule.original == "drop"
        module = TrainedModule(base, base if dropped else copy.deepcopy(base), name)
        module.trained.requires_grad_(True)
        for parameter in module.trained.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        _replace(model, name, module)
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


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent_name), last, module)


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
        _swap_in(module)
    try:
        yield
    finally:
        for module in merged_sites:
            _swap_out(module)


@contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """Within the block the base layers that a schedule has written into hold their original weights again."""
    written = [module for module in adapted_sites(model).values() if module.written and module.enabled]
    for module in written:
        _needs_original(module)
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


def _needs_original(module: AdaptedLinear) -> None:
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


@torch.no_grad()
def merge(model: nn.Module, keep_base: bool = True) -> nn.Module:
    """Writes every update into the base weights: in fp32, rounded once to the base's dtype. A layer that is held in 4 bits is replaced by
    a dense one in the dtype that its weight was quantized from: rounding to 4 bits again would lose the update.

    Args:
        model: an adapted model.
        keep_base: keep the base weights on the CPU, so that `unmerge`, `disabled` and `unadapt` give them back bit for bit. False takes the
            adapters off: what returns is a plain model with merged weights, no layer of it in 4 bits.

    Raises:
        TargetError: an update depends on the token, or the base cannot be written.
    """
    record = adapted(model)
    _refuse_while_disabled(model, "merge")
    sites = adapted_sites(model)
    if any(module.merged for module in sites.values()):
        raise TargetError("the model is merged already; call rankwise.unmerge(model) first")
    try:
        for module in sites.values():
            _write_in(model, module)
    except BaseException:  # all or nothing
        for module in sites.values():
            _take_out(module)
        raise
    config = getattr(model, "config", None)
    if any(module.tied for module in sites.values()) and getattr(config, "tie_word_embeddings", False):
        record.untied_config = True
        cast(Any, config).tie_word_embeddings = False
    if not keep_base:
        for name, module in sites.items():
            _replace(model, name, module.base_layer)
        for name, held in [(name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear)]:
            _replace(model, name, held.storage.replaced(held, held.dense_weight()))  # layers without an adapter: one dtype throughout
        for name, trained in trained_modules(model).items():
            _replace(model, name, trained.trained.to(trained.dtype))
        _thaw(model, record)
    return model


def _write_in(model: nn.Module, module: AdaptedLinear) -> None:
    weight, bias = module.merged_weight(), module.merged_bias()
    if not bool(torch.isfinite(weight).all()):
        raise TargetError(f"the merged weight of {module.site.name} is not finite; the adapter is broken")
    _untie(model, module)
    storage = module.storage
    if isinstance(storage, NF4Storage):  # never back into 4 bits: that would round the update away
        module.kept_layer = (module.base_layer,)
        module.base_layer = storage.replaced(module.base_layer, weight)
        if bias is not None:
            module.base_layer.bias = nn.Parameter(bias.to(module.weight.dtype), requires_grad=False)
        module.merged = True
        return
    module.kept_weight = storage.read(module.base_layer).detach().to("cpu", copy=True)
    storage.write(module.base_layer, weight)
    if bias is not None:
        module.kept_bias = (cast(nn.Parameter, module.base_layer.bias),)
        module.base_layer.bias = nn.Parameter(bias.to(module.kept_bias[0].dtype), requires_grad=False)
    module.merged = True


def _take_out(module: AdaptedLinear) -> None:
    """The reverse of `_write_in`, also where that stopped before the end."""
    if module.merged:
        _swap_in(module)
    if module.tied:
        module.base_layer.weight = module.tied[0]
    module.merged, module.kept_weight, module.kept_bias, module.kept_layer, module.tied = False, None, (), (), ()


def _untie(model: nn.Module, module: AdaptedLinear) -> None:
    """Gives a tied base layer a weight of its own, so that merging leaves the other owner alone; the layer remembers the common one."""
    weight = getattr(module.base_layer, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return
    if any(
        other is not module.base_layer and any(parameter is weight for parameter in other._parameters.values()) for other in model.modules()
    ):
        module.tied = (weight,)
        module.base_layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _refuse_while_disabled(model: nn.Module, what: str) -> None:
    if not all(module.enabled for module in adapted_sites(model).values()):
        raise TargetError(
            f"{what} cannot run inside rankwise.disabled(model), which would put the weights of before back; leave the block first"
        )


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Takes the updates out of the base weights again: the base comes back bit for bit, from its copy."""
    record = adapted(model)
    _refuse_while_disabled(model, "unmerge")
    sites = [module for module in adapted_sites(model).values() if module.merged]
    if not sites:
        raise TargetError("the model is not merged; call rankwise.merge(model) first")
    for module in sites:
        _take_out(module)
    if record.untied_config:
        record.untied_config = False
        cast(Any, model).config.tie_word_embeddings = True
    return model


def _swap_in(module: AdaptedLinear) -> None:
    """The kept base weight back into the layer, or the kept layer back into its place; the merged one waits where that was."""
    if module.kept_layer:
        (kept,) = module.kept_layer
        module.kept_layer, module.base_layer = (module.base_layer,), kept.to(module.weight.device)
        return
    assert module.kept_weight is not None
    storage = module.storage
    merged = storage.read(module.base_layer).detach().to("cpu", copy=True)
    storage.write(module.base_layer, module.kept_weight.to(module.weight.device))
    module.kept_weight = merged
    if module.kept_bias:
        (bias,) = module.kept_bias
        module.kept_bias, module.base_layer.bias = (cast(nn.Parameter, module.base_layer.bias),), bias


_swap_out = _swap_in  # swapping twice is the identity


@torch.no_grad()
def unadapt(model: nn.Module) -> nn.Module:
    """Takes the adapters off and gives back the base, bit for bit (to rounding where a recipe rewrote it), with its parameters set as
    before."""
    record = adapted(model)
    _refuse_while_disabled(model, "unadapt")
    if any(module.merged for module in adapted_sites(model).values()):
        unmerge(model)
    for module in adapted_sites(model).values():
        if module.written:
            _needs_original(module)
    for name, module in adapted_sites(model).items():
        base = module.base_layer
        if module.written:
            module.storage.write(base, cast(Tensor, module.original).to(module.weight.device))
        elif module.folded and module.offset is not None:
            base = _unfolded(module, moved(base, module.offset, module.site.scaling, 1.0))
        _replace(model, name, base)
    for name, trained in trained_modules(model).items():
        _replace(model, name, trained.base_layer.to(trained.dtype))
    uninstall(model)
    lean.uninstall(model)
    unfuse_loss(model)
    _thaw(model, record)
    return model


def _unfolded(module: AdaptedLinear, weight: Tensor) -> nn.Module:
    """The base layer with its start given back: written into it, or a dense layer where it holds 4 bits, which would lose the start."""
    storage, layer = module.storage, module.base_layer
    if isinstance(storage, NF4Storage):
        return storage.replaced(layer, weight)
    storage.write(layer, weight)
    return layer


def _thaw(model: nn.Module, record: Adapted) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.trainable.get(name, False))
    unguard(model)
    del model.rankwise
