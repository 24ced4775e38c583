"""disabled, reference, merge, unmerge and unadapt: the base comes back bit for bit, whatever happened in between."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import OneLinear, dense_weight, llama, logits, one_linear, perturb, site, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import RankwiseError, TargetError
from rankwise.sites import TrainedModule, adapted_sites, trained_modules

IDS = token_ids()


def classifier(seed: int = 0) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    shape = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(**shape, max_position_embeddings=64, num_labels=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.2)
    return model


def adapted_llama(recipe: Any = None, **changes: Any) -> Any:
    return perturb(rw.adapt(llama(**changes), rw.recipes.dora(rank=4) if recipe is None else recipe), size=0.5)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = dict(model.named_parameters())
    return after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


# --- disabled --------------------------------------------------------------------------------------------------------------------------


def test_disabled_nests() -> None:
    base, model = logits(llama(), IDS), adapted_llama()
    on = logits(model, IDS)
    assert not torch.equal(on, base)
    with rw.disabled(model) as same_model:
        assert same_model is model
        with rw.disabled(model):
            assert torch.equal(logits(model, IDS), base)
        assert torch.equal(logits(model, IDS), base)
    assert torch.equal(logits(model, IDS), on)


def test_disabled_ends_after_an_exception() -> None:
    model = adapted_llama()
    on = logits(model, IDS)
    with pytest.raises(KeyError), rw.disabled(model), rw.disabled(model):
        raise KeyError
    assert torch.equal(logits(model, IDS), on)


def test_disabled_keeps_what_was_off_off() -> None:
    base, model = logits(llama(), IDS), adapted_llama()
    for module in adapted_sites(model).values():
        module.enabled = False
    with rw.disabled(model):
        pass
    assert torch.equal(logits(model, IDS), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_while_merged(dtype: torch.dtype) -> None:
    base, model = logits(llama(dtype=dtype), IDS), adapted_llama(dtype=dtype)
    rw.merge(model)
    on = logits(model, IDS)
    with rw.disabled(model):
        assert torch.equal(logits(model, IDS), base)
        with rw.disabled(model):
            assert torch.equal(logits(model, IDS), base)
        assert torch.equal(logits(model, IDS), base)
    assert torch.equal(logits(model, IDS), on)
    with pytest.raises(KeyError), rw.disabled(model):
        raise KeyError
    assert torch.equal(logits(model, IDS), on)
    rw.unadapt(model)
    assert torch.equal(logits(model, IDS), base)


def test_disabled_changes_no_flag() -> None:
    model = adapted_llama().train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    with rw.disabled(model):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("what", [rw.merge, rw.unmerge, rw.unadapt])
def test_weights_are_not_moved_inside_disabled(what: Any) -> None:
    base, model = logits(llama(), IDS), adapted_llama()
    if what is rw.unmerge:
        rw.merge(model)
    on = logits(model, IDS)
    with rw.disabled(model):
        with pytest.raises(TargetError, match="leave the block first"):
            what(model)
        assert torch.equal(logits(model, IDS), base)
    assert torch.equal(logits(model, IDS), on)


@pytest.mark.parametrize("what", [rw.merge, rw.unmerge, rw.unadapt, rw.reference, lambda model: rw.disabled(model).__enter__(), rw.summary])
def test_a_model_without_adapters_is_refused(what: Any) -> None:
    with pytest.raises(RankwiseError, match=r"adapt\(model, recipe\)"):
        what(llama())


# --- reference -------------------------------------------------------------------------------------------------------------------------


def test_reference_is_the_base_without_parameters_gradients_or_dropout() -> None:
    base, model = logits(llama(), IDS), adapted_llama(rw.recipes.lora(rank=4, dropout=0.5), attention_dropout=0.3).train()
    modes = [module.training for module in model.modules()]
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    frozen = rw.reference(model)
    assert not list(frozen.parameters())
    assert not list(frozen.buffers())
    assert not frozen.state_dict()
    out = frozen(input_ids=IDS).logits
    assert torch.equal(out, base)
    assert not out.requires_grad
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert frozen.config is model.config
    with pytest.raises(AttributeError):
        _ = frozen.no_such_thing


def test_reference_restores_modes_after_an_exception() -> None:
    model = adapted_llama().train()
    on = logits(model, IDS)
    with pytest.raises(ValueError, match="input_ids"):
        rw.reference(model)()
    assert all(module.training for module in model.modules())
    assert torch.equal(logits(model, IDS), on)


def test_reference_while_merged_and_after_training_modes() -> None:
    base, model = logits(llama(), IDS), adapted_llama()
    frozen = rw.reference(model)
    rw.merge(model)
    on = logits(model, IDS)
    assert torch.equal(frozen(input_ids=IDS).logits, base)
    assert torch.equal(logits(model, IDS), on)


def test_reference_generates_as_the_base() -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    base, model = llama(), adapted_llama()
    expected = base.generate(IDS, **options)
    assert not torch.equal(model.generate(IDS, **options), expected)  # or the next line would show nothing
    assert torch.equal(rw.reference(model).generate(IDS, **options), expected)


def log_probability(model: Any, ids: Tensor) -> Tensor:
    scores = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return scores.gather(-1, ids[:, 1:, None]).sum((1, 2))


def test_reference_in_a_preference_loss() -> None:
    """DPO: two policies' forwards and two references' before one backward; equal to a second copy of the base."""
    chosen, rejected = token_ids(seed=3), token_ids(seed=4)
    gradients, losses = [], []
    for shared in (True, False):
        model = adapted_llama(rw.recipes.pissa(rank=4)).train()
        frozen = rw.reference(model) if shared else llama()
        margin = log_probability(model, chosen) - log_probability(frozen, chosen).detach()
        margin = margin - log_probability(model, rejected) + log_probability(frozen, rejected).detach()
        loss = -nn.functional.logsigmoid(0.1 * margin).mean()
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert torch.equal(*losses)
    assert any(gradient.any() for gradient in gradients[0])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


# --- merge -----------------------------------------------------------------------------------------------------------------------------


def exact_weight(module: Any) -> Tensor:
    """The merged weight in fp64, with the very gain that the forward uses (on a bf16 base DoRA's norm is made of bf16 products)."""
    if module.gain is None or module.gain.choice.name != "dora":
        return dense_weight(module)
    weight = module.weight.double() + module.update.factors().delta().double()
    with torch.no_grad():
        return (weight * module.gain(module.base_layer, module.storage, module.update.factors(), None).double()[:, None]).detach()


def rounded_once(module: Any) -> Tensor:
    return exact_weight(module).to(module.weight.dtype)


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "moslora", "vera", "propulsion"])
def test_merging_into_bf16_rounds_once(name: str) -> None:
    """The merged weight is the fp64 result rounded to bf16, but for sums that fp32 puts on the other side of a tie."""
    fields = {} if name == "propulsion" else {"rank": 4}
    model = adapted_llama(rw.recipes.RECIPES[name](**fields), dtype=torch.bfloat16)
    expected = {key: (rounded_once(module), exact_weight(module)) for key, module in adapted_sites(model).items()}
    rw.merge(model)
    for key, module in adapted_sites(model).items():
        rounded, exact = expected[key]
        assert module.weight.dtype == torch.bfloat16
        differs = module.weight != rounded
        assert differs.float().mean() < 2e-3
        # where it differs the exact value lies in the middle of the two candidates, to fp32's precision
        middle = (module.weight.double() + rounded.double())[differs] / 2
        torch.testing.assert_close(exact[differs], middle, rtol=2e-5, atol=1e-7)


def test_merging_in_bf16_alone_would_be_worse() -> None:
    """The test above can tell: factors cast to bf16 before the product leave many weights wrong."""
    model = adapted_llama(rw.recipes.lora(rank=4), dtype=torch.bfloat16)
    module = site(model, "model.layers.0.mlp.up_proj")
    factors = module.update.factors()  # type: ignore[union-attr]
    sloppy = module.weight + factors.scaling * (factors.up.bfloat16() @ factors.down.bfloat16())
    assert (sloppy != rounded_once(module)).float().mean() > 0.05


def test_merge_of_an_fp64_base_is_fp64() -> None:
    model = perturb(rw.adapt(OneLinear(12, 9), rw.recipes.dora(rank=4)), size=0.5)
    expected = dense_weight(site(model))
    rw.merge(model)
    torch.testing.assert_close(site(model).weight, expected, rtol=1e-14, atol=1e-14)


def test_merge_without_keeping_the_base_gives_a_plain_model() -> None:
    model = adapted_llama()
    on = logits(model, IDS)
    expected = {name: rounded_once(module) for name, module in adapted_sites(model).items()}
    merged = rw.merge(model, keep_base=False)
    assert merged is model
    assert not adapted_sites(model)
    assert not hasattr(model, "rankwise")
    assert set(model.state_dict()) == set(llama().state_dict())
    assert all(type(module).__module__.split(".")[0] != "rankwise" for module in model.modules())
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(name).weight, weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(model, IDS), on, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters())
    rw.adapt(model, rw.recipes.lora(rank=2))  # a base like any other


def test_merge_twice_and_unmerge_unmerged_are_refused() -> None:
    model = adapted_llama()
    with pytest.raises(TargetError, match="not merged"):
        rw.unmerge(model)
    rw.merge(model)
    with pytest.raises(TargetError, match="merged already"):
        rw.merge(model)


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_merge_that_fails_changes_nothing(keep_base: bool) -> None:
    model = adapted_llama()
    before = parameters(model)
    last = list(adapted_sites(model).values())[-1]
    with torch.no_grad():
        last.update.up[0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(TargetError, match=r"layers\.1\.mlp\.down_proj is not finite"):
        rw.merge(model, keep_base=keep_base)
    assert len(adapted_sites(model)) == 14
    assert not any(module.merged for module in adapted_sites(model).values())
    after = parameters(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "down_proj.update.up" not in name)


def test_a_layer_that_cannot_be_written_is_refused_before_anything_is() -> None:
    class Opaque(nn.Module):
        in_features = out_features = 32

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    base = llama()
    base.model.layers[1].mlp.extra = Opaque()
    model = perturb(rw.adapt(base, rw.recipes.lora(rank=2, targets=["q_proj", "extra"])))
    before = parameters(model)
    with pytest.raises(TargetError, match="cannot be written"):
        rw.merge(model, keep_base=False)
    assert same(model, before)


def test_merging_many_times_does_not_drift() -> None:
    model = adapted_llama(dtype=torch.bfloat16)
    before, on = parameters(model), logits(model, IDS)
    for _ in range(5):
        rw.merge(model)
        rw.unmerge(model)
    assert same(model, before)
    assert torch.equal(logits(model, IDS), on)


def test_a_copy_of_a_merged_model_unmerges_by_itself() -> None:
    base, model = logits(llama(), IDS), adapted_llama()
    rw.merge(model)
    other = copy.deepcopy(model)
    rw.unadapt(other)
    assert torch.equal(logits(other, IDS), base)
    with rw.disabled(model):
        assert torch.equal(logits(model, IDS), base)


# --- unadapt ---------------------------------------------------------------------------------------------------------------------------


def test_unadapt_gives_back_weights_and_flags() -> None:
    base = llama()
    base.model.embed_tokens.requires_grad_(False)
    base.model.layers[0].self_attn.q_proj.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    before, identities = parameters(base), {name: id(p) for name, p in base.named_parameters()}
    model = perturb(rw.adapt(base, rw.recipes.dora(rank=4)))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "update" not in name and "gain" not in name)
    rw.merge(model)
    rw.unadapt(model)
    assert same(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert not hasattr(model, "rankwise")


def test_a_tied_head_is_tied_again_after_unmerge() -> None:
    base = llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    on_base = logits(base, IDS)
    embedding = base.model.embed_tokens.weight.detach().clone()
    model = perturb(rw.adapt(base, rw.recipes.lora(rank=4, targets=["lm_head", "q_proj"])), size=0.5)
    on = logits(model, IDS)
    rw.merge(model)
    assert model.lm_head.base_layer.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(logits(model, IDS), on, rtol=1e-4, atol=1e-4)
    rw.unmerge(model)
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert torch.equal(logits(model, IDS), on)
    rw.merge(model)
    rw.unadapt(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model, IDS), on_base)


def test_both_owners_of_a_tied_weight_adapted() -> None:
    base = llama(tie_word_embeddings=True)
    on_base = logits(base, IDS)
    model = perturb(rw.adapt(base, rw.recipes.lora(rank=4, targets=["lm_head", "embed_tokens"])), size=0.5)
    on = logits(model, IDS)
    rw.merge(model)
    torch.testing.assert_close(logits(model, IDS), on, rtol=1e-4, atol=1e-4)
    with rw.disabled(model):
        assert torch.equal(logits(model, IDS), on_base)
    rw.unadapt(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model, IDS), on_base)


def test_adapting_again_after_unadapt_starts_from_the_same_place() -> None:
    model = llama()
    recipe = rw.recipes.pissa(rank=4)
    rw.adapt(model, recipe)
    first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rw.unadapt(perturb(model))
    rw.adapt(model, recipe)
    second = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_base_and_adapter_dtypes() -> None:
    for dtype, masters in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)):
        model = rw.adapt(one_linear(torch.randn(8, 12, dtype=dtype)), rw.recipes.dora(rank=2))
        assert site(model).weight.dtype == dtype
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {masters}


@pytest.mark.parametrize("training", [True, False])
def test_new_modules_are_in_the_mode_of_what_they_replace(training: bool) -> None:
    base = classifier().train(training)
    model = rw.adapt(base, rw.recipes.dora(rank=4, dropout=0.5, targets=["query"], modules_to_save=["classifier"]))
    assert {module.training for module in model.modules()} == {training}
    if not training:
        perturb(model)
        assert torch.equal(logits(model, IDS), logits(model, IDS))  # no dropout
    rw.unadapt(model.train(not training))
    assert {module.training for module in model.modules()} == {not training}


# --- a head that trains in full --------------------------------------------------------------------------------------------------------


def with_head(dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """An adapted classifier after two steps, the base's logits, and the base's parameters."""
    base = classifier().to(dtype)
    on_base, before = logits(base, IDS), parameters(base)
    model = rw.adapt(base, rw.recipes.lora(rank=4, targets=["query", "value"], modules_to_save=["classifier"]))
    assert torch.equal(logits(model, IDS), on_base) or dtype != torch.float32  # an fp32 head rounds later than a bf16 one
    torch.testing.assert_close(logits(model, IDS), on_base, rtol=1e-2, atol=1e-2)
    optimizer = rw.optimizer(model, lr=5e-2)
    for _ in range(2):
        model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, on_base, before


def test_a_head_is_off_when_disabled_and_in_the_reference() -> None:
    model, on_base, _ = with_head()
    assert isinstance(model.classifier, TrainedModule)
    on = logits(model, IDS)
    assert not torch.equal(model.classifier.trained.weight, model.classifier.base_layer.weight)
    with rw.disabled(model), rw.disabled(model):
        assert torch.equal(logits(model, IDS), on_base)
    assert torch.equal(rw.reference(model)(input_ids=IDS).logits, on_base)
    assert torch.equal(logits(model, IDS), on)
    rw.merge(model)
    torch.testing.assert_close(logits(model, IDS), on, rtol=1e-5, atol=1e-5)
    with rw.disabled(model):
        assert torch.equal(logits(model, IDS), on_base)
    rw.unmerge(model)
    assert torch.equal(logits(model, IDS), on)


def test_a_head_is_given_back_by_unadapt() -> None:
    model, on_base, before = with_head()
    rw.unadapt(model)
    assert not trained_modules(model)
    assert same(model, before)
    assert torch.equal(logits(model, IDS), on_base)


def test_a_head_stays_in_a_model_merged_for_good() -> None:
    model, _, before = with_head()
    on, head = logits(model, IDS), model.classifier.trained.weight.detach().clone()
    rw.merge(model, keep_base=False)
    assert type(model.classifier) is nn.Linear
    assert torch.equal(model.classifier.weight, head)
    assert set(dict(model.named_parameters())) == set(before)
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model, IDS), on, rtol=1e-5, atol=1e-5)


def test_a_head_of_a_bf16_base_trains_in_fp32() -> None:
    model, _, before = with_head(torch.bfloat16)
    assert model.classifier.trained.weight.dtype == torch.float32
    assert model.classifier.base_layer.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    assert model.classifier.trained.weight.grad.dtype == torch.float32
    rw.merge(model, keep_base=False)
    assert model.classifier.weight.dtype == torch.bfloat16
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
