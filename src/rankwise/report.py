"""Plans and coverage tables as text, for print() and the command line."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from rankwise.importance import Importance
    from rankwise.planning import Coverage, Plan


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def human_count(count: float) -> str:
    """1536 -> '1.54 K'."""
    for unit in ("", " K", " M", " G", " T"):
        if abs(count) < 1000 or unit == " T":
            return f"{count:.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError


def coverage_table(rows: "tuple[Coverage, ...]", title: str = "Targets") -> "Table":
    """The coverage table: what each pattern matched."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for heading, justify in (
        ("pattern", "left"),
        ("matched", "right"),
        ("shapes (out x in)", "left"),
        ("rank", "right"),
        ("trained", "right"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        shapes = ", ".join(row.shapes[:4]) + (f", {len(row.shapes) - 4} more" if len(row.shapes) > 4 else "")
        ranks = ", ".join(map(str, row.ranks)) if any(row.ranks) else "-"
        table.add_row(row.pattern, f"{row.matched} of {row.total}", shapes, ranks, f"{row.parameters:,}")
    return table


def importance_text(report: "Importance", width: int = 110) -> str:
    """Every site with its share of its group's output energy, the largest first."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    table = Table(title=f"Importance after {report.steps} steps", title_justify="left", title_style="bold")
    for heading in ("group", "site", "share", "first tokens", "per token", "mean over rows"):
        table.add_column(heading, justify="left" if heading in ("group", "site") else "right", overflow="fold")
    scores, measured = report.scores(), {site.site: site for site in report.sites}
    for group, names in report.groups.items():
        for name in sorted(names, key=lambda name: -scores[name]):
            site = measured[name]
            first = 100 * site.first / site.energy if site.energy else 0.0
            table.add_row(
                group, name, f"{scores[name]:.4f}", f"{first:.0f}%", f"{site.energy / max(1, site.tokens):.3g}", f"{site.mean:.3g}"
            )
    console.print(table)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


def allocation_text(plan: "Plan", width: int = 110) -> str:
    """One line a group: which sites have an update of their own, and what share of the output was theirs; empty without a report."""
    report = plan.importance
    if report is None:
        return ""
    scores, own = report.scores(), {site.name for site in plan.sites if not site.owner}
    own -= {site.owner for site in plan.sites}
    lines = [f"Importance after {report.steps} steps of the probe: sites with an update of their own, and their share of the output"]
    for group, names in report.groups.items():
        mine = sorted((name for name in names if name in own), key=lambda name: -scores[name])
        listed = ", ".join(f"{name.removesuffix('.' + group.split()[0])} {scores[name]:.2f}" for name in mine[:3])
        more = f", {len(mine) - 3} more" if len(mine) > 3 else ""
        lines.append(f"  {group}: {len(mine)} of {len(names)} ({sum(scores[name] for name in mine):.2f}): {listed}{more}")
    return "\n".join(lines)


def plan_text(plan: "Plan", width: int = 110) -> str:
    """What a plan says, as plain text."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    recipe = plan.recipe
    scale = "alpha / rank" if recipe.scaling == "lora" else "alpha / sqrt(rank)"
    axes = " · ".join(
        f"{axis} {getattr(recipe, axis).name}"
        for axis in ("update", "gain", "init", "gradient", "schedule", "storage", "routing")
        if getattr(recipe, axis).name not in ("none", "plain") or axis == "update"
    )
    console.print(f"Recipe {recipe.name}: {axes}")
    if recipe.update.scaled:
        alpha = recipe.alpha_of(recipe.rank)
        extra = f", frozen {', '.join(sorted(recipe.frozen))}" if recipe.frozen else ""
        extra += f", base {recipe.base}" if recipe.moves_base else ""
        console.print(f"rank {recipe.rank}, alpha {alpha:g}, scaling {scale}, dropout {recipe.dropout:g}{extra}")
    elif recipe.update.roles:
        console.print(f"rank {recipe.rank}, dropout {recipe.dropout:g}")
    console.print(coverage_table(plan.coverage))
    for name, count in plan.trained_modules[:4]:
        console.print(f"trained in full: {name}, {count:,} parameters")
    if more := plan.trained_modules[4:]:
        console.print(f"trained in full: {len(more)} modules more, {sum(count for _, count in more):,} parameters")
    share = 100 * plan.trained_parameters / max(1, plan.base_parameters)
    console.print(f"Trained {plan.trained_parameters:,} of {plan.base_parameters:,} base parameters ({share:.3g}%)")
    memory = " · ".join(f"{label} {human_bytes(size)}" for label, size in plan.memory.items())
    console.print(f"Memory  {memory}; plus the base's own activations")
    saved = human_bytes(plan.saved_bytes_per_token())
    flops = plan.flops_per_token
    console.print(
        f"Per token  the adapters keep at most {saved} for the backward (bf16); "
        f"the adapted layers take {human_count(flops['frozen base'])}FLOP, the branch {human_count(flops['branch'])}FLOP"
    )
    for note in plan.notes:
        console.print(f"Note  {note}", markup=False)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]
