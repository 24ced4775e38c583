"""One function per paper: a named recipe on the seven axes. `RECIPES` maps the names used in configuration files to these functions.

Every function takes the fields of `Recipe` as keywords (rank, alpha, dropout, targets, ...) beside the method's own options. Learning
rates are for
AdamW; a bracket is what is worth searching.
"""

from collections.abc import Callable
from typing import Any, Literal

from rankwise.errors import RecipeError, nearest
from rankwise.gains import Dora, Propulsion
from rankwise.gradients import LoraFa, LoraPlus, LoraPro, Plain, RoleRates
from rankwise.inits import (
    Corda,
    DeepFrames,
    Eva,
    Kaiming,
    LoraGa,
    LoraOne,
    MinorComponents,
    OLora,
    Orthonormal,
    Own,
    Pissa,
    RandomUp,
    Slice,
)  # fmt: skip
from rankwise.recipe import Recipe, _coerce
from rankwise.routing import PromptRouting
from rankwise.schedules import AdaLoraBudget, GaloreFolding, LoraDrop, Rounds, TaskGrowth
from rankwise.storage import NF4
from rankwise.updates import AttentionMixture, Deep, Experts, LowRank, Mixer, NoUpdate, Projected, RandLora, Svd, Vera


def _recipe(fields: dict[str, Any], **defaults: Any) -> Recipe:
    return Recipe(**defaults | {key: _coerce(key, value) for key, value in fields.items()})


def lora(bias: bool = False, **fields: Any) -> Recipe:
    """LoRA (Hu et al. 2021, arXiv 2106.09685). rsLoRA is `scaling='rslora'`, alpha over the square root of the rank.

    `bias` trains a vector beside each pair, which is added to the layer's output.
    """
    return _recipe(fields, name="lora", update=LowRank(bias))


def rslora(**fields: Any) -> Recipe:
    """LoRA with alpha over the square root of the rank (Kalajdzievski 2023, arXiv 2312.03732)."""
    return _recipe(fields, name="rslora", scaling="rslora")


def qlora(double_quant: bool = True, blocksize: int = 64, **fields: Any) -> Recipe:
    """QLoRA (Dettmers et al. 2023, arXiv 2305.14314): LoRA on a base whose linear layers are held in 4 bits.

    The paper trains rank 64 with alpha 16 and dropout 0.1 (0.05 above 13B) and finds that the rank does not matter while all linear layers
    are adapted: rank 16 with its scaling of 1/4 here, as in every recipe.
    """
    fields.setdefault("alpha", fields.get("rank", 16) / 4)
    return _recipe(fields, name="qlora", storage=NF4(double_quant, blocksize), dropout=0.1, lr=2e-4, lr_bracket=(5e-5, 2e-3))


def lora_plus(ratio: float = 16.0, scale_weight_decay: bool = True, start: Literal["down", "up"] = "down", **fields: Any) -> Recipe:
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): `up` learns `ratio` times faster.

    start='up' makes `up` the random factor and `down` the zero one, as the official experiments ran.
    """
    rule = LoraPlus(ratio, scale_weight_decay)
    init = Kaiming() if start == "down" else RandomUp()
    return _recipe(fields, name="lora-plus", gradient=rule, init=init, lr=1e-4, lr_bracket=(2e-5, 1e-3))


def lora_fa(variant: Literal["plain", "corrected"] = "plain", **fields: Any) -> Recipe:
    """LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): `down` stays frozen. 'plain' is version 1 of the paper, 'corrected' version 2."""
    rule = LoraFa() if variant == "corrected" else Plain()
    return _recipe(fields, name="lora-fa", gradient=rule, init=Orthonormal(), frozen=frozenset({"down"}), lr=4e-4, lr_bracket=(7e-5, 4e-3))


def lora_pro(
    adam_space: Literal["factor", "weight"] = "factor",
    x: Literal["sylvester", "symmetric", "zero"] = "sylvester",
    cap: float | None = 0.1,
    paper_exact: bool = False,
    ridge: float = 0.0,
    decay: Literal["adapter", "none"] = "adapter",
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    states: Literal["fp32", "8bit", "factored"] = "fp32",
    tile: int | None = None,
    **fields: Any,
) -> Recipe:
    """LoRA-Pro (Wang et al. 2024, arXiv 2407.18242): the steps of both factors are those that move the weight most like full fine-tuning.

    adam_space='weight' is the paper's AdamW, with moments as large as the weights and a rate of full fine-tuning. `paper_exact` takes the
    bound off the steps (cap).
    """
    rule = LoraPro(adam_space, x, None if paper_exact else cap, ridge, decay, beta1, beta2, eps, states, tile)
    lr, bracket = (2e-4, (5e-5, 2e-3)) if adam_space == "factor" else (2e-5, (5e-6, 2e-3))
    return _recipe(fields, name="lora-pro", gradient=rule, lr=lr, lr_bracket=bracket)


def dora(norm_grad: Literal["detached", "full"] = "detached", **fields: Any) -> Recipe:
    """DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA on the direction, a trained length for each row."""
    return _recipe(fields, name="dora", gain=Dora(norm_grad))


def pissa(
    svd: Literal["auto", "exact", "randomized"] = "auto", oversample: int | None = None, iterations: int | None = None, **fields: Any
) -> Recipe:
    """PiSSA (Meng et al. 2024, arXiv 2404.02948): starts at the principal singular components. alpha = rank, as everywhere in the paper."""
    fields.setdefault("alpha", fields.get("rank", 16))
    return _recipe(fields, name="pissa", init=Pissa(svd, oversample, iterations), lr=1e-4, lr_bracket=(2e-5, 1e-3))


def milora_svd(
    selector: Literal["min", "mid", "max", "random"] = "min", balance: Literal["sqrt", "unit"] = "sqrt", **fields: Any
) -> Recipe:
    """MiLoRA with minor components (Wang et al. 2024, arXiv 2406.09044): starts at the smallest singular components. alpha = rank."""
    fields.setdefault("alpha", fields.get("rank", 16))
    return _recipe(fields, name="milora-svd", init=MinorComponents(selector, balance), lr=3e-4, lr_bracket=(5e-5, 3e-3))


def olora(**fields: Any) -> Recipe:
    """OLoRA (Buyukakyuz 2024, arXiv 2406.01775): starts at the QR decomposition. alpha = rank, so that the scaling is 1."""
    fields.setdefault("alpha", fields.get("rank", 16))
    return _recipe(fields, name="olora", init=OLora(), lr=1e-4, lr_bracket=(2e-5, 1e-3))


def lora_ga(
    direction: Literal["down-first", "up-first", "interleaved", "random"] = "down-first",
    scale: Literal["stable", "gd", "unit"] = "stable",
    gamma: float = 16.0,
    estimate: Literal["full", "sketch"] = "full",
    svd: Literal["auto", "exact", "randomized"] = "auto",
    calibration_rows: int = 64,
    **fields: Any,
) -> Recipe:
    """LoRA-GA (Wang et al. 2024, arXiv 2407.05000): starts at the singular vectors of the gradient on a few batches of the task.

    Scaling is alpha over the square root of the rank, as the paper wants it. The rate is that of full fine-tuning rather than LoRA's.
    """
    init = LoraGa(direction, scale, gamma, estimate, svd, calibration_rows)
    return _recipe(fields, name="lora-ga", init=init, scaling="rslora", lr=5e-5, lr_bracket=(1e-5, 1e-3))


def corda(
    mode: Literal["ipm", "kpm"] = "ipm",
    balance: Literal["norm", "official"] = "norm",
    damping: float = 0.0,
    normalize: Literal["none", "sample"] = "none",
    svd: Literal["auto", "exact", "randomized"] = "auto",
    calibration_rows: int = 256,
    **fields: Any,
) -> Recipe:
    """CorDA (Yang et al. 2024, arXiv 2406.05223): starts at the components of the weight that the data's inputs excite most ('ipm') or
    least ('kpm'). alpha = rank. The official code is balance='official', damping=0.01, normalize='sample'.
    """
    fields.setdefault("alpha", fields.get("rank", 16))
    init = Corda(mode, balance, damping, normalize, svd, calibration_rows)
    return _recipe(fields, name="corda", init=init, lr=1e-4, lr_bracket=(2e-5, 1e-3))


def moslora(mixer: Literal["orthogonal", "kaiming", "identity", "butterfly"] = "orthogonal", **fields: Any) -> Recipe:
    """MoSLoRA (Wu et al. 2024, arXiv 2406.11909): a trained mixer between the factors. 'kaiming' is the paper's start of the mixer."""
    if mixer == "butterfly":
        fields.setdefault("frozen", frozenset({"core"}))
    return _recipe(fields, name="moslora", update=Mixer(mixer))


def vera(d_initial: float = 0.1, pool_seed: int = 0, sharing: Literal["max-slice", "per-shape"] = "max-slice", **fields: Any) -> Recipe:
    """VeRA (Kopiczko et al. 2023, arXiv 2310.11454): trained vectors on a frozen random pair that all sites share."""
    fields.setdefault("rank", 256)
    return _recipe(fields, name="vera", update=Vera(d_initial, pool_seed, sharing), init=Own(), lr=4e-3, lr_bracket=(1e-3, 5e-2))


def adalora(
    target_rank: int | None = None,
    init_rank: int | None = None,
    tinit: int | None = None,
    tfinal: int | None = None,
    interval: int | None = None,
    total_steps: int | None = None,
    beta1: float = 0.85,
    beta2: float = 0.85,
    gamma: float = 0.1,
    orthogonality: Literal["fro_mean", "fro2_sum"] = "fro_mean",
    sensitivity: Literal["after", "before"] = "after",
    start: Literal["gaussian", "orthonormal"] = "gaussian",
    compact: bool = True,
    **fields: Any,
) -> Recipe:
    """AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): singular triplets, pruned from `init_rank` to `target_rank` a site on average.

    `init_rank` is the recipe's rank, 1.5 times the target unless it is given. The steps of the run must be known: `rankwise.optimizer(...,
    total_steps=...)` outside of `rankwise train`.
    """
    if init_rank is not None and fields.setdefault("rank", init_rank) != init_rank:
        raise RecipeError(f"init_rank={init_rank} and rank={fields['rank']} say the same thing twice; remove one")
    target = target_rank if target_rank is not None else 8 if "rank" not in fields else max(1, fields["rank"] * 2 // 3)
    fields.setdefault("rank", (3 * target + 1) // 2)
    schedule = AdaLoraBudget(target, tinit, tfinal, interval, total_steps, beta1, beta2, gamma, orthogonality, sensitivity, compact)
    return _recipe(fields, name="adalora", update=Svd(start), init=Own(), schedule=schedule, lr=1e-3, lr_bracket=(2e-4, 5e-3))


def deep_lora(
    variant: Literal["narrow", "compressed"] = "narrow",
    depth: int = 3,
    epsilon: float = 1e-3,
    gamma: float | None = None,
    frames: Literal["random", "identity"] | None = None,
    repo_exact: bool = False,
    exact_zero: bool = False,
    estimate: Literal["full", "sketch"] = "full",
    svd: Literal["auto", "exact", "randomized"] = "auto",
    calibration_rows: int = 64,
    **fields: Any,
) -> Recipe:
    """Deep LoRA (Yaras et al. 2024, arXiv 2406.04112): a product of small orthogonal factors, which learns few directions whatever its
    rank. 'narrow' is what the published scripts ran; 'compressed' is the paper's method, in the frames of one gradient.

    gamma, frames, repo_exact, estimate, svd and calibration_rows belong to 'compressed': its frames learn at gamma times the rate (1e-2, as
    in the experiments), and gamma=0 freezes them. The scaling is 1 unless an alpha is given, and epsilon^depth is its start either way.
    """
    compressed = variant == "compressed"
    given = {"gamma": gamma, "frames": frames, "repo_exact": repo_exact or None}
    if not compressed and (stray := [name for name, value in given.items() if value is not None]):
        raise RecipeError(f"{stray[0]}={given[stray[0]]!r} belongs to variant='compressed', and variant is {variant!r}; remove it")
    gamma = 1e-2 if gamma is None else gamma
    if not 0 <= gamma <= 1:
        raise RecipeError(f"gamma={gamma!r} must lie between 0 (frozen frames) and 1 (one rate for all); the experiments have 1e-2")
    defaults: dict[str, Any] = {"update": Deep(variant, depth, epsilon, exact_zero), "init": Own(), "lr": 1e-4, "lr_bracket": (2e-5, 5e-3)}
    if compressed:
        defaults |= {
            "init": DeepFrames(frames or "random", repo_exact, estimate, svd, calibration_rows),
            "lr": 1e-2,
            "lr_bracket": (1e-3, 5e-2),
        }
        defaults |= {"gradient": RoleRates(down=gamma, up=gamma)} if gamma else {"frozen": frozenset({"down", "up"})}
    fields.setdefault("rank", 8)
    return _recipe(fields, name="deep-lora", **defaults)


def lora_drop(
    threshold: float = 0.9,
    share: float = 0.1,
    probe_steps: int | None = None,
    normalize: Literal["group", "global"] = "group",
    drop: Literal["share", "remove"] = "share",
    warm: bool = False,
    skip_first_token: bool = False,
    strata: Literal["auto", "label", "length", "none"] = "auto",
    **fields: Any,
) -> Recipe:
    """LoRA-drop (Zhou et al. 2024, arXiv 2402.07721): a probe measures what each LoRA puts out; those that do little share one.

    The paper adapts query and value at rank 8.
    """
    schedule = LoraDrop(threshold, share, probe_steps, normalize, drop, warm, skip_first_token, strata)
    return _recipe(fields, name="lora-drop", schedule=schedule)


def am_lora(
    selector_train: Literal["all", "new"] = "all",
    sparsity: Literal["selector", "scores", "entropy", "concentration", "gates", "none"] = "selector",
    sparsity_weight: float = 1e-3,
    granularity: Literal["token", "sequence_mean", "layer"] = "token",
    gate: Literal["softmax", "sigmoid", "relu"] = "softmax",
    tau: float = 1.0,
    phi: Literal["tanh", "identity"] = "tanh",
    zero_entry: bool = True,
    guard: float = 0.01,
    release: int = 20,
    selector_std: float = 0.0,
    normalise: bool = False,
    distill: float = 0.0,
    orthogonality: float = 0.0,
    snapshots: bool = True,
    **fields: Any,
) -> Recipe:
    """AM-LoRA (Attentional Mixture of LoRAs 2024, arXiv 2409.19611): a LoRA per task of a sequence, mixed by attention to their outputs.

    `rankwise.next_task` begins the next LoRA; `rankwise train` does so between the data sets of `data.tasks`. alpha is 4 times the rank:
    with the zero LoRA the first gate starts at 1/2, and the update then has LoRA's usual scale. sparsity='selector' is the L1 norm of the
    selectors, 'gates' that of the gates without the zero LoRA (of sigmoid or relu gates: of all).
    """
    fields.setdefault("rank", 8)
    fields.setdefault("alpha", 4.0 * fields["rank"])
    update = AttentionMixture(
        granularity=granularity,
        gate=gate,
        tau=tau,
        phi=phi,
        zero_entry=zero_entry,
        selector_train=selector_train,
        guard=guard,
        selector_std=selector_std,
        normalise=normalise,
        snapshots=snapshots,
        penalty="none" if sparsity in ("selector", "none") else sparsity,
        penalty_weight=sparsity_weight,
        distill=distill,
    )
    schedule = TaskGrowth(release, sparsity_weight if sparsity == "selector" else 0.0, orthogonality)
    return _recipe(fields, name="am-lora", update=update, schedule=schedule, lr=1e-3, lr_bracket=(2e-4, 5e-3))


def propulsion(degree: int = 15, **fields: Any) -> Recipe:
    """Propulsion (Kowsher et al. 2024, arXiv 2409.10927): one trained power per output row, no factors."""
    return _recipe(fields, name="propulsion", update=NoUpdate(), gain=Propulsion(degree), init=Own(), lr=1e-3, lr_bracket=(1e-4, 1e-2))


def galore(
    update_interval: int = 200,
    scale: float | None = None,
    projection: Literal["std", "reverse_std", "left", "right"] = "std",
    method: Literal["randomized", "svd", "random"] = "randomized",
    stagger: bool = True,
    rotate: bool = False,
    align: bool = True,
    refresh_on: Literal["first-batch", "step"] = "first-batch",
    rounding: Literal["auto", "nearest", "stochastic"] = "auto",
    original: Literal["keep", "drop"] = "keep",
    **fields: Any,
) -> Recipe:
    """GaLore (Zhao et al. 2024, arXiv 2403.03507): the weights themselves train, by steps of low rank that are folded in one by one.

    `alpha` is the paper's: what every step is multiplied by, here also called `scale`, 0.25 unless given. Pretraining wants lr 1e-2; the
    rate here is for fine-tuning. The official code is method='svd', stagger=False, align=False, refresh_on='step'.
    """
    alpha = fields.pop("alpha", None)
    if scale is not None and alpha is not None and scale != alpha:
        raise RecipeError(f"scale={scale} and alpha={alpha} say the same thing twice; remove one")
    if fields.get("alpha_pattern"):
        raise RecipeError("alpha_pattern: GaLore has one scale for all sites; remove it")
    folded = scale if scale is not None else 0.25 if alpha is None else float(alpha)
    fields.setdefault("rank", 128)
    schedule = GaloreFolding(update_interval, folded, method, stagger, rotate, align, refresh_on, rounding, original)
    return _recipe(fields, name="galore", update=Projected(projection), init=Own(), schedule=schedule, lr=5e-4, lr_bracket=(5e-5, 1e-2))


def rosa(
    mode: Literal["subset", "block", "top", "bottom", "proj_left", "proj_right"] = "subset",
    factorization: Literal["auto", "svd", "gram"] = "auto",
    balance: Literal["paper", "sqrt"] = "paper",
    covering: bool = False,
    rounds: int | None = None,
    interval: int | None = None,
    total_steps: int | None = None,
    ledger: bool = True,
    master: Literal["none", "fp32"] = "none",
    original: Literal["keep", "drop"] = "keep",
    **fields: Any,
) -> Recipe:
    """ROSA (Hameed et al. 2024, arXiv 2407.07802): trains a random slice of each weight, folds it back, and draws the next. alpha = rank.

    The steps of the run must be known unless `interval` is given: `rankwise.optimizer(..., total_steps=...)` outside of `rankwise train`.
    """
    fields.setdefault("alpha", fields.get("rank", 16))
    init, schedule = Slice(mode, factorization, balance, covering), Rounds(rounds, interval, total_steps, ledger, master, original)
    return _recipe(fields, name="rosa", init=init, schedule=schedule, base="fold", lr=5e-5, lr_bracket=(1e-5, 1e-3))


#: the feed-forward layers of the families this project knows
FEED_FORWARD = (
    r"re:.*\.(gate_proj|up_proj|down_proj|fc1|fc2|fc_in|fc_out|c_fc|mlp\.c_proj|dense_h_to_4h|dense_4h_to_h|w1|w2|w3|lin1|lin2"
    r"|wi|wi_0|wi_1|wo|intermediate\.dense|layer\.\d+\.output\.dense)"
)


def loramoe(
    experts: int = 6,
    delta: float = 0.1,
    beta: float = 0.1,
    expert_types: tuple[int, ...] = (),
    direction: Literal["paper", "aligned"] = "paper",
    q_reduce: Literal["mean_valid", "sum"] = "mean_valid",
    aggregate: Literal["sum", "mean"] = "sum",
    **fields: Any,
) -> Recipe:
    """LoRAMoE (Dou et al. 2023, arXiv 2312.09979): several pairs at each feed-forward layer, weighed for every token by a router, and a
    loss that balances them by kind of sample. The official script trains with beta=0, delta=0 and experts=8.
    """
    fields.setdefault("rank", 4)
    fields.setdefault("alpha", 8.0 * fields["rank"])
    fields.setdefault("targets", FEED_FORWARD)
    update = Experts(experts, delta, beta, tuple(expert_types), direction, q_reduce, aggregate)
    return _recipe(fields, name="loramoe", update=update, dropout=0.05)


def milora_mixture(
    k: int = 3,
    gate: Literal["ste", "prob", "prob_renorm", "hard"] = "ste",
    pooler: Literal["self-attention", "average", "last", "max"] = "self-attention",
    balance: float = 1e-2,
    theta_mode: Literal["bilevel", "joint", "frozen-gelu"] = "bilevel",
    theta_lr: float = 1e-6,
    router_norm: bool = True,
    skip_first: bool = False,
    **fields: Any,
) -> Recipe:
    """MiLoRA, the mixture (Zhang et al. 2024, arXiv 2410.18035): a gate on each block reads the prompt once and switches the LoRAs of k of
    the block's layers on, for all tokens that follow. Not to be confused with `milora-svd`.
    """
    fields.setdefault("rank", 32)
    routing = PromptRouting(k, gate, pooler, balance, theta_mode, theta_lr, router_norm, skip_first)
    return _recipe(fields, name="milora-mixture", routing=routing, lr=1e-4, lr_bracket=(2e-5, 1e-3))


def eva(
    rho: float = 2.0,
    adjust_scaling: bool = True,
    whiten: bool = False,
    centre: bool = True,
    label_mask: bool = True,
    svd: Literal["auto", "exact", "randomized"] = "auto",
    calibration_rows: int = 256,
    **fields: Any,
) -> Recipe:
    """EVA (Paischer et al. 2024, arXiv 2410.07170): `down` starts at the principal directions of the inputs, and the ranks go to the sites
    where they explain most. rho=1 keeps the ranks.
    """
    return _recipe(fields, name="eva", init=Eva(rho, adjust_scaling, whiten, centre, label_mask, svd, calibration_rows))


def lora_one(
    size: Literal["relative", "gradient"] = "relative",
    gamma: float = 128.0,
    estimate: Literal["full", "sketch"] = "full",
    svd: Literal["auto", "exact", "randomized"] = "auto",
    calibration_rows: int = 64,
    **fields: Any,
) -> Recipe:
    """LoRA-One (Zhang et al. 2025, arXiv 2502.01235): starts one step of full fine-tuning away from the base, cut to the rank.

    Scaling is alpha over the square root of the rank, as in the official commands.
    """
    return _recipe(fields, name="lora-one", init=LoraOne(size, gamma, estimate, svd, calibration_rows), scaling="rslora")


def randlora(pool_seed: int = 0, **fields: Any) -> Recipe:
    """RandLoRA (Albert et al. 2025, arXiv 2502.00987): trained scales on frozen random pairs that add up to full rank.

    A larger rank trains fewer numbers. alpha is 20 times the rank, as in PEFT.
    """
    fields.setdefault("rank", 32)
    fields.setdefault("alpha", 20.0 * fields["rank"])
    return _recipe(fields, name="randlora", update=RandLora(pool_seed), init=Own(), lr=1e-4, lr_bracket=(2e-5, 2e-3))


RECIPES: dict[str, Callable[..., Recipe]] = {
    "lora": lora,
    "rslora": rslora,
    "qlora": qlora,
    "lora-plus": lora_plus,
    "lora-fa": lora_fa,
    "lora-pro": lora_pro,
    "dora": dora,
    "pissa": pissa,
    "milora-svd": milora_svd,
    "olora": olora,
    "lora-ga": lora_ga,
    "corda": corda,
    "moslora": moslora,
    "vera": vera,
    "propulsion": propulsion,
    "adalora": adalora,
    "deep-lora": deep_lora,
    "rosa": rosa,
    "lora-drop": lora_drop,
    "am-lora": am_lora,
    "loramoe": loramoe,
    "milora-mixture": milora_mixture,
    "galore": galore,
    "eva": eva,
    "lora-one": lora_one,
    "randlora": randlora,
}

# What people look for here and do not find: no low-rank update of a weight, so outside of the one equation.
_OUT_OF_SCOPE = ("prefix", "prompt", "p-tuning", "ptuning", "bottleneck", "houlsby", "pfeiffer")


def unknown(name: str) -> str:
    """What to tell somebody who asks for a method that is not here: the nearest name, or that such methods are out of scope."""
    plain = name.lower().replace("_", "-")
    if plain.startswith(_OUT_OF_SCOPE):
        return f"; prefix, prompt and P-tuning and bottleneck adapters are out of scope for now. The methods are {', '.join(RECIPES)}"
    return f"{nearest(plain, RECIPES)} The methods are {', '.join(RECIPES)}"
