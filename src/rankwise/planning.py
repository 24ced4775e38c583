"""The plan: which sites, which ranks, how many parameters, how much memory and arithmetic. Touches no tensor; a model on `meta` will do."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from rankwise.calibration import note as calibration_note
from rankwise.eightbit import bytes_of
from rankwise.errors import RecipeError, TargetError
from rankwise.kernels.site import keeps_product
from rankwise.matching import (
    block_of,
    find_sites,
    group_of,
    kind_of,
    matches,
    placement,
    shared_module_paths,
    stacked_weights,
    tied_names,
    widths_of,
)
from rankwise.preparing import dense_bytes, layers_to_hold
from rankwise.recipe import Recipe
from rankwise.report import human_bytes
from rankwise.routing import Block
from rankwise.routing.gating import gates_of
from rankwise.sites import AdaptedLinear, adapted_sites, trained_modules
from rankwise.storage import NF4Linear
from rankwise.storage.bnb_layout import is_bitsandbytes_4bit
from rankwise.updates import Site, Slot

if TYPE_CHECKING:
    from rankwise.importance import Importance


@dataclass(frozen=True)
class Coverage:
    """One row of the coverage table: what a pattern matched."""

    pattern: str
    matched: int  # sites
    total: int  # linear layers of the model
    shapes: tuple[str, ...]  # distinct 'out x in'
    ranks: tuple[int, ...]
    parameters: int  # trained ones


@dataclass(frozen=True)
class Plan:
    """What adapting a model with a recipe will do. `str(plan)` is what the command prints."""

    recipe: Recipe
    sites: tuple[Site, ...]
    trained_modules: tuple[tuple[str, int], ...]  # (name, parameters)
    coverage: tuple[Coverage, ...]
    base_parameters: int
    base_bytes: int
    notes: tuple[str, ...] = ()
    held: tuple[str, ...] = ()  # linear layers that the storage replaces by its own form
    blocks: tuple[Block, ...] = ()  # that get a gate
    workspace: int = 0  # bytes of the largest weight that is dense for the length of a product only
    importance: "Importance | None" = None  # what the allocation of updates to sites was decided from

    def parameters_of(self, site: Site) -> int:
        """Trained numbers at one site."""
        return site_parameters(self.recipe, site)

    @property
    def adapter_parameters(self) -> int:
        """Trained numbers in all adapters, gates of blocks among them."""
        return sum(self.parameters_of(site) for site in self.sites) + sum(gate_parameters(self.recipe, block) for block in self.blocks)

    @property
    def trained_parameters(self) -> int:
        """Trained numbers in all: adapters and modules that train in full."""
        return self.adapter_parameters + sum(count for _, count in self.trained_modules)

    @property
    def frozen_adapter_numbers(self) -> int:
        """Frozen numbers that the adapters hold: frozen factors, starts, DoRA's two constant vectors; VeRA's pool."""
        return self._frozen_own_numbers + self.recipe.update.shared_numbers(self.sites)

    @property
    def _frozen_own_numbers(self) -> int:
        count = 0
        for site in self.sites:
            slots = own_slots(self.recipe, site)
            count += sum(slot.numel for slot in slots.values() if not slot.trains(self.recipe.frozen_roles))
            if self.recipe.moves_base and not site.owner:
                count += site.rank * (site.in_features + site.out_features)
            if self.recipe.gain.name == "dora":
                count += 2 * site.out_features
        for block in self.blocks:
            slots = self.recipe.routing.slots(block).values()
            count += sum(slot.numel for slot in slots if not slot.trains(self.recipe.frozen_roles))
        return count

    def _moment_bytes(self, master: int) -> int:
        """One moment of everything that the optimizer keeps moments of: not of roles whose gradients are steps already. In 8 bits each
        module that trains in full counts as one tensor."""
        frozen, direct = self.recipe.frozen_roles, self.recipe.gradient.direct
        slots = [slot for site in self.sites for slot in (self.recipe.update.slots(site) | self.recipe.gain.slots(site)).values()]
        tensors = [slot.numel for slot in slots if slot.trains(frozen) and slot.role not in direct]
        tensors += [count for _, count in self.trained_modules]
        return sum(bytes_of(numel, master) if self.recipe.states == "8bit" else master * numel for numel in tensors)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes, exact: base weights, adapters (fp32 masters, fp64 on an fp64 base; a shared pool in the base's dtype), their gradients,
        AdamW's two moments, and what the recipe's rule for gradients and its schedule keep beside them."""
        element = self.sites[0].element
        master, trained = max(4, element), self.trained_parameters
        state = sum(axis.state_bytes(self.recipe, self.sites) for axis in (self.recipe.gradient, self.recipe.schedule))
        schedule = self.recipe.schedule
        kept = schedule.rewrites_base and schedule.original == "keep"
        # a module that trains in full is the base's own where originals are dropped: only what its numbers grow by is new
        held = element * (trained - self.adapter_parameters) if schedule.rewrites_base and not kept else 0
        original = sum(site.in_features * site.out_features * site.element for site in self.sites) if kept else 0
        return {
            "base weights": self.base_bytes,
            **({"dequantized weight": self.workspace} if self.workspace else {}),
            **({"original weights (on the CPU)": original} if original else {}),
            **schedule.held(self.sites),
            "adapters": master * (trained + self._frozen_own_numbers) - held + element * self.recipe.update.shared_numbers(self.sites),
            "gradients": master * trained,
            "AdamW moments": 2 * self._moment_bytes(master),
            **({"state of the method": state} if state else {}),
        }

    def saved_bytes_per_token(self, element: int = 2) -> int:
        """Bytes that the adapters keep for the backward per token: each distinct input once, each projection, what the gain needs.

        Behind norms and gated products that are lean (`lean.py`) inputs are made again instead of kept: there it is an upper bound.
        Positions of dropout, 4 p bytes for each element of an input, come on top.

        Args:
            element: bytes of one activation (2 for bf16, 4 for fp32).
        """
        inputs: set[str] = set()
        shared: set[str] = set()
        total = ids = 0
        for site in self.sites:
            trained = trained_roles(self.recipe, site)
            key = site.group or site.name
            if "down" in trained and key not in inputs:
                inputs.add(key)
                if site.kind == "embedding":
                    ids += 8  # the token's id stands for its one-hot row
                else:
                    total += site.in_features
            if trained - {"down"} and site.rank and not (self.recipe.update.shares_down and site.group and key in shared):
                shared.add(key)
                total += self.recipe.update.width_at(site)
            if self._keeps_product(site, trained):
                total += site.out_features
            if self.recipe.gain.name != "none":
                total += site.out_features
        return total * element + ids

    def _keeps_product(self, site: Site, trained: frozenset[str]) -> bool:
        return not self.recipe.moves_base and keeps_product(self.recipe.update.width_at(site), "up" in trained, "tail" in trained)

    @property
    def flops_per_token(self) -> dict[str, int]:
        """Floating-point operations per token and training step, of the adapted layers: the frozen base (forward and input gradient), the
        branch. Products over the tokens only; work on the factors alone does not grow with them."""
        base = sum(4 * site.in_features * site.out_features for site in self.sites if site.kind != "embedding")
        start = 4 if self.recipe.moves_base and self.recipe.base == "keep" else 0
        projected: set[str] = set()
        branch = 0
        for site in self.sites:
            trained = trained_roles(self.recipe, site)
            inner = 4 + start + (2 if "down" in trained else 0)  # products with `down`: forward, gradients of x and of `down`
            # products with `up`: forward, gradient of h, and one for what stands behind h, but of a core alone, or where up h is kept
            behind = bool(trained - {"down", "core"} or (start and trained - {"down"})) and not self._keeps_product(site, trained)
            outer = 4 + start + (2 if behind else 0)
            if site.kind == "embedding" or (self.recipe.update.shares_down and site.group in projected):
                inner = 0
            if site.group:
                projected.add(site.group)
            branch += self.recipe.update.width_at(site) * (inner * site.in_features + outer * site.out_features)
        return {"frozen base": base, "branch": branch}

    def resized(self, ranks: Mapping[str, int]) -> "Plan":
        """The same plan with other ranks at some sites, by name; their scaling stays."""
        sites = [replace(site, rank=ranks.get(site.name, site.rank)) for site in self.sites]
        return self._with(sites)

    def grown(self, experts: Mapping[str, int]) -> "Plan":
        """The same plan with another number of experts at some sites, by name."""
        return self._with([replace(site, experts=experts.get(site.name, site.experts)) for site in self.sites])

    def _with(self, sites: list[Site]) -> "Plan":
        return replace(self, sites=tuple(sites), coverage=coverage(self.recipe, sites, self.coverage[0].total, self.blocks))

    def allocated(self, owners: Mapping[str, str], removed: Collection[str] = (), importance: "Importance | None" = None) -> "Plan":
        """The same plan in which some sites use the update of another one, and some are no sites any more.

        Args:
            owners: site name -> name of the site whose update it uses; the others have one of their own.
            removed: names of sites to leave out.
            importance: what this was decided from; kept with the plan, and saved with adapters.

        Raises:
            RecipeError: an owner that is no site, uses another one's update itself, or has other shapes or another scaling.
        """
        there = {site.name: site for site in self.sites if site.name not in removed}
        for name, owner in owners.items():
            _check_owner(there, name, owner, owners)
        sites = [replace(site, owner=owners.get(name, "")) for name, site in there.items()]
        forecast = self.recipe.schedule.notes(self.sites)
        notes = [note for note in self.notes if note not in forecast]
        if importance is not None:
            shared = len(set(owners.values()))
            left = f", {len(removed)} have none" if removed else ""
            notes.append(
                f"importance: of {len(self.sites)} sites {len(there) - len(owners) - shared} have an update of their own, "
                f"{len(owners) + shared} share {shared}{left}"
            )
            notes += [f"importance: the probe left no output at {group}, so all of it keeps its own" for group in importance.silent]
        made = replace(self, sites=tuple(sites), notes=tuple(notes), importance=importance)
        return replace(made, coverage=coverage(self.recipe, sites, self.coverage[0].total, self.blocks))

    def __str__(self) -> str:
        from rankwise.report import plan_text

        return plan_text(self)


def _check_owner(sites: Mapping[str, Site], name: str, owner: str, owners: Mapping[str, str]) -> None:
    if name not in sites or owner not in sites or owner in owners:
        raise RecipeError(f"{name} is to use the update of {owner!r}, and both must be sites of the plan, the owner with its own update")
    for label in ("kind", "in_features", "out_features", "rank", "experts", "scaling"):
        mine, its = getattr(sites[name], label), getattr(sites[owner], label)
        if mine != its:
            raise RecipeError(f"{name} cannot use the update of {owner}: {label} is {mine} here and {its} there")


def trained_roles(recipe: Recipe, site: Site) -> frozenset[str]:
    """The roles of the update that train at a site: those of the recipe, less what is frozen at this site alone."""
    return recipe.update.trained_factors(site, recipe.frozen_roles)


def site_parameters(recipe: Recipe, site: Site) -> int:
    """Trained numbers of a recipe at a site, from shapes alone."""
    return sum(slot.numel for slot in own_slots(recipe, site).values() if slot.trains(recipe.frozen_roles))


def own_slots(recipe: Recipe, site: Site) -> dict[str, Slot]:
    """The tensors that one site owns: of its gain, and of its update where that is not another site's."""
    return ({} if site.owner else recipe.update.slots(site)) | recipe.gain.slots(site)


def gate_parameters(recipe: Recipe, block: Block) -> int:
    """Trained numbers of the gate of a block."""
    return sum(slot.numel for slot in recipe.routing.slots(block).values() if slot.trains(recipe.frozen_roles))


def plan(model: nn.Module, recipe: Recipe, trained: bool = False) -> Plan:
    """What `adapt(model, recipe)` will do, without touching a tensor.

    Args:
        model: the base, on any device, `meta` included; not adapted yet.
        recipe: the recipe.
        trained: the factors exist already, so a rank above a layer's smaller side is noted instead of refused: a folder whose ranks were
            filled up with zeros computes what it should.

    Raises:
        TargetError: a pattern that matches nothing, a module that cannot be adapted, a shared module, a folded tied weight.
        RecipeError: a rank larger than a side where that is redundant, a pattern of ranks that matches nothing.
    """
    apart = _modules_to_save(model, recipe)
    found = find_sites(model, recipe.targets, tuple(name for name, _ in apart))
    tied, shared = tied_names(model), shared_module_paths(model)
    groups = Counter(group_of(name) for name in found)
    notes: list[str] = []
    sites = []
    lowered: dict[int, list[str]] = {}
    for name, (module, pattern) in found.items():
        kind = kind_of(module)
        assert kind is not None
        if id(module) in shared:
            paths = ", ".join(shared[id(module)])
            raise TargetError(f"{name} is one module under several paths ({paths}); an adapter would act at all of them; exclude it")
        width_in, width_out = widths_of(module)
        rank = int(_last_match(recipe.rank_pattern, name, recipe.rank)) if recipe.update.name != "none" else 0
        asked, rank = rank, recipe.update.rank_at(rank, width_out, width_in) if rank else rank
        if rank < asked:
            lowered.setdefault(asked, []).append(f"{name} ({rank})")
        alpha = _last_match(recipe.alpha_pattern, name, recipe.alpha_of(rank))
        asked, rank = rank, recipe.schedule.bound(rank, min(width_in, width_out))
        if rank < asked:
            notes.append(f"{name} takes rank {rank} instead of {asked}: schedule={recipe.schedule.name!r} leaves no more there")
        if recipe.update.rank_bounded and rank > min(width_in, width_out) and trained:
            notes.append(f"rank={rank} at {name} is larger than its smaller side {min(width_in, width_out)}: it could be lower")
        elif recipe.update.rank_bounded and rank > min(width_in, width_out):
            raise RecipeError(
                f"rank={rank} at {name} is larger than its smaller side {min(width_in, width_out)}: the extra factors would be redundant; "
                f"lower the rank, set rank_pattern for this site, or exclude it"
            )
        _check_kind(recipe, name, kind)
        _check_held(recipe, name, module)
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and id(weight) in tied:
            others = ", ".join(other for other in tied[id(weight)] if other != name)
            if recipe.base == "fold" or recipe.schedule.rewrites_base:
                what = f"schedule={recipe.schedule.name!r}" if recipe.schedule.rewrites_base else "base='fold'"
                instead = "" if recipe.schedule.rewrites_base else "use base='keep' or "
                raise TargetError(f"{name} shares its weight with {others}, which {what} would change too; {instead}exclude it")
            notes.append(f"{name} shares its weight with {others}; merging will give {name} a weight of its own")
        group = group_of(name) if groups[group_of(name)] > 1 else ""
        size = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        has_bias = getattr(module, "bias", None) is not None
        scaling = recipe.scaling_of(asked, alpha)
        element = placement(module)[1].itemsize
        experts = recipe.update.experts
        sites.append(Site(name, kind, width_in, width_out, rank, scaling, alpha, group, pattern, has_bias, size, element, experts))
    for label, patterns in (("rank_pattern", recipe.rank_pattern), ("alpha_pattern", recipe.alpha_pattern)):
        for pattern in patterns:
            if not any(matches(pattern, site.name) for site in sites):
                names = ", ".join(sorted({site.name.rpartition(".")[2] for site in sites}))
                raise RecipeError(f"{label}: {pattern!r} matches none of the sites, which are named {names}")
    recipe.schedule.check(sites)
    if recipe.update.whole_rows and getattr(model, "can_generate", bool)():
        raise RecipeError(
            f"update={recipe.update.name!r} with these options reads a whole row before it acts on its first token, and this model writes "
            "token after token: earlier ones would see later ones in training, and could not when it generates; use granularity='token'"
        )
    notes += [
        f"rank {asked} is above the smaller side of {len(names)} sites, which take that side: {names[0]}"
        + (f" to {names[-1]}" if len(names) > 1 else "")
        for asked, names in lowered.items()
    ]
    notes += [*recipe.init.notes(sites), *recipe.schedule.notes(sites)]
    blocks = _blocks(model, recipe, sites)
    recipe.routing.check(blocks)
    if recipe.schedule.rewrites_base:
        notes.append(_rewriting_note(recipe))
    elif recipe.base == "fold":
        notes.append("base='fold' rewrites the base weights: disabled() and unadapt() give the base back to rounding, not bit for bit")
    if recipe.init.calibration is not None:
        notes.append(calibration_note(recipe.init.calibration, sites))
    if recipe.update.start_size:
        notes.append(
            f"the update starts at a size of {recipe.update.start_size:g} (spectral norm) and not at zero, so the start is the base "
            "to about that; exact_zero=True subtracts it"
        )
    if recipe.gain.name == "propulsion" and any(site.has_bias for site in sites):
        notes.append("the gain leaves biases out, as everywhere here; the paper's Propulsion multiplies them too")
    if recipe.update.name == "vera" and recipe.lr < 1e-3:
        notes.append(f"lr={recipe.lr:g} is low for VeRA, whose vectors need 10 to 100 times LoRA's rate")
    crowded = [site for site in sites if site.experts > 1 and site.width > min(site.in_features, site.out_features)]
    if crowded:
        first = crowded[0]
        notes.append(
            f"{first.experts} experts of rank {first.rank} together exceed the smaller side of {len(crowded)} sites, such as {first.name} "
            f"({first.width} above {min(first.in_features, first.out_features)}): there they repeat each other; lower experts or rank"
        )
    notes += _expert_notes(model, recipe, [name for name, _ in apart])
    base = _base_size(model, recipe, [name for name, _ in apart])
    notes += base.notes
    return Plan(
        recipe,
        tuple(sites),
        tuple((name, sum(p.numel() for p in module.parameters())) for name, module in apart),
        coverage(recipe, sites, _linear_count(model), blocks),
        base.parameters,
        base.bytes,
        tuple(notes),
        base.held,
        blocks,
        base.workspace,
    )


def _blocks(model: nn.Module, recipe: Recipe, sites: Sequence[Site]) -> tuple[Block, ...]:
    """The blocks that get a gate, in the model's order; none where the routing has no gates."""
    if recipe.routing.module is None:
        return ()
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TargetError(
            f"routing={recipe.routing.name!r} reads the prompt before each block, and this model has an encoder and a decoder; use "
            "routing='none'"
        )
    members: dict[str, list[Site]] = {}
    for site in sites:
        members.setdefault(block_of(site.name), []).append(site)
    if outside := members.get(""):
        raise TargetError(
            f"{outside[0].name} lies in no transformer block, and routing={recipe.routing.name!r} has one gate a block; take it out with "
            "targets.exclude"
        )
    for name in members:
        if isinstance(block := model.get_submodule(name), nn.Sequential | nn.ModuleList | nn.ModuleDict):
            raise TargetError(
                f"{name} is a {type(block).__name__}, which would run or hold the gate as one of its own parts; "
                f"routing={recipe.routing.name!r} needs blocks with a forward of their own"
            )
    text = getattr(config, "get_text_config", lambda: config)()
    width = getattr(text, "hidden_size", None)
    return tuple(Block(name, width or mine[0].in_features, tuple(site.name for site in mine)) for name, mine in members.items())


def _expert_notes(model: nn.Module, recipe: Recipe, apart: Sequence[str]) -> list[str]:
    """What no adapter acts on because it is no linear layer: experts that a model holds as stacks of matrices."""
    stacked = {name: weight for name, weight in stacked_weights(model).items() if not any(name.startswith(f"{o}.") for o in apart)}
    if not stacked:
        return []
    names, count = list(stacked), sum(weight.numel() for weight in stacked.values())
    reach = names[0] + (f" to {names[-1]}" if len(names) > 1 else "")
    note = (
        f"{count:,} parameters of experts are not adapted and stay frozen: {len(names)} tensors hold several matrices each and are no "
        f"linear layers ({reach})"
    )
    also = [pattern for pattern in recipe.targets.include if any(matches(pattern, name) for name in names)]
    if also:
        note += f"; {', '.join(map(repr, also))} among the targets names some of them, and reaches only the linear layers of that name"
    return [note]


def _rewriting_note(recipe: Recipe) -> str:
    name = recipe.schedule.name
    held = "what it has folded into them" if recipe.schedule.ledger else "them"
    said = f"schedule={name!r} writes into the base weights while training, and an adapter file holds {held}"
    if recipe.schedule.original == "keep":
        return f"{said}; their originals are kept on the CPU, so disabled() and unadapt() give the base back bit for bit"
    return f"{said}; their originals are dropped (original='drop'), so disabled() and unadapt() are refused once a step was taken"


class _Base(NamedTuple):
    parameters: int
    bytes: int
    held: tuple[str, ...]
    workspace: int
    notes: list[str]


def _base_size(model: nn.Module, recipe: Recipe, apart: list[str]) -> _Base:
    """The base as it will be held: numbers, bytes, what is replaced, the largest weight that is made dense for a product."""
    modules = dict(model.named_modules())
    held, notes = layers_to_hold(model, recipe, apart)
    quantized = {name: module for name, module in modules.items() if isinstance(module, NF4Linear)}
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters) + sum(m.in_features * m.out_features for m in quantized.values())
    size = sum(p.numel() * p.element_size() for p in parameters) + sum(dense_bytes(m) for m in quantized.values())
    workspace = 0
    for name in {*held, *quantized}:
        width_in, width_out = widths_of(modules[name])
        workspace = max(workspace, width_in * width_out * placement(modules[name])[1].itemsize)
    if held:
        before = sum(dense_bytes(modules[name]) for name in held)
        after = sum(_held_bytes(modules[name], recipe) for name in held)
        size += after - before
        notes.insert(
            0,
            f"storage={recipe.storage.name!r} replaces the weights of {len(held)} linear layers by their 4-bit form "
            f"({human_bytes(before)} to {human_bytes(after)}): disabled() and unadapt() give back that form, not what was loaded",
        )
        if recipe.base == "fold":
            notes.append("unadapt() gives the adapted layers back dense: with their start they are no longer what 4 bits can hold")
    return _Base(count, size, tuple(held), workspace, notes)


def _held_bytes(module: nn.Module, recipe: Recipe) -> int:
    if is_bitsandbytes_4bit(module):
        return dense_bytes(module)
    width_in, width_out = widths_of(module)
    return recipe.storage.bytes_of(width_in * width_out, placement(module)[1].itemsize)


def summary(model: nn.Module) -> tuple[Coverage, ...]:
    """The coverage table of an adapted model, counted from its parameters and not from its recipe."""
    adapted = adapted_sites(model)
    if not adapted:
        raise TargetError("the model has no adapters; call rankwise.adapt(model, recipe) first")
    counted = {
        name: sum(p.numel() for part in (module.own_update, module.gain) if part is not None for p in part.parameters())
        for name, module in adapted.items()
    }
    rows = _rows([(module.site, counted[name]) for name, module in adapted.items()], _linear_count(model))
    gates = gates_of(model)
    return rows + _gate_rows([(gate.block, sum(p.numel() for p in gate.parameters())) for gate in gates.values()])


def coverage(recipe: Recipe, sites: list[Site], total: int, blocks: Sequence[Block] = ()) -> tuple[Coverage, ...]:
    """One row per pattern, and one for the gates."""
    rows = _rows([(site, site_parameters(recipe, site)) for site in sites], total)
    return rows + _gate_rows([(block, gate_parameters(recipe, block)) for block in blocks])


def _gate_rows(counted: list[tuple[Block, int]]) -> tuple[Coverage, ...]:
    if not counted:
        return ()
    shapes = tuple(dict.fromkeys(f"{len(block.sites)} x {block.width}" for block, _ in counted))
    return (Coverage("a gate on each block", len(counted), len(counted), shapes, (), sum(count for _, count in counted)),)


def _rows(counted: list[tuple[Site, int]], total: int) -> tuple[Coverage, ...]:
    rows = []
    for pattern in dict.fromkeys(site.pattern for site, _ in counted):
        mine = [(site, count) for site, count in counted if site.pattern == pattern]
        shapes = tuple(dict.fromkeys(f"{site.out_features} x {site.in_features}" for site, _ in mine))
        ranks = tuple(sorted({site.rank for site, _ in mine}))
        rows.append(Coverage(pattern, len(mine), total, shapes, ranks, sum(count for _, count in mine)))
    return tuple(rows)


def _linear_count(model: nn.Module) -> int:
    """Linear layers of the base, the same number before and after adapting: neither adapters nor trained copies count."""
    copies = {id(part) for m in trained_modules(model).values() if m.trained is not m.base_layer for part in m.trained.modules()}
    return sum(
        1
        for module in model.modules()
        if not isinstance(module, AdaptedLinear) and id(module) not in copies and kind_of(module) in ("linear", "conv1d", "opaque")
    )


def _modules_to_save(model: nn.Module, recipe: Recipe) -> list[tuple[str, nn.Module]]:
    found: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for pattern in recipe.modules_to_save:
        mine = {name: module for name, module in modules.items() if name and matches(pattern, name)}
        if not mine:
            from rankwise.errors import nearest

            names = {name.rpartition(".")[2] for name in modules if name}
            raise TargetError(f"modules_to_save: {pattern!r} matches no module{nearest(pattern, names)}")
        found.update(mine)
    # a module inside another one that trains in full is trained with it
    return [(name, module) for name, module in found.items() if not any(name.startswith(other + ".") for other in found)]


def _last_match(patterns: Mapping[str, float], name: str, default: float) -> float:
    value = default
    for pattern, given in patterns.items():
        if matches(pattern, name):
            value = given
    return value


def _check_kind(recipe: Recipe, name: str, kind: str) -> None:
    if kind != "embedding":
        return
    if recipe.schedule.rewrites_base:
        raise TargetError(f"{name} is an embedding, which schedule={recipe.schedule.name!r} cannot write into; exclude it")
    if (
        recipe.update.name != "lora"
        or recipe.gain.name != "none"
        or recipe.moves_base
        or recipe.gradient.name == "lora-fa"
        or recipe.init.calibration
    ):
        raise TargetError(f"{name} is an embedding, which takes plain LoRA factors only; exclude it or use update='lora' with gain='none'")
    if "down" in recipe.frozen_roles:
        raise TargetError(f"{name} is an embedding, whose `down` starts at zero and would stay there; unfreeze 'down' or exclude it")
    if recipe.dropout:
        raise TargetError(f"{name} is an embedding, whose token ids cannot be dropped; use dropout=0 or exclude it")


def _check_held(recipe: Recipe, name: str, module: nn.Module) -> None:
    if not (isinstance(module, NF4Linear) or is_bitsandbytes_4bit(module)):
        return
    if recipe.base == "fold":
        raise TargetError(
            f"{name} is held in nf4 already, so base='fold' cannot take the start out of its weight before that is rounded; use "
            "base='keep', or give the 16-bit base"
        )
    if recipe.gain.needs_original:
        raise TargetError(
            f"{name} is held in nf4 already: the lengths of its original rows are gone; use lengths='held' or the 16-bit base"
        )


def rest_of(model: nn.Module, recipe: Recipe) -> list[str]:
    """Names of the modules that own parameters and are no sites of a recipe: what must train in full where everything is to train.

    A module that owns nothing but weights of an earlier one (a tied head) is left out: it trains with that one.
    """
    sites = {site.name for site in plan(model, recipe).sites}
    found: list[str] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        if own - seen and name and name not in sites:
            found.append(name)
        seen |= own
    return found


__all__ = ["Coverage", "Plan", "plan", "rest_of", "summary", "trained_modules"]
