"""Targets: what patterns match, what is refused and with which remedy, and that groups really share one input."""

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, Attention, gpt2, llama, logits, perturb, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import RecipeError, TargetError
from rankwise.sites import adapted_sites

LINEARS = "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


def names(model: nn.Module, targets: Any, **fields: Any) -> list[str]:
    return [site.name for site in rw.plan(model, rw.recipes.lora(rank=2, targets=targets, **fields)).sites]


def refused(model: nn.Module, targets: Any, **fields: Any) -> str:
    with pytest.raises(TargetError) as caught:
        rw.plan(model, rw.recipes.lora(**{"rank": 2} | fields, targets=targets))
    return str(caught.value)


# --- patterns --------------------------------------------------------------------------------------------------------------------------


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    found = names(llama(), "all-linear")
    assert len(found) == 14
    assert not any("lm_head" in name or "embed" in name for name in found)
    assert names(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "all-linear") == ["0", "2"]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 2),
        ("self_attn.q_proj", 2),
        ("layers.1.self_attn.q_proj", 1),
        ("model.layers.0.mlp.up_proj", 1),
        (r"re:.*\.(q|v)_proj", 4),
        (r"re:model\.layers\.1\..*", 7),
        ("lm_head", 1),
    ],
)
def test_names_suffixes_and_expressions(pattern: str, count: int) -> None:
    assert len(names(llama(), [pattern])) == count


def test_a_name_is_a_whole_part_of_the_path_and_an_expression_the_whole_path() -> None:
    assert "matches nothing" in refused(llama(), ["proj"])
    assert "matches nothing" in refused(llama(), ["attn.q_proj"])
    assert "matches nothing" in refused(llama(), ["re:q_proj"])
    assert "matches nothing" in refused(llama(), [r"re:model\.layers\.0\.self_attn\.q"])


def test_layer_ranges() -> None:
    model = llama(num_hidden_layers=4)
    assert names(model, {"include": "q_proj", "layers": "1-2"}) == [f"model.layers.{i}.self_attn.q_proj" for i in (1, 2)]
    assert names(model, {"include": ["q_proj"], "layers": "0, 3"}) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 3)]
    assert len(names(model, {"layers": "0-1,3"})) == 21
    for text in ("2-1", "a", "1-", "", "-1", "1;2"):
        message = refused(model, {"include": ["q_proj"], "layers": text})
        assert f"layers={text!r}" in message
        assert "'0-3,8'" in message
    assert "no site is left: layers='9' and" in refused(model, {"include": ["q_proj"], "layers": "9"})


def test_exclude() -> None:
    found = names(llama(), {"include": "all-linear", "exclude": ["down_proj", r"re:.*layers\.0\..*"]})
    assert len(found) == 6
    assert all("layers.1" in name and "down_proj" not in name for name in found)
    assert "targets.exclude: 'dwn_proj' matches nothing; did you mean 'down_proj'" in refused(llama(), {"exclude": ["dwn_proj"]})
    assert "no site is left" in refused(llama(), {"include": ["q_proj"], "exclude": ["q_proj"]})


def test_every_pattern_must_match_and_near_misses_are_named() -> None:
    message = refused(llama(), ["q_proj", "up_porj"])
    assert "target 'up_porj' matches nothing; did you mean 'up_proj'" in message
    assert LINEARS in message
    assert "did you mean" not in refused(llama(), ["zzz"])
    assert "not a valid regular expression" in refused(llama(), ["re:(q_proj"])
    with pytest.raises(RecipeError, match=r"unknown key 'includes' under targets; did you mean 'include'"):
        rw.recipes.lora(targets={"includes": ["q_proj"]})


def test_a_site_belongs_to_the_first_pattern_that_matches_it() -> None:
    plan = rw.plan(llama(), rw.recipes.lora(rank=2, targets=["q_proj", "all-linear"]))
    assert [(row.pattern, row.matched) for row in plan.coverage] == [("q_proj", 2), ("all-linear", 12)]
    assert len({site.name for site in plan.sites}) == 14


def test_sites_are_in_the_models_order_whatever_the_order_of_patterns() -> None:
    assert names(llama(), ["v_proj", "q_proj"]) == names(llama(), ["q_proj", "v_proj"])


def test_containers_are_refused_with_the_linear_layers_inside() -> None:
    message = refused(llama(), ["self_attn"])
    assert "model.layers.0.self_attn, a LlamaAttention, which is no linear layer" in message
    assert "k_proj, o_proj, q_proj, v_proj" in message
    assert "LlamaRMSNorm" in refused(llama(), ["input_layernorm"])
    assert "name the linear layers inside it" in refused(llama(), ["layers"])


# --- kinds of layers -------------------------------------------------------------------------------------------------------------------


def test_gpt2_conv1d() -> None:
    model = gpt2()
    plan = rw.plan(model, rw.recipes.lora(rank=4))
    assert {site.kind for site in plan.sites} == {"conv1d"}
    assert {(site.name.rpartition(".")[2], site.in_features, site.out_features) for site in plan.sites} == {
        ("c_attn", 32, 96),
        ("c_proj", 32, 32),
        ("c_fc", 32, 128),
        ("c_proj", 128, 32),
    }
    assert plan.trained_parameters == 2 * 4 * (32 + 96 + 32 + 32 + 2 * (32 + 128))
    assert names(model, ["mlp.c_proj"]) == [f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)]


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "olora", "moslora", "vera", "propulsion"])
def test_gpt2_fulfils_the_promises(name: str) -> None:
    """A square weight the wrong way round would go unnoticed by shapes: c_proj of the attention."""
    model, ids = gpt2(), token_ids()
    before = logits(model, ids)
    rw.adapt(model, rw.recipes.RECIPES[name](targets=["c_attn", "attn.c_proj", "c_fc"], **({} if name == "propulsion" else {"rank": 4})))
    assert torch.equal(logits(model, ids), before)
    on = logits(perturb(model, size=0.5), ids)
    assert not torch.allclose(on, before, atol=1e-3)
    rw.merge(model)
    torch.testing.assert_close(logits(model, ids), on, rtol=1e-4, atol=1e-4)
    rw.unadapt(model)
    assert torch.equal(logits(model, ids), before)


def test_embeddings() -> None:
    model, ids = llama(), token_ids()
    before = logits(model, ids)
    plan = rw.plan(model, rw.recipes.lora(rank=4, targets=["embed_tokens"]))
    assert (plan.sites[0].kind, plan.trained_parameters) == ("embedding", 4 * (VOCABULARY + 32))
    rw.adapt(model, rw.recipes.lora(rank=4, targets=["embed_tokens"]))
    assert torch.equal(logits(model, ids), before)
    perturb(model, size=0.5)
    module = adapted_sites(model)["model.embed_tokens"]
    factors = module.update.factors()  # type: ignore[union-attr]
    expected = module.weight[ids] + factors.scaling * factors.down.T[ids] @ factors.up.T
    torch.testing.assert_close(module(ids), expected, rtol=1e-5, atol=1e-6)
    on = logits(model, ids)
    rw.merge(model)
    torch.testing.assert_close(logits(model, ids), on, rtol=1e-4, atol=1e-5)
    rw.unadapt(model)
    assert torch.equal(logits(model, ids), before)


def test_embeddings_take_plain_factors_only() -> None:
    model = llama()
    for recipe in (
        rw.recipes.dora(rank=2),
        rw.recipes.pissa(rank=2),
        rw.recipes.moslora(rank=2),
        rw.recipes.vera(),
        rw.recipes.propulsion(),
    ):
        with pytest.raises(TargetError, match=r"model\.embed_tokens is an embedding, which takes plain LoRA factors only"):
            rw.plan(model, recipe.replace(targets=["embed_tokens"]))
    assert "token ids cannot be dropped" in refused(model, ["embed_tokens"], dropout=0.1)


def test_other_layers_are_called_and_never_looked_into() -> None:
    class Double(nn.Module):
        in_features = out_features = 6

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    model = nn.Sequential(Double(), Half(6, 5))
    plan = rw.plan(model, rw.recipes.lora(rank=2))
    assert [site.kind for site in plan.sites] == ["opaque", "opaque"]
    x = torch.randn(3, 6)
    before = model(x)
    rw.adapt(model, rw.recipes.lora(rank=2))
    assert torch.equal(model(x), before)
    module = adapted_sites(perturb(model))["0"]
    torch.testing.assert_close(module(x), 2 * x + x @ module.update.factors().delta().T)  # type: ignore[union-attr]
    assert "nn.Bilinear" not in str(plan)
    assert "Bilinear, which is no linear layer" in refused(nn.Sequential(nn.Bilinear(2, 2, 2)), ["0"])


def test_torchs_attention_reads_its_out_proj_past_any_replacement() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert names(model, "all-linear") == ["linear1", "linear2"]
    message = refused(model, ["out_proj"])
    assert "self_attn.out_proj, whose weight torch's MultiheadAttention reads past any replacement" in message


# --- tied and shared -------------------------------------------------------------------------------------------------------------------


def test_a_tied_head_works_when_the_base_is_kept() -> None:
    model, ids = llama(tie_word_embeddings=True), token_ids()
    before, embedding = logits(model, ids), model.model.embed_tokens.weight.detach().clone()
    recipe = rw.recipes.pissa(rank=4, targets=["lm_head"])
    assert any("lm_head shares its weight with model.embed_tokens" in note for note in rw.plan(model, recipe).notes)
    rw.adapt(model, recipe)
    assert torch.equal(logits(model, ids), before)
    on = logits(perturb(model, size=0.5), ids)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    rw.merge(model, keep_base=False)  # which unties
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model, ids), on, rtol=1e-4, atol=1e-4)


def test_folding_a_tied_weight_is_refused() -> None:
    model = llama(tie_word_embeddings=True)
    with pytest.raises(TargetError, match=r"lm_head shares its weight with model\.embed_tokens.*use base='keep' or exclude it"):
        rw.adapt(model, rw.recipes.pissa(rank=4, targets=["q_proj", "lm_head"], base="fold"))
    assert not adapted_sites(model)


def test_a_module_under_two_paths_is_refused() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": layer, "two": layer, "three": nn.Linear(4, 4)})
    message = refused(model, ["one"])
    assert "one is one module under several paths (one, two)" in message
    assert "exclude it" in message
    assert names(model, ["three"]) == ["three"]


def test_an_adapted_model_is_refused() -> None:
    model = rw.adapt(llama(), rw.recipes.lora(rank=2, targets=["q_proj"]))
    for what in (rw.plan, rw.adapt):
        with pytest.raises(TargetError, match="adapted already; take the adapters off"):
            what(model, rw.recipes.lora(rank=2, targets=["v_proj"]))


# --- modules that train in full --------------------------------------------------------------------------------------------------------


def test_modules_to_save() -> None:
    model = llama()
    plan = rw.plan(model, rw.recipes.lora(rank=2, modules_to_save=["lm_head", "model.norm"]))
    assert dict(plan.trained_modules) == {"lm_head": VOCABULARY * 32, "model.norm": 32}
    assert plan.trained_parameters == plan.adapter_parameters + VOCABULARY * 32 + 32
    rw.adapt(model, plan.recipe)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trained_parameters
    assert "modules_to_save: 'lm_haed' matches no module; did you mean 'lm_head'" in refused(
        llama(), "all-linear", modules_to_save=["lm_haed"]
    )


def test_what_lies_in_a_module_that_trains_is_no_site() -> None:
    plan = rw.plan(llama(), rw.recipes.lora(rank=2, modules_to_save=["layers.1.mlp", "layers.1.mlp.up_proj"]))
    assert [name for name, _ in plan.trained_modules] == ["model.layers.1.mlp"]
    assert len(plan.sites) == 11
    assert not any(site.name.startswith("model.layers.1.mlp") for site in plan.sites)


# --- groups ----------------------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def _mistral() -> tuple[Any, dict[str, Any]]:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2)), {}


def _qwen2() -> tuple[Any, dict[str, Any]]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2)), {}


def _bert() -> tuple[Any, dict[str, Any]]:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SMALL, intermediate_size=48)), {}


def _bert_decoder() -> tuple[Any, dict[str, Any]]:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(**SMALL, intermediate_size=48, is_decoder=True, add_cross_attention=True)
    return BertLMHeadModel(config), {"encoder_hidden_states": torch.randn(2, 5, 32)}


def _t5() -> tuple[Any, dict[str, Any]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config), {"labels": token_ids(seed=2)}


def _bart() -> tuple[Any, dict[str, Any]]:
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in (("layers", 1), ("ffn_dim", 48), ("attention_heads", 4))
    }
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=64, **sides)), {}


def _opt() -> tuple[Any, dict[str, Any]]:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)), {}


def _distilbert() -> tuple[Any, dict[str, Any]]:
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4)), {}


FAMILIES: dict[str, tuple[Any, set[frozenset[str]]]] = {
    "llama": (lambda: (llama(), {}), {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"})}),
    "mistral": (_mistral, {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"})}),
    "qwen2": (_qwen2, {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"})}),
    "gpt2": (lambda: (gpt2(), {}), set()),
    "bert": (_bert, {frozenset({"query", "key", "value"})}),
    "bert decoder": (_bert_decoder, {frozenset({"query", "key", "value"}), frozenset({"key", "value"})}),
    "t5": (_t5, {frozenset({"q", "k", "v"}), frozenset({"k", "v"}), frozenset({"wi_0", "wi_1"})}),
    "bart": (_bart, {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"k_proj", "v_proj"})}),
    "opt": (_opt, {frozenset({"q_proj", "k_proj", "v_proj"})}),
    "distilbert": (_distilbert, {frozenset({"q_lin", "k_lin", "v_lin"})}),
}


def inputs_of(model: nn.Module, sites: list[str], **batch: Any) -> dict[str, Tensor]:
    """Site name -> the tensor object that it received in one forward."""
    seen: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))  # type: ignore[misc]
        for name in sites
    ]
    with torch.no_grad():
        model.eval()(input_ids=token_ids(), **batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_group_receives_one_tensor(family: str) -> None:
    torch.manual_seed(0)
    make, expected = FAMILIES[family]
    model, batch = make()
    plan = rw.plan(model, rw.recipes.lora(rank=2))
    seen = inputs_of(model, [site.name for site in plan.sites], **batch)
    groups: dict[str, list[str]] = {}
    for site in plan.sites:
        assert site.name in seen
        if site.group:
            groups.setdefault(site.group, []).append(site.name)
    for members in groups.values():
        assert len(members) > 1
        assert len({id(seen[name]) for name in members}) == 1, members
    assert {frozenset(name.rpartition(".")[2] for name in members) for members in groups.values()} == expected
    # and nobody is left out: sites of one parent that receive one tensor are in one group
    by_input: dict[tuple[int, str], set[str]] = {}
    for site in plan.sites:
        by_input.setdefault((id(seen[site.name]), site.name.rpartition(".")[0]), set()).add(site.group)
    assert all(len(marks) == 1 for marks in by_input.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_vera_shares_what_is_shared_in_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model over shared projections equals the model over projections of their own."""
    torch.manual_seed(0)
    make, _ = FAMILIES[family]
    model, batch = make()
    perturb(rw.adapt(model.eval(), rw.recipes.vera(rank=8)), size=1.0)
    shared = model(input_ids=token_ids(), **batch)[0]
    for module in adapted_sites(model).values():
        module.shared = None
    assert torch.allclose(model(input_ids=token_ids(), **batch)[0], shared, rtol=1e-5, atol=1e-6)


def test_a_group_of_one_is_no_group() -> None:
    assert {site.group for site in rw.plan(Attention(), rw.recipes.lora(rank=2, targets=["q_proj"])).sites} == {""}
    grouped = rw.plan(Attention(), rw.recipes.lora(rank=2, targets=["q_proj", "v_proj"])).sites
    assert {site.group for site in grouped} == {":q_proj/k_proj/v_proj"}
