"""The plan: exact before anything is built, and the same as what is built."""

from typing import Any

import pytest
import torch
from tiny_models import Attention, OneLinear, activation_bytes, gpt2, llama, one_linear, saved_tensors, token_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rankwise as rw
from rankwise.errors import RecipeError
from rankwise.sites import adapted_sites

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def meta_llama(**changes: Any) -> Any:
    """LLaMA-7B's shapes without a weight."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 32000} | changes))


def meta_bert(hidden: int, layers: int, heads: int) -> Any:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        return BertModel(BertConfig(vocab_size=100, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads))


@pytest.fixture(scope="module")
def seven() -> Any:
    return meta_llama()


# --- counts that papers print ----------------------------------------------------------------------------------------------------------


def test_paper_counts_on_llama_7b(seven: Any) -> None:
    assert rw.plan(seven, rw.recipes.pissa(rank=128, targets=ALL_SEVEN)).trained_parameters == 319_815_680
    assert rw.plan(seven, rw.recipes.lora(rank=32, targets=FIVE)).trained_parameters == 56_098_816
    dora = rw.plan(seven, rw.recipes.dora(rank=32, targets=FIVE))
    assert dora.trained_parameters == 56_975_360
    share = dora.trained_parameters / (dora.base_parameters + dora.trained_parameters)
    assert round(100 * share, 2) == 0.84
    assert rw.plan(seven, rw.recipes.milora_svd(rank=32, targets=FIVE)).trained_parameters == (3 * 8192 + 2 * 15104) * 32 * 32
    assert rw.plan(seven, rw.recipes.lora(rank=64)).trained_parameters == 159_907_840
    assert rw.plan(seven, rw.recipes.vera(rank=1024)).trained_parameters == 1_589_248
    assert rw.plan(seven, rw.recipes.vera(rank=1024)).frozen_adapter_numbers == 1024 * (11008 + 11008)


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "rank", "count"),
    [(768, 12, 12, 8, 294_912), (1024, 24, 16, 8, 786_432), (1536, 48, 24, 16, 4_718_592)],
    ids=["roberta-base", "roberta-large", "deberta-xxl"],
)
def test_paper_counts_of_lora_on_encoders(hidden: int, layers: int, heads: int, rank: int, count: int) -> None:
    model = meta_bert(hidden, layers, heads)
    assert rw.plan(model, rw.recipes.lora(rank=rank, targets=["query", "value"])).trained_parameters == count


def test_paper_counts_of_lora_on_gpt3() -> None:
    model = nn.Module()
    with torch.device("meta"):
        for layer in range(96):
            block = nn.ModuleDict({"q_proj": nn.Linear(12288, 12288), "v_proj": nn.Linear(12288, 12288)})
            model.add_module(str(layer), block)
    for rank, count in ((1, 4_718_592), (8, 37_748_736)):
        assert rw.plan(model, rw.recipes.lora(rank=rank, targets=["q_proj", "v_proj"])).trained_parameters == count


def test_published_counts_on_newer_llamas() -> None:
    eight = meta_llama(hidden_size=4096, intermediate_size=14336, num_key_value_heads=8)
    lora, moslora = (rw.plan(eight, recipe(rank=16, targets=FIVE)) for recipe in (rw.recipes.lora, rw.recipes.moslora))
    assert moslora.trained_parameters - lora.trained_parameters == 40_960
    three = meta_llama(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8)
    assert rw.plan(three, rw.recipes.lora(rank=32, targets=["q_proj", "v_proj"])).trained_parameters == 9_175_040
    assert rw.plan(three, rw.recipes.vera(rank=256, targets=["q_proj", "v_proj"])).trained_parameters == 129_024


def test_base_counts(seven: Any) -> None:
    plan = rw.plan(seven, rw.recipes.lora())
    assert plan.base_parameters == 6_738_415_616
    assert plan.memory["base weights"] == 4 * 6_738_415_616
    assert len(plan.sites) == 7 * 32
    assert [row.total for row in plan.coverage] == [7 * 32 + 1]


# --- it touches nothing ----------------------------------------------------------------------------------------------------------------


class Untouched(TorchDispatchMode):
    """Fails at any operation on a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


@pytest.mark.parametrize("name", rw.recipes.RECIPES)
def test_plan_touches_no_tensor(name: str) -> None:
    model = llama()
    before = list(model.modules())
    recipe = rw.recipes.RECIPES[name]()
    if recipe.update.rank_bounded:
        recipe = recipe.replace(rank=min(recipe.rank, 16))  # the smallest side here
    with Untouched():
        plan = rw.plan(model, recipe)
        text = str(plan)
        assert plan.memory
        assert plan.saved_bytes_per_token() > 0
    assert text
    assert list(model.modules()) == before
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(AssertionError, match="was called"), Untouched():  # the guard works
        torch.zeros(1)


# --- it is what is built ---------------------------------------------------------------------------------------------------------------

BUILT: dict[str, Any] = {
    "lora": rw.recipes.lora(rank=4),
    "lora-fa": rw.recipes.lora_fa(rank=4),
    "dora": rw.recipes.dora(rank=4),
    "pissa": rw.recipes.pissa(rank=4),
    "folded milora-svd": rw.recipes.milora_svd(rank=4, base="fold"),
    "moslora": rw.recipes.moslora(rank=4),
    "butterfly": rw.recipes.moslora(rank=4, mixer="butterfly"),
    "vera": rw.recipes.vera(rank=9),
    "vera per shape": rw.recipes.vera(rank=9, sharing="per-shape"),
    "dvora with ranks": rw.recipes.vera(rank=9, rank_pattern={"q_proj": 40}).replace(gain="dora"),
    "propulsion": rw.recipes.propulsion(),
    "ranks": rw.recipes.olora(rank=4, rank_pattern={"q_proj": 2, "re:.*0.mlp.*": 3}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", BUILT)
def test_the_built_model_is_as_planned(name: str, dtype: torch.dtype) -> None:
    model, recipe = llama(dtype=dtype), BUILT[name].replace(modules_to_save=["lm_head"])
    plan = rw.plan(model, recipe)
    base = {id(t) for t in [*model.parameters(), *model.buffers()]}
    assert plan.memory["base weights"] == sum(p.nbytes for p in model.parameters())
    rw.adapt(model, recipe)
    new = [t for t in [*model.parameters(), *model.buffers()] if id(t) not in base]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == plan.trained_parameters
    assert sum(t.numel() for t in new) == plan.trained_parameters + plan.frozen_adapter_numbers
    assert plan.memory["adapters"] == sum(t.nbytes for t in new)
    assert rw.summary(model) == plan.coverage
    for name, module in adapted_sites(model).items():
        planned = next(site for site in plan.sites if site.name == name)
        own = [p for part in (module.update, module.gain) if part is not None for p in part.parameters()]
        assert sum(p.numel() for p in own) == plan.parameters_of(planned)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = rw.optimizer(model)
    optimizer.step()
    assert plan.memory["gradients"] == sum(p.grad.nbytes for p in trained if p.grad is not None)
    moments = [t for state in optimizer.state.values() for key, t in state.items() if key in ("exp_avg", "exp_avg_sq")]
    assert plan.memory["AdamW moments"] == sum(t.nbytes for t in moments)


def test_a_meta_model_plans_as_the_real_one_does() -> None:
    from transformers import AutoModelForCausalLM

    real = llama()
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(real.config)
    for recipe in BUILT.values():
        assert rw.plan(meta, recipe) == rw.plan(real, recipe)


def saved_per_token(model: nn.Module, width: int, dtype: torch.dtype) -> float:
    """Activation bytes per token, from two lengths, so that what does not grow with the tokens drops out."""
    sizes = []
    for tokens in (8, 24):
        x = torch.randn(tokens, width).to(dtype).requires_grad_()
        with saved_tensors() as saved:
            model(x)
        sizes.append(activation_bytes(saved, model))
    return (sizes[1] - sizes[0]) / 16


SAVED: dict[str, Any] = {
    "lora": rw.recipes.lora(rank=4),
    "lora with dropout": rw.recipes.lora(rank=4, dropout=0.5),
    "lora-fa": rw.recipes.lora_fa(rank=4),
    "only down": rw.recipes.pissa(rank=4, frozen={"up"}),
    "dora": rw.recipes.dora(rank=4),
    "dora, full norm gradient": rw.recipes.dora(rank=4, norm_grad="full"),
    "pissa": rw.recipes.pissa(rank=4),
    "folded pissa": rw.recipes.pissa(rank=4, base="fold"),
    "moslora": rw.recipes.moslora(rank=4),
    "vera": rw.recipes.vera(rank=24),
    "vera of a large rank": rw.recipes.vera(rank=64),
    "dvora": rw.recipes.vera(rank=24).replace(gain="dora"),
    "propulsion": rw.recipes.propulsion(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SAVED)
def test_saved_bytes_of_one_site(name: str, dtype: torch.dtype) -> None:
    base = OneLinear(16, 12, dtype=dtype).train()
    plan = rw.plan(base, SAVED[name])
    model = rw.adapt(base, SAVED[name])
    assert saved_per_token(model, 16, dtype) == plan.saved_bytes_per_token(dtype.itemsize)


class Heads(Attention):
    """q, k and v without the norm before them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


@pytest.mark.parametrize("name", SAVED)
def test_saved_bytes_of_a_group(name: str) -> None:
    """x counts once for q, k and v; VeRA's projection too."""
    base = Heads(dtype=torch.float32).train()
    del base.norm
    plan = rw.plan(base, SAVED[name])
    assert {site.group for site in plan.sites} == {":q_proj/k_proj/v_proj"}
    model = rw.adapt(base, SAVED[name])
    assert saved_per_token(model, 16, torch.float32) == plan.saved_bytes_per_token(4)


def test_saved_bytes_of_a_transposed_layer_and_an_embedding() -> None:
    base = gpt2()
    recipe = rw.recipes.lora(rank=4, targets=["transformer.h.0.attn.c_attn"])
    plan = rw.plan(base, recipe)
    model = rw.adapt(base, recipe)
    assert saved_per_token(model.transformer.h[0].attn.c_attn, 32, torch.float32) == plan.saved_bytes_per_token(4) == 4 * (32 + 4)

    embedding = nn.Sequential(nn.Embedding(50, 12))
    recipe = rw.recipes.lora(rank=4, targets=["0"])
    plan = rw.plan(embedding, recipe)
    rw.adapt(embedding, recipe)
    sizes = []
    for tokens in (8, 24):
        ids = torch.arange(tokens)
        with saved_tensors() as saved:
            embedding(ids)
        sizes.append(activation_bytes(saved, embedding))
    assert (sizes[1] - sizes[0]) / 16 == plan.saved_bytes_per_token(4) == 4 * 4 + 8


def _flops_in_place(target: Any, left: Any, right: Any, **_: Any) -> int:
    """torch's counter knows addmm, not addmm_."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("name", SAVED)
def test_flops_of_a_group(name: str) -> None:
    base = Heads(dtype=torch.float32)
    del base.norm
    plan = rw.plan(base, SAVED[name])
    model = rw.adapt(base, SAVED[name])
    totals = []
    for tokens in (8, 24):
        x = torch.randn(tokens, 16, requires_grad=True)
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _flops_in_place})
        with counter:
            model(x).sum().backward()
        totals.append(counter.get_total_flops())
    assert (totals[1] - totals[0]) / 16 == sum(plan.flops_per_token.values())


# --- ranks and refusals ----------------------------------------------------------------------------------------------------------------


def test_rank_larger_than_a_side_is_refused_but_for_vera() -> None:
    model = one_linear(torch.randn(8, 12))
    for name in ("lora", "dora", "pissa", "moslora", "lora-fa", "olora"):
        with pytest.raises(RecipeError, match=r"rank=9 at proj is larger than its smaller side 8.*lower the rank"):
            rw.plan(model, rw.recipes.RECIPES[name](rank=9))
    assert rw.plan(model, rw.recipes.vera(rank=9)).trained_parameters == 9 + 8
    assert rw.plan(model, rw.recipes.lora(rank=8)).trained_parameters == 8 * 20


def test_rank_and_alpha_patterns() -> None:
    recipe = rw.recipes.lora(
        rank=4, alpha=8, rank_pattern={"q_proj": 2, "layers.1.self_attn.q_proj": 6, r"re:.*\.mlp\..*": 3}, alpha_pattern={"k_proj": 12}
    )
    plan = rw.plan(llama(), recipe)
    sites = {site.name: site for site in plan.sites}
    assert sites["model.layers.0.self_attn.q_proj"].rank == 2
    assert sites["model.layers.1.self_attn.q_proj"].rank == 6  # the last match wins
    assert sites["model.layers.1.mlp.up_proj"].rank == 3
    assert sites["model.layers.0.self_attn.v_proj"].rank == 4
    assert sites["model.layers.0.self_attn.k_proj"].scaling == 12 / 4
    assert sites["model.layers.0.self_attn.q_proj"].scaling == 8 / 2
    model = rw.adapt(llama(), recipe)
    for name, module in adapted_sites(model).items():
        assert module.update.down.shape == (sites[name].rank, sites[name].in_features)  # type: ignore[union-attr]
        assert module.update.factors().scaling == sites[name].scaling  # type: ignore[union-attr]
    # without an alpha it is twice the recipe's rank, whatever a pattern makes of one site's rank
    unsaid = {site.name: site.scaling for site in rw.plan(llama(), rw.recipes.lora(rank=4, rank_pattern={"q_proj": 2})).sites}
    assert unsaid["model.layers.0.self_attn.q_proj"] == 8 / 2
    assert unsaid["model.layers.0.self_attn.v_proj"] == 8 / 4
    rs = rw.plan(llama(), rw.recipes.rslora(rank=4, alpha=8, rank_pattern={"q_proj": 9}))
    assert {site.scaling for site in rs.sites} == {8 / 2, 8 / 3}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_of_ranks_that_matches_nothing_is_refused(field: str) -> None:
    with pytest.raises(RecipeError, match=rf"{field}: 'q_porj' matches none of the sites, which are named k_proj, q_proj"):
        rw.plan(llama(), rw.recipes.lora(rank=4, targets=["q_proj", "k_proj"], **{field: {"q_porj": 2}}))
    with pytest.raises(RecipeError, match=f"{field}: 'v_proj'"):  # in the model, but no site
        rw.plan(llama(), rw.recipes.lora(rank=4, targets=["q_proj", "k_proj"], **{field: {"v_proj": 2}}))


@pytest.mark.parametrize(
    ("fields", "text"), [({"rank": 0}, "rank=0"), ({"rank_pattern": {"q": 0}}, "rank_pattern"), ({"alpha": 0.0}, "alpha")]
)
def test_numbers_out_of_range_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        rw.recipes.lora(**fields)


# --- what it prints --------------------------------------------------------------------------------------------------------------------


def test_the_text_says_everything(seven: Any) -> None:
    text = str(rw.plan(seven, rw.recipes.dora(rank=32, targets=[*FIVE, "lm_head"], dropout=0.05, modules_to_save=["norm"])))
    assert max(map(len, text.splitlines())) <= 110
    for piece in ("Recipe dora", "gain dora", "rank 32, alpha 64", "dropout 0.05", "q_proj", "32 of 225", "4096 x 11008", "32000 x 4096"):
        assert piece in text
    assert "8,519,680" in text  # DoRA at 32 q_proj
    assert "trained in full: model.norm, 4,096 parameters" in text
    assert "of 6,738,415,616 base parameters" in text
    assert "25.1 GiB" in text
    folded = str(rw.plan(llama(), rw.recipes.pissa(rank=4, base="fold")))
    assert "Note  base='fold' rewrites the base weights" in folded
    assert "base fold" in folded


def test_summary_counts_the_model_and_not_the_recipe() -> None:
    model = rw.adapt(llama(), rw.recipes.lora(rank=4, targets=["q_proj", "v_proj"]))
    module = model.model.layers[0].self_attn.q_proj  # type: ignore[union-attr]
    rows = rw.summary(model)
    module.update.extra = nn.Parameter(torch.zeros(5))
    changed = rw.summary(model)
    assert changed[0].parameters == rows[0].parameters + 5
    assert [row.matched for row in rows] == [2, 2]
    assert [row.total for row in rows] == [15, 15]
