"""Ranks that an init decides from real data, before anything is built: the plan is made anew with them as patterns of its recipe.

So the recipe that is saved says itself which site has which rank: loading, resuming and exporting need to know nothing of how that was
decided.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from rankwise.errors import CalibrationError
from rankwise.inits import Beginning
from rankwise.planning import Plan, plan


def distributed(model: nn.Module, made: Plan, begun: Mapping[str, Beginning]) -> tuple[Plan, dict[str, Beginning]]:
    """The plan with the ranks of `Init.distribute`, sites of rank 0 left out, and the first ranks of each site's beginning.

    Raises:
        CalibrationError: no site is left.
    """
    recipe = made.recipe
    ranks = recipe.init.distribute(made.sites, begun)
    kept = [site for site in made.sites if ranks[site.name]]
    if not kept:
        raise CalibrationError(f"init={recipe.init.name!r} left no site a rank; give more rows, or a larger rank")
    alphas = {site.name: recipe.init.distributed_alpha(site, ranks[site.name]) for site in kept}
    targets = recipe.targets
    fixed = recipe.replace(
        init=recipe.init.settled(),
        rank_pattern={_exactly(site.name): ranks[site.name] for site in kept if ranks[site.name] != recipe.rank},
        alpha_pattern={_exactly(site.name): alphas[site.name] for site in kept if alphas[site.name] != recipe.alpha_of(ranks[site.name])},
        targets=replace(
            targets,
            include=tuple(pattern for pattern in targets.include if any(site.pattern == pattern for site in kept)),
            exclude=(*targets.exclude, *(_exactly(site.name) for site in made.sites if not ranks[site.name])),
        ),
    )
    return plan(model, fixed), {site.name: _first(begun[site.name], ranks[site.name]) for site in kept}


def _exactly(name: str) -> str:
    return f"re:{re.escape(name)}"


def _first(begun: Beginning, rank: int) -> Beginning:
    down, up = begun.down, begun.up
    return begun._replace(down=None if down is None else down[:rank], up=None if up is None else up[:, :rank], weights=None)
