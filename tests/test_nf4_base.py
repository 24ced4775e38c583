"""A base held in 4 bits under everything else: starts, gains, checkpoints, plans, configurations, other people's layers."""

import copy
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from tiny_models import gpt2, llama, logits, one_linear, perturb, site, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.checkpoint.state import load_trainable_state, trainable_state
from rankwise.errors import CheckpointError, RecipeError, TargetError
from rankwise.recipe import Recipe
from rankwise.sites import adapted_sites
from rankwise.storage import NF4Linear
from rankwise.storage.nf4_codes import dequantize, quantize

torch.set_num_threads(1)
TARGETS = ["q_proj", "k_proj", "down_proj"]


def nf4(**fields: Any) -> Recipe:
    return rw.recipes.lora(**{"rank": 4, "storage": "nf4", "targets": TARGETS} | fields)


def rounded(weight: Tensor) -> Tensor:
    """A weight as NF4 holds it, in fp32."""
    return dequantize(quantize(weight), tuple(weight.shape), torch.float32)


def power_law(size: int = 128, seed: int = 0) -> Tensor:
    """(size, size) in fp32 with singular values i^-0.6."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    return ((u * torch.arange(1, size + 1, dtype=torch.float64) ** -0.6) @ v.T).float()


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool((got - want).norm() <= tolerance * want.norm())


# --- starts and gains ------------------------------------------------------------------------------------------------------------------


def test_a_kept_start_is_the_quantized_base_exactly() -> None:
    """base='keep' takes the start from the 4-bit weight and subtracts it in the forward: nothing moves, whatever the init and gain."""
    ids = token_ids()
    want = logits(rw.adapt(llama(), nf4()), ids)
    for fields in ({"init": "pissa"}, {"init": "milora-svd"}, {"init": "olora"}, {"init": "pissa", "gain": "dora"}, {"gain": "propulsion"}):
        model = rw.adapt(llama(), nf4(**fields))
        assert torch.equal(logits(model, ids), want), fields
    assert not close(want, logits(llama(), ids), 1e-2)  # 4 bits are visible


@pytest.mark.check("pissa", 7)
def test_qpissa_quantizes_the_residual_and_iterations_help() -> None:
    """The nuclear norm of what quantization loses: five rounds < one round < plain NF4; the forward uses exactly the last residual."""
    weight = power_law()
    plain = float(torch.linalg.matrix_norm(rounded(weight) - weight, "nuc"))
    errors, x = [], torch.randn(5, 128)
    for rounds in (1, 5):
        recipe = rw.recipes.pissa(rank=8, base="fold", svd="exact", storage={"name": "nf4", "iterations": rounds})
        model = rw.adapt(one_linear(weight), recipe)
        module = site(model)
        assert isinstance(module.base_layer, NF4Linear)
        update: Any = module.update
        start = update.factors().delta().detach()
        assert torch.equal(module.base_layer.weight, rounded(weight - start))
        torch.testing.assert_close(model(x), x @ (module.base_layer.weight + start).T, rtol=1e-4, atol=1e-5)
        errors.append(float(torch.linalg.matrix_norm(module.base_layer.weight + start - weight, "nuc")))
    assert errors[1] < 0.97 * errors[0]
    assert errors[0] < 0.85 * plain


def test_a_folded_start_comes_back_dense() -> None:
    model, ids = llama(), token_ids()
    before = logits(model, ids)
    rw.adapt(model, nf4(init="pissa", base="fold"))
    with rw.disabled(model):
        off = logits(model, ids)
    assert torch.allclose(off, logits(model, ids), atol=1e-4)
    on = logits(perturb(model), ids)
    rw.merge(model)
    assert torch.allclose(logits(model, ids), on, atol=1e-4)
    rw.unadapt(model)
    assert torch.allclose(logits(model, ids), off, atol=1e-4)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(model.model.layers[0].self_attn.v_proj, NF4Linear)
    assert close(logits(model, ids), before, 0.5)


def test_doras_lengths_are_of_the_quantized_weight_or_of_the_original() -> None:
    weight = power_law()
    for lengths, want in (("held", rounded(weight)), ("original", weight)):
        model = rw.adapt(one_linear(weight), rw.recipes.qlora(rank=4, gain={"name": "dora", "lengths": lengths}, dropout=0.0))
        module = site(model)
        gain: Any = module.gain
        torch.testing.assert_close(gain.magnitude0, want.norm(dim=1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.merged_weight().norm(dim=1), want.norm(dim=1), rtol=1e-5, atol=1e-6)
        assert torch.equal(module.base_layer.weight, rounded(weight))
    x = torch.randn(3, 128)
    exact = rw.adapt(one_linear(weight), rw.recipes.qlora(rank=4, gain="dora"))
    assert torch.equal(exact.eval()(x), site(exact).base_layer(x))


# --- which layers ----------------------------------------------------------------------------------------------------------------------


def test_only_ordinary_linear_layers_are_replaced() -> None:
    model = llama(tie_word_embeddings=True)
    recipe = nf4(storage={"name": "nf4", "keep": ["layers.1.mlp.up_proj"]})
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)
    plan = rw.plan(model, recipe)
    assert len(plan.held) == 12
    notes = "\n".join(plan.notes)
    assert "model.layers.1.mlp.up_proj stays as loaded: as asked" in notes
    assert "model.layers.0.mlp.gate_proj stays as loaded: a Linear that cannot be looked into" in notes
    assert "storage='nf4' replaces the weights of 12 linear layers" in notes
    rw.adapt(model, recipe)
    assert {name.replace(".base_layer", "") for name, module in model.named_modules() if isinstance(module, NF4Linear)} == set(plan.held)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(TargetError, match=r"storage.keep: 'up_porj' matches nothing; did you mean 'up_proj'"):
        rw.plan(llama(), nf4(storage={"name": "nf4", "keep": ["up_porj"]}))


def test_an_embedding_stays_dense_and_may_be_adapted() -> None:
    model, ids = llama(), token_ids()
    rw.adapt(model, nf4(targets=["embed_tokens", "lm_head", "q_proj"]))
    assert type(site(model, "model.embed_tokens").base_layer) is nn.Embedding
    assert type(site(model, "lm_head").base_layer) is nn.Linear
    base = logits(model, ids)
    on = logits(perturb(model), ids)
    rw.merge(model)
    assert torch.allclose(logits(model, ids), on, atol=1e-4)
    rw.unadapt(model)
    assert torch.equal(logits(model, ids), base)


def test_modules_that_train_in_full_and_attention_stay_dense() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.first = nn.Linear(16, 32)
            self.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.first(self.attention(x, x, x)[0]))

    model = Model().eval()
    x = torch.randn(2, 3, 16)
    plan = rw.plan(model, nf4(targets=["first"], modules_to_save=["classifier"]))
    assert plan.held == ("first",)
    assert any("attention.out_proj stays as loaded: its weight is read past it" in note for note in plan.notes)
    before = model(x)
    rw.adapt(model, plan.recipe)
    assert close(model(x), before, 0.3)


def test_gpt2_is_held_the_right_way_round() -> None:
    """Conv1D holds (in, out); c_proj of the attention is square, so that a transposed weight would not show in shapes."""
    model, ids = gpt2(), token_ids()
    dense = {name: module.weight.detach().T.clone() for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    assert len(rw.plan(model, nf4(targets=["attn.c_proj", "c_attn"])).held) == len(dense) == 8
    rw.adapt(model, nf4(targets=["attn.c_proj", "c_attn"]))
    for name, weight in dense.items():
        layer: Any = model.get_submodule(name)
        layer = getattr(layer, "base_layer", layer)
        assert torch.equal(layer.weight, rounded(weight))
    on = logits(perturb(model), ids)
    rw.merge(model)
    assert torch.allclose(logits(model, ids), on, atol=1e-4)


def test_a_final_merge_leaves_no_layer_in_4_bits() -> None:
    """Also those without an adapter: what is saved then is an ordinary checkpoint."""
    model, ids = perturb(rw.adapt(llama(), nf4(targets=["q_proj"]))), token_ids()
    want = logits(model, ids)
    rw.merge(model, keep_base=False)
    assert torch.allclose(logits(model, ids), want, atol=1e-4)
    assert model.state_dict().keys() == llama().state_dict().keys()


# --- the plan --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_counts_the_bytes_that_will_be_there(dtype: torch.dtype) -> None:
    model = llama(dtype=dtype)
    plan = rw.plan(model, nf4())
    assert plan.base_parameters == sum(p.numel() for p in model.parameters())
    assert plan.memory["dequantized weight"] == 48 * 32 * dtype.itemsize
    assert "dequantized weight" in str(plan)
    rw.adapt(model, nf4())
    rw.unadapt(model)
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert plan.memory["base weights"] == held < 0.8 * sum(p.numel() * dtype.itemsize for p in llama().parameters())
    # the same numbers from the base that is held already
    again = rw.plan(model, nf4())
    assert again.held == ()
    assert (again.base_parameters, again.memory) == (plan.base_parameters, plan.memory)


def test_paper_memory_of_a_7b_base() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        seven = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32)).bfloat16()
    plan = rw.plan(seven, rw.recipes.qlora(rank=64))
    assert plan.trained_parameters == 159_907_840
    assert plan.memory["base weights"] == pytest.approx(3.34e9 + 0.52e9, rel=0.005)
    assert plan.memory["dequantized weight"] == 4096 * 11008 * 2


# --- a base that is in 4 bits already --------------------------------------------------------------------------------------------------


def their_llama(**options: Any) -> Any:
    """The tiny llama with bitsandbytes' layers, as a loader would build it."""
    model = llama(dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, torch.bfloat16, True, "nf4", device="cpu"
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data, False, quant_type=options.get("quant_type", "nf4"), module=layer)
            layer.weight._quantize("cpu")
            layer.bias = module.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer)
    return model.train()


def test_a_base_of_bitsandbytes_is_taken_over_code_by_code() -> None:
    ids = token_ids()
    ours = rw.adapt(llama(dtype=torch.bfloat16), nf4())
    want = logits(ours, ids)
    model = their_llama()
    plan = rw.plan(model, nf4())
    assert len(plan.held) == 14
    rw.adapt(model, nf4())
    assert not any(type(module).__name__ == "Linear4bit" for module in model.modules())
    assert torch.equal(logits(model.eval(), ids), want)
    with pytest.raises(TargetError, match="'fp4' is not nf4"):
        rw.adapt(their_llama(quant_type="fp4"), nf4())


def test_a_start_cannot_be_folded_into_codes() -> None:
    for model in (rw.unadapt(rw.adapt(llama(), nf4())), their_llama()):
        for fields in ({"storage": "nf4"}, {"storage": "keep"}):
            with pytest.raises(TargetError, match="held in nf4 already, so base='fold'"):
                rw.plan(model, nf4(init="pissa", base="fold", **fields))
        with pytest.raises(TargetError, match="held in nf4 already: the lengths"):
            rw.plan(model, nf4(gain={"name": "dora", "lengths": "original"}))


# --- checkpoints -----------------------------------------------------------------------------------------------------------------------

SAVED: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"gain": "dora"},
    "original lengths": {"gain": {"name": "dora", "lengths": "original"}},
    "pissa": {"init": "pissa"},
    "qpissa": {"init": "pissa", "base": "fold"},
    "qpissa, three rounds": {"init": "pissa", "base": "fold", "storage": {"name": "nf4", "iterations": 3}},
    "moslora": {"update": "moslora"},
    "vera": {"update": "vera", "init": "own", "rank": 8},
    "without double quantization": {"storage": {"name": "nf4", "double_quant": False, "blocksize": 32}},
}


@pytest.mark.parametrize("case", SAVED)
def test_loading_quantizes_the_base_the_same_way(case: str, tmp_path: Path) -> None:
    ids = token_ids()
    model = perturb(rw.adapt(llama(dtype=torch.bfloat16), nf4(**SAVED[case])))
    want = logits(model, ids)
    rw.save(model, tmp_path / "adapter")
    loaded = rw.load(llama(dtype=torch.bfloat16), tmp_path / "adapter")
    assert torch.equal(logits(loaded, ids), want)
    resumed = rw.adapt(llama(dtype=torch.bfloat16), nf4(**SAVED[case]))
    load_trainable_state(resumed, trainable_state(model))
    assert torch.equal(logits(resumed, ids), want)


def test_an_adapter_goes_between_the_dense_base_and_its_4_bit_form(tmp_path: Path) -> None:
    ids = token_ids()
    model = perturb(rw.adapt(llama(dtype=torch.bfloat16), nf4()))
    want = logits(model, ids)
    rw.save(model, tmp_path / "of dense")
    base = rw.unadapt(model)
    on_codes = perturb(rw.adapt(base, nf4()), seed=7)
    other = logits(on_codes, ids)
    rw.save(on_codes, tmp_path / "of codes")
    base = rw.unadapt(on_codes)
    assert torch.equal(logits(rw.load(base, tmp_path / "of dense"), ids), want)
    assert torch.equal(logits(rw.load(their_llama(), tmp_path / "of dense"), ids), want)
    for fresh in (llama(dtype=torch.bfloat16), their_llama()):
        assert torch.equal(logits(rw.load(fresh, tmp_path / "of codes"), ids), other)
    for folder in ("of dense", "of codes"):
        with pytest.raises(CheckpointError, match="trained on another base"):
            rw.load(llama(seed=3, dtype=torch.bfloat16), tmp_path / folder)


def test_peft_loads_the_adapter_over_the_same_4_bit_base(tmp_path: Path) -> None:
    from peft import PeftModel

    ids = token_ids()
    model = perturb(rw.adapt(llama(), nf4(alpha=16)))
    want, base = logits(model, ids), {}
    rw.save(model, tmp_path / "adapter")
    for name, module in rw.unadapt(model).named_modules():
        if isinstance(module, NF4Linear):
            base[f"{name}.weight"] = module.weight
    dense = llama()
    dense.load_state_dict(base, strict=False)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(dense, str(tmp_path / "adapter")), ids), want, rtol=1e-4, atol=1e-5)


def test_peft_refuses_what_it_cannot_rebuild(tmp_path: Path) -> None:
    from peft import PeftModel

    rw.save(rw.adapt(llama(), nf4(init="pissa", base="fold")), tmp_path / "adapter")
    with pytest.raises((ValueError, KeyError)):
        PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))


# --- what models go through ------------------------------------------------------------------------------------------------------------


def test_casts_copies_and_pickles_keep_every_digit() -> None:
    layer = NF4Linear.from_weight(power_law(64), torch.randn(64))
    x = torch.randn(3, 64)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)
    cast = copy.deepcopy(layer).bfloat16()
    assert cast.bias is not None
    assert cast.bias.dtype == torch.bfloat16
    assert torch.equal(cast.weight, layer.weight)  # the scales stay in fp32
    assert close(cast(x.bfloat16()).float(), want, 0.02)
    plain = NF4Linear.from_weight(power_law(64), double_quant=False)
    assert plain.half().absmax.dtype == torch.float32
    again = NF4Linear.from_weight(torch.zeros(64, 64), torch.zeros(64))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), want)


def test_autocast_computes_in_its_dtype() -> None:
    dense = one_linear(rounded(power_law(64)), torch.randn(64))
    model = rw.adapt(one_linear(power_law(64), dense.proj.bias.detach()), rw.recipes.qlora(rank=2, dropout=0.0))
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = model(x), dense(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert close(got.float(), want.float(), 1e-2)
    got.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    ids, grads = token_ids(), []
    for checkpointed in (False, True):
        model = perturb(rw.adapt(llama(), nf4(gain="dora"))).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("gain", ["none", "dora"])
def test_the_compiler_keeps_no_dense_weight(gain: str) -> None:
    """One graph, the same numbers, and between forward and backward nothing of the weight's size."""
    model = rw.adapt(one_linear(power_law(64), torch.randn(64)), rw.recipes.qlora(rank=2, gain=gain, dropout=0.0))
    perturb(model)
    x = torch.randn(3, 64, requires_grad=True)
    want = model(x)
    (want_grad,) = torch.autograd.grad(want.sum(), x, retain_graph=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        got = compiled(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-5)
    assert sizes
    assert max(sizes) < 64 * 64


def test_generation_uses_the_4_bit_base() -> None:
    model = rw.adapt(llama(), nf4())
    out = model.generate(input_ids=token_ids(1, 4), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 8)
    assert torch.equal(rw.reference(model).generate(input_ids=token_ids(1, 4), max_new_tokens=4, do_sample=False, pad_token_id=0), out)


# --- optimizers and configurations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PagedAdamW", "PagedAdamW32bit", "PagedAdamW8bit"])
def test_a_paged_optimizer_is_passed_as_a_class(kind: str) -> None:
    """On a GPU its states live in managed memory; on a CPU it is the same optimizer without paging."""
    ids, models = token_ids(), [rw.adapt(llama(), nf4(gradient="lora-plus")) for _ in range(2)]
    paged = rw.optimizer(models[0], lr=1e-3, kind=getattr(bnb.optim, kind))
    plain = rw.optimizer(models[1], lr=1e-3)
    seen: dict[str, float] = {}
    paged.register_step_pre_hook(lambda made, *_: seen.update({group["role"]: group["lr"] for group in made.param_groups}))
    for _ in range(3):
        for model, optimizer in zip(models, (paged, plain), strict=True):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert seen["up"] == pytest.approx(16 * seen["down"])  # the hooks fire on it as on any optimizer
    for left, right in zip(adapted_sites(models[0]).values(), adapted_sites(models[1]).values(), strict=True):
        update, other = left.update, right.update
        assert torch.allclose(update.up, other.up, rtol=0.02, atol=2e-4)  # type: ignore[union-attr]


def test_a_configuration_names_the_storage(tmp_path: Path) -> None:
    from rankwise.training.config import load_config, resolve

    path = tmp_path / "run.yaml"
    path.write_text("model: demo\ndata: demo\nmethod: {name: dora, storage: nf4}\n")
    recipe = resolve(load_config(path, ()))
    assert (recipe.gain.name, recipe.storage.name) == ("dora", "nf4")
    path.write_text("model: demo\ndata: demo\nmethod: {name: pissa, base: fold, storage: {name: nf4, iterations: 5}}\n")
    assert resolve(load_config(path, ())).storage.iterations == 5
    path.write_text("model: demo\ndata: demo\nmethod: {name: qlora, blocksize: 128, double_quant: false}\n")
    assert resolve(load_config(path, ())).storage.blocksize == 128  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="'nf5'"):
        rw.recipes.lora(storage="nf5")


def test_the_method_is_described() -> None:
    from rankwise.methods import describe

    text = describe("qlora")
    assert "storage   nf4" in text
    assert "arXiv 2305.14314" in text
    assert "double_quant = True" in text
