"""The methods for readers: three sentences on each recipe (what it is, when to take it, what it costs), and tables of axes and options."""

import inspect
import re
from typing import Any, NamedTuple

from rankwise.errors import ConfigError
from rankwise.recipe import AXES
from rankwise.recipes import RECIPES, unknown


class About(NamedTuple):
    """Three sentences."""

    what: str
    when: str
    cost: str


ABOUT: dict[str, About] = {
    "lora": About(
        "A trained pair of thin matrices is added to each frozen weight.",
        "Take it first: it is the baseline that every other method is measured against.",
        "Trains rank * (in + out) numbers a site; merged into the base it costs nothing at inference.",
    ),
    "rslora": About(
        "LoRA whose scaling is alpha over the square root of the rank, so that large ranks still learn.",
        "Take it when the rank is 64 or more; at small ranks it is LoRA with a larger alpha.",
        "The same as LoRA.",
    ),
    "qlora": About(
        "LoRA on a base whose linear layers are held as 4-bit NF4 codes, with the scales in 8 bits.",
        "Take it when the base in 16 bits does not fit beside its activations.",
        "4.13 bits a weight instead of 16, one dense weight at a time, and each weight is dequantized twice a step; merging gives 16 bits.",
    ),
    "lora-plus": About(
        "LoRA whose output-side factor learns faster than the input-side one by a fixed ratio.",
        "Take it when LoRA learns too slowly and raising the one learning rate makes it unstable.",
        "The same as LoRA.",
    ),
    "lora-fa": About(
        "LoRA with the input-side factor frozen at its random start.",
        "Take it when activations are what fills the memory: only the thin projection is kept for the backward.",
        "Trains rank * out numbers a site, and keeps rank instead of in numbers per token.",
    ),
    "lora-pro": About(
        "LoRA whose two gradients are replaced by the pair of steps that together move the weight most like full fine-tuning.",
        "Take it where LoRA stays behind full fine-tuning; adam_space: weight is nearest to it, where its moments fit.",
        "Rank-sized algebra each step; in weight space two averages of the size of every adapted weight, as full fine-tuning keeps.",
    ),
    "dora": About(
        "LoRA moves the direction of each weight row, and a trained length scales the row.",
        "Take it at small ranks, or where LoRA stays behind full fine-tuning.",
        "One more number per output row, and a row norm of the adapted weight in every training step; merged it costs nothing.",
    ),
    "pissa": About(
        "LoRA that starts at the principal singular components of the weight instead of at zero.",
        "Take it when training is short and should fall fast from the first steps.",
        "One decomposition a site before training, and a frozen copy of the start while the base is kept untouched.",
    ),
    "milora-svd": About(
        "LoRA that starts at the smallest singular components, so that it moves what the base uses least.",
        "Take it when what the base knows should be kept.",
        "One decomposition a site before training, and a frozen copy of the start while the base is kept untouched.",
    ),
    "olora": About(
        "LoRA that starts at the QR decomposition of the weight, with orthonormal directions.",
        "Take it as PiSSA, where a decomposition should be cheap.",
        "One QR a site before training, and a frozen copy of the start while the base is kept untouched.",
    ),
    "lora-ga": About(
        "LoRA that starts at the singular vectors of the gradient, so that its first step is the best of its rank for full fine-tuning.",
        "Take it when LoRA learns too slowly and a few batches of the task's own data may be spent on the start; lower lr with it.",
        "A forward and backward over the calibration rows before training, and a frozen copy of the start while the base is kept.",
    ),
    "corda": About(
        "LoRA that starts at the components of the weight that inputs of real data excite most, or least.",
        "Take mode ipm, on rows of the task, to learn it fast; mode kpm, on rows of what must not be forgotten, to keep it.",
        "A forward over the calibration rows and a decomposition a site before training, and a frozen copy of the start.",
    ),
    "moslora": About(
        "A trained rank-by-rank mixer stands between LoRA's two factors.",
        "Take it to let the subspaces of the two factors combine freely at the same rank.",
        "LoRA and rank * rank numbers more a site; merged it costs nothing.",
    ),
    "vera": About(
        "Two trained vectors scale a frozen random pair that all sites share.",
        "Take it when very many adapters must be stored; it wants a high rank and a high learning rate.",
        "Trains rank + out numbers a site; the shared pair is drawn again from its seed and need not be stored.",
    ),
    "deep-lora": About(
        "The update is a product of three small orthogonal factors instead of two, which makes training grow few directions only.",
        "Take it when rows are few, or when no rank should have to be chosen; variant=compressed asks one gradient for its directions.",
        "Trains rank * rank numbers more a site than LoRA (3 rank * rank if compressed; with gamma=0 only these); merged it costs nothing.",
    ),
    "propulsion": About(
        "Every output of a site is multiplied by a trained power; there are no factors.",
        "Take it when next to nothing may be trained.",
        "Trains out numbers a site; merged it costs nothing.",
    ),
    "adalora": About(
        "Singular triplets start everywhere at the same rank, and those that matter least to the loss are pruned over the whole model.",
        "Take it when parameters are scarce and it is not known which layers need them; the run must have a known length.",
        "Starts at 1.5 times the final rank, keeps two averages of every adapter number while pruning, then cuts the ranks for real.",
    ),
    "milora-mixture": About(
        "Each block has a gate that reads the prompt once and switches on the LoRAs of the few layers that suit it.",
        "Take it when one adapter should serve many tasks that differ by prompt, and generation must not route each token.",
        "LoRA at every layer and a small gate a block; generated tokens are not routed, but a prompt must come whole and nothing merges.",
    ),
    "am-lora": About(
        "Each task of a sequence trains a LoRA of its own; older ones stay frozen, and scores of the LoRAs' outputs mix them by token.",
        "Take it when tasks come one after another and the earlier ones must not be forgotten, with no task named at inference.",
        "Trains rank * (in + out) numbers a site and a selector of out + 1 a task; t tasks compute like one LoRA of t times the rank, "
        "and cannot be merged.",
    ),
    "loramoe": About(
        "Several pairs of thin matrices stand at each feed-forward layer, and a router weighs them for every token.",
        "Take it when a large instruction set should not overwrite what the base knows, and each row is known to ask for knowledge or not.",
        "That of LoRA at rank experts * rank, and a router a site; it cannot be merged, only held still as a plain LoRA that is near.",
    ),
    "galore": About(
        "All of each weight trains, by steps taken in a subspace of its gradient: the state is small and the result is not of low rank.",
        "Take it for pretraining, or when full fine-tuning is wanted and its optimizer state does not fit.",
        "Keeps one frame and two moments of rank * side numbers a site, forms one full gradient at a time and only when a frame is "
        "renewed; the file holds the weights.",
    ),
    "rosa": About(
        "A random slice of each weight's own decomposition trains; every round folds it back into the weight and draws another.",
        "Take it when LoRA's rank is what holds it back and the weights may change: over the rounds any change can be reached.",
        "LoRA's training memory and a decomposition a site every round; the base weights are rewritten, their originals lie on the CPU.",
    ),
    "eva": About(
        "LoRA that starts at the principal directions of each layer's inputs, with more rank where they explain more.",
        "Take it when a few batches of the task's own data may be spent on the start and the base should not be touched for it.",
        "A forward over the calibration rows before training; afterwards a plain LoRA of the same total rank.",
    ),
    "lora-one": About(
        "LoRA that starts at the first step of full fine-tuning, cut to the rank; this step stays in the model.",
        "Take it when training is short and the first steps should count; the start is not the base.",
        "A forward and backward over the calibration rows before training; afterwards a plain LoRA, without a frozen start.",
    ),
    "randlora": About(
        "Only scales train, on shared frozen random pairs that are enough to make an update of full rank.",
        "Take it when LoRA's rank is what holds it back and few numbers may be trained; a larger rank trains fewer.",
        "Trains about min(in, out) * (1 + min(in, out) / rank) numbers a site; each step forms a factor as large as the weight.",
    ),
    "lora-drop": About(
        "A short probe measures what each site's LoRA puts out; sites that matter keep their own, the others of a kind share one.",
        "Take it when fewer trained and stored numbers are wanted at LoRA's quality, and not every layer needs its own adapter.",
        "A short training of all adapters on a tenth of the rows first; then LoRA's arithmetic with fewer numbers (drop='remove': less).",
    ),
}


def paper(name: str) -> str:
    """Authors, year and arXiv number, as the recipe's own docstring gives them."""
    match = re.search(r"\(([^()]*arXiv [\d.]+)\)", RECIPES[name].__doc__ or "")
    return match[1] if match else ""


def known(name: str) -> str:
    """The name of a recipe, underscores allowed. Raises ConfigError with the nearest one."""
    plain = name.replace("_", "-")
    if plain not in RECIPES:
        raise ConfigError(f"method {name!r} is unknown{unknown(name)}")
    return plain


def methods_table() -> Any:
    """A rich table of every recipe on its axes. A dash is the axis' ordinary value."""
    from rich import box
    from rich.table import Table

    shown = ("update", "gain", "init", "gradient", "storage")
    table = Table(title="Methods", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("method", *shown, "frozen", "lr", "paper"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "paper")
    for name, function in RECIPES.items():
        recipe = function()
        values = [getattr(recipe, axis).name for axis in shown]
        axes = ["-" if value in ("none", "plain", "keep") else value for value in values]
        table.add_row(name, *axes, ", ".join(sorted(recipe.frozen)) or "-", f"{recipe.lr:g}", paper(name))
    return table


def describe(name: str) -> str:
    """One recipe in full: three sentences, axes, options with their defaults, paper."""
    name = known(name)
    recipe = RECIPES[name]()
    lines = [f"{name}: {ABOUT[name].what}", ABOUT[name].when, f"Cost: {ABOUT[name].cost}", "", "Axes"]
    lines += [f"  {axis:9} {getattr(recipe, axis).name}" for axis in AXES]
    lines += ["", f"Options under method: {{name: {name}, ...}}"]
    own = [item for key, item in inspect.signature(RECIPES[name]).parameters.items() if key != "fields"]
    lines += [f"  {item.name} = {item.default!r}   ({_type(item.annotation)})" for item in own] or ["  none of its own"]
    alpha = recipe.alpha_of(recipe.rank)
    scaled = f"alpha = {alpha:g}, scaling = {recipe.scaling!r}, " if recipe.update.scaled else ""
    lines.append(f"  and of every recipe: rank = {recipe.rank}, {scaled}dropout = {recipe.dropout:g},")
    lines.append("  targets = 'all-linear', rank_pattern, alpha_pattern, modules_to_save, states, frozen, base, and each axis by its name")
    lines += ["", f"Learning rate {recipe.lr:g}; worth searching from {recipe.lr_bracket[0]:g} to {recipe.lr_bracket[1]:g}"]
    lines.append(f"Paper: {paper(name)}")
    return "\n".join(lines)


def _type(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
