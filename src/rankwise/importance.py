"""How much the update of each site does: the energy of its output on real tokens, from sums of the size of the rank.

    z = down x,    S = sum over tokens of z z^T,    g = sum over tokens of ||dW x||^2 = tr(U^T U S),    U = scaling * diag(tail) up core
    I = g / (sum of g over the sites that are compared)

z (tokens, rank), S (rank, rank), U (out, rank). Zhou et al. 2024, "LoRA-drop: Efficient LoRA Parameter Pruning based on Output
Evaluation", arXiv 2402.07721, section 3; the trace form is this project's: nothing of the output's size is ever made. Where there is a
start, dW is the update minus its start and S has twice the rank. A gain is no low-rank update: there the output minus the base's is what
is measured, one product with the base more. All sums are fp64; they add up over batches and processes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.equation import stacked
from rankwise.errors import CalibrationError, RecipeError
from rankwise.planning import Plan
from rankwise.sites import AdaptedLinear, adapted_sites
from rankwise.taps import Facts, first_input
from rankwise.updates import Site

Normalize = Literal["group", "global"]


@dataclass(frozen=True)
class Measured:
    """One site. Energies are sums of squares over tokens that are no padding.

    group: what it is compared with: sites whose modules have the same last name and shape.
    rest, first: energy on all tokens but the first of each row, and on the first ones, where large activations often sit.
    tokens, firsts: how many of both together, and of the first ones.
    mean: energy per token, averaged over rows instead of tokens: long rows count no more than short ones.
    """

    site: str
    group: str
    rest: float
    first: float
    tokens: int
    firsts: int
    mean: float

    @property
    def energy(self) -> float:
        """g: the energy on all tokens."""
        return self.rest + self.first


@dataclass(frozen=True)
class Importance:
    """What a probe measured, for any threshold and any allocator.

    sites: in the model's order. steps: optimizer steps of the probe, 0 where an adapted model was measured as it stood.
    """

    sites: tuple[Measured, ...]
    steps: int = 0

    def scores(self, normalize: Normalize = "group", skip_first: bool = False) -> dict[str, float]:
        """Site -> its share of the energy.

        Args:
            normalize: 'group': of the sites of its group. 'global': of all sites, each energy divided by its tokens.
            skip_first: leave out the first token of each row.
        """
        return {name: float(share) for pool in self._pools(normalize, skip_first) for name, share in _shares(pool).items()}

    def kept(self, threshold: float, normalize: Normalize = "group", skip_first: bool = False) -> tuple[str, ...]:
        """The sites that matter, in the model's order: the fewest of each pool, from the best down, whose shares reach `threshold`.

        Equal scores are kept in the model's order. Every group keeps one at least, and all of a pool whose energy is zero. The sums are
        exact: 1.0 keeps everything that is not zero.
        """
        kept: set[str] = set()
        for pool in self._pools(normalize, skip_first):
            shares, total = _shares(pool), Fraction(0)
            if not any(shares.values()):
                kept.update(shares)
            for name, share in sorted(shares.items(), key=lambda item: -item[1]):  # stable
                if total >= Fraction(str(threshold)):  # the decimal number that was written
                    break
                total += share
                kept.add(name)
        for group in self.groups.values():
            if not kept & set(group):
                best = {name: value for pool in self._pools("group", skip_first) for name, value in pool.items() if name in group}
                kept.add(max(best, key=lambda name: best[name]))  # the first of equal ones
        return tuple(measured.site for measured in self.sites if measured.site in kept)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Group -> its sites."""
        found: dict[str, list[str]] = {}
        for measured in self.sites:
            found.setdefault(measured.group, []).append(measured.site)
        return {group: tuple(names) for group, names in found.items()}

    @property
    def silent(self) -> tuple[str, ...]:
        """Groups without any energy, such as after a probe of no steps: nothing can be told of them."""
        return tuple(group for group, names in self.groups.items() if not any(m.energy for m in self.sites if m.site in names))

    def _pools(self, normalize: Normalize, skip_first: bool) -> list[dict[str, Fraction]]:
        pools: dict[str, dict[str, Fraction]] = {}
        for measured in self.sites:
            value, tokens = Fraction(measured.rest), measured.tokens - measured.firsts
            if not skip_first:
                value, tokens = value + Fraction(measured.first), measured.tokens
            pool = pools.setdefault(measured.group if normalize == "group" else "", {})
            pool[measured.site] = value if normalize == "group" else value / max(1, tokens)
        return list(pools.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal report."""
        return {"steps": self.steps, "sites": [asdict(measured) for measured in self.sites]}

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "Importance":
        """The report of `to_dict`."""
        numbers = {"rest": float, "first": float, "tokens": int, "firsts": int, "mean": float}
        sites = (Measured(**each | {key: kind(each[key]) for key, kind in numbers.items()}) for each in plain["sites"])
        return Importance(tuple(sites), int(plain["steps"]))

    def __str__(self) -> str:
        from rankwise.report import importance_text

        return importance_text(self)


def _shares(pool: Mapping[str, Fraction]) -> dict[str, Fraction]:
    total = sum(pool.values(), Fraction(0))
    return {name: value / total if total else Fraction(0) for name, value in pool.items()}


# --- measuring -------------------------------------------------------------------------------------------------------------------------


class Grams:
    """The sums of the sites of one adapted model; those of batches and processes add up.

    sums: site -> (3 k k + 3,) fp64: S over the first tokens, S over the others, S weighted by one over the tokens of the row, each
    (k, k); then tokens, first tokens and rows. k is the rank, or twice that where there is a start, or 1 under a gain.
    """

    def __init__(self, sums: Mapping[str, Tensor] | None = None) -> None:
        self.sums: dict[str, Tensor] = {} if sums is None else dict(sums)

    def add(self, name: str, sums: Tensor) -> None:
        """Adds the sums of one call of a site."""
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def __add__(self, other: "Grams") -> "Grams":
        made = Grams(self.sums)
        for name, sums in other.sums.items():
            made.add(name, sums)
        return made

    def reduced(self, names: Sequence[str]) -> "Grams":
        """The sums over all processes, the same numbers in each; these sums themselves outside of torch.distributed."""
        import torch.distributed as distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        flat = torch.cat([self.sums[name] for name in names])
        distributed.all_reduce(flat)
        distributed.broadcast(flat, 0)  # ties are broken alike everywhere
        return Grams(dict(zip(names, flat.split([len(self.sums[name]) for name in names]), strict=True)))


def _call_sums(module: AdaptedLinear, x: Tensor, output: Tensor, facts: Facts) -> Tensor:
    """The sums of one call, see `Grams`."""
    keep, first, weight, rows = _tokens(x, facts)
    z = _features(module, x, output)[keep]  # (tokens, k)
    first, weight = first[keep], weight[keep]
    grams = [z.T @ (z * part[:, None]) for part in (first.to(z.dtype), (~first).to(z.dtype), weight.to(z.dtype))]
    counts = torch.tensor([len(z), int(first.sum()), rows], dtype=z.dtype, device=z.device)
    return torch.cat([*(gram.flatten() for gram in grams), counts])


def _tokens(x: Tensor, facts: Facts) -> tuple[Tensor, Tensor, Tensor, int]:
    """(which tokens of x are no padding, which are the first of their row, one over the tokens of their row, rows), tokens flattened."""
    lead = x.shape[:-1] if x.is_floating_point() else x.shape
    count, device = lead.numel(), x.device
    keep = facts.keep(x) if x.is_floating_point() else _ids_keep(x, facts)
    if keep is not None and facts.mask is not None:
        mask = facts.mask.to(device)  # (rows, length)
    elif len(lead) > 1:
        mask = torch.ones(lead[0], count // lead[0], dtype=torch.bool, device=device)
    else:  # one vector a row, as a pooler or a head reads it
        every = torch.ones(count, dtype=torch.bool, device=device)
        return every, ~every, every.double(), count
    first = mask & (mask.cumsum(1) == 1)
    per_row = mask.sum(1, keepdim=True).clamp_min(1)
    weight = (mask / per_row.double()).flatten()
    return mask.flatten(), first.flatten(), weight, int(mask.any(1).sum())


def _ids_keep(ids: Tensor, facts: Facts) -> Tensor | None:
    return facts.mask if facts.mask is not None and facts.mask.shape == ids.shape else None


def _features(module: AdaptedLinear, x: Tensor, output: Tensor) -> Tensor:
    """(tokens, k) fp64 with ||dW x||^2 = z^T M z, M being `_metric`."""
    if module.gain is not None:
        difference = output.double() - module._base_forward(x).double()
        return difference.norm(dim=-1).reshape(-1, 1)
    down, _ = _pair(module)
    if x.is_floating_point():
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), down.to(wide)).double().reshape(-1, len(down))
    return F.embedding(x, down.T).double().reshape(-1, len(down))


def _metric(module: AdaptedLinear) -> Tensor:
    """U^T U (k, k) fp64."""
    if module.gain is not None:
        return torch.ones(1, 1, dtype=torch.float64, device=module.weight.device)
    up = _pair(module)[1].double()
    return up.T @ up


def _pair(module: AdaptedLinear) -> tuple[Tensor, Tensor]:
    """(down (k, in), U (out, k)): the update minus its start, also where that was folded into the base."""
    if module.update is None or module.update.token_core is not None:
        raise RecipeError(f"{module.site.name}: its update depends on the token, or there is none; its importance cannot be measured")
    return stacked(module.update.factors(), None if module.offset is None else module.offset.start())


@torch.no_grad()
def gather(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Grams:
    """The sums of every site of an adapted model over batches: evaluation mode, no dropout, no gradients; nothing of the model changes."""
    grams, facts = Grams(), [Facts({})]
    modes = [(module, module.training) for module in model.modules()]
    handles = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        assert isinstance(module, AdaptedLinear)
        grams.add(module.site.name, _call_sums(module, first_input(args, kwargs), output, facts[0]))

    try:
        model.eval()
        handles = [module.register_forward_hook(hook, with_kwargs=True) for module in adapted_sites(model).values()]
        for batch in batches:
            facts[0] = Facts(batch)
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return grams


@torch.no_grad()
def report(model: nn.Module, grams: Grams, steps: int = 0) -> Importance:
    """The energies behind the sums, from the factors as they stand.

    Raises:
        CalibrationError: a site that no batch reached, or energies that are no numbers.
    """
    sites, found = adapted_sites(model), []
    devices = {module.weight.device for module in sites.values()}
    for name, module in sites.items():
        if name not in grams.sums:
            raise CalibrationError(f"{name} was not called by the probe's batches, so nothing is known of it; exclude this site")
        sums, metric = grams.sums[name], _metric(module)
        first, rest, mean = (float((metric * part).sum()) for part in sums[:-3].view(3, *metric.shape))
        if not all(map(_finite, (first, rest, mean))):
            raise CalibrationError(
                f"the output of the update at {name} is not finite on the probe's batches; lower lr, look for broken rows or weights, or "
                "load the base in a wider dtype"
            )
        tokens, firsts, rows = (int(count) for count in sums[-3:])
        group = group_name(module.site) + (f" on {module.weight.device}" if len(devices) > 1 else "")
        # a trace of products is never below zero but for rounding
        found.append(Measured(name, group, max(0.0, rest), max(0.0, first), tokens, firsts, max(0.0, mean) / max(1, rows)))
    return Importance(tuple(found), steps)


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def group_name(site: Site) -> str:
    """What sites are compared, and may share an update, within: the module's last name and its shape."""
    return f"{site.name.rpartition('.')[2]} {site.out_features} x {site.in_features}"


def measure(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Importance:
    """The importance of every site of an adapted model as it stands, over batches as the model takes them; all processes together.

    Raises:
        CalibrationError: as `report`.
    """
    names = list(adapted_sites(model))
    grams = gather(model, batches)
    return report(model, grams.reduced([name for name in names if name in grams.sums]))


# --- from importance to a plan ---------------------------------------------------------------------------------------------------------


def allocate(
    made: Plan,
    importance: Importance,
    threshold: float = 0.9,
    drop: Literal["share", "remove"] = "share",
    normalize: Normalize = "group",
    skip_first: bool = False,
) -> Plan:
    """A plan in which the sites that matter keep an update of their own.

    Args:
        made: the plan of all sites.
        importance: of the same sites, from `probe`, `measure` or a file.
        threshold: share of the energy that the kept sites reach.
        drop: 'share': the others of a group use one update together, in the name of the first of them; one alone keeps its own.
            'remove': the others leave the plan.
        normalize, skip_first: as `Importance.kept`.

    Raises:
        RecipeError: the report is of other sites.
    """
    known = {measured.site: measured.group for measured in importance.sites}
    for name in dict.fromkeys([*known, *(site.name for site in made.sites)]):
        if name not in known or not any(site.name == name for site in made.sites):
            where = "the plan" if name in known else "the report"
            raise RecipeError(f"importance: {name} is missing in {where}; measure the sites of this recipe on this model")
    kept = set(importance.kept(threshold, normalize, skip_first))
    dropped = [site for site in made.sites if site.name not in kept]
    if drop == "remove":
        return made.allocated({}, [site.name for site in dropped], importance)
    alike: dict[tuple[Any, ...], list[str]] = {}
    for site in dropped:
        key = (known[site.name], site.kind, site.in_features, site.out_features, site.rank, site.scaling, site.element)
        alike.setdefault(key, []).append(site.name)
    owners = {name: names[0] for names in alike.values() for name in names[1:]}
    return made.allocated(owners, (), importance)
