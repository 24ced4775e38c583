"""The contract of docs/integrations.md: every family of models keeps every promise, and the tools around them take adapted models."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import FAMILIES, build, family, words
from tiny_models import llama, logits, perturb, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import CheckpointError, TargetError, TrainingError
from rankwise.matching import stacked_weights
from rankwise.sites import adapted_sites, trained_modules

torch.set_num_threads(1)
METHODS = ("lora", "dora", "pissa", "vera", "lora-fa")


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- families --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_keeps_every_promise(name: str, method: str, tmp_path: Path) -> None:
    """Plan, start, step, save and load, switching off, merging, taking off: of every linear layer of the family."""
    model, batch, fields = family(name)
    base, before, weights = copy.deepcopy(model), output(model, batch), state(model)
    recipe = rw.recipes.RECIPES[method](rank=4, **fields)
    plan = rw.plan(model, recipe)
    rw.adapt(model, recipe)
    sites = adapted_sites(model)
    assert list(sites) == [site.name for site in plan.sites]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trained_parameters
    assert torch.equal(output(model, batch), before)  # the base to the last bit

    perturb(model)  # away from the start, where some gradients are zero
    trained = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    optimizer = rw.optimizer(model, lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    for part in [*sites.values(), *trained_modules(model).values()]:
        mine = [(key, p) for key, p in part.named_parameters() if p.requires_grad]
        assert mine
        for key, parameter in mine:
            assert parameter.grad is not None, key
            assert bool(parameter.grad.ne(0).any()), key
    for key, parameter in model.named_parameters():
        assert (key in trained and not torch.equal(parameter, trained[key])) == parameter.requires_grad, key

    on = output(model, batch)
    assert not torch.allclose(on, before, atol=1e-3)
    rw.load(base, rw.save(model, tmp_path / "adapter"))
    assert torch.equal(output(base, batch), on)
    with rw.disabled(model):
        assert torch.equal(output(model, batch), before)
    rw.merge(model)
    torch.testing.assert_close(output(model, batch), on, rtol=1e-4, atol=1e-4)
    rw.unadapt(model)
    assert torch.equal(output(model, batch), before)
    assert equal(state(model), weights)


@pytest.mark.parametrize(("kind", "extra"), [("Mixtral", {}), ("GptOss", {"head_dim": 8}), ("Qwen3Moe", {"head_dim": 8})])
def test_experts_in_one_tensor_are_named_and_refused(kind: str, extra: dict[str, Any]) -> None:
    shape = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    count = {"Qwen3Moe": "num_experts"}.get(kind, "num_local_experts")
    model = build(f"{kind}ForCausalLM", **shape, num_key_value_heads=2, **{count: 4}, **extra)
    experts = {name: p.numel() for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3}
    assert {name: weight.numel() for name, weight in stacked_weights(model).items()} == experts
    assert len(experts) == 4
    plan = rw.plan(model, rw.recipes.lora(rank=2))
    wanted = f"{sum(experts.values()):,} parameters of experts are not adapted and stay frozen: 4 tensors"
    assert any(note.startswith(wanted) for note in plan.notes)
    assert wanted in str(plan)
    for target in ("experts", "mlp.experts", "gate_up_proj", "experts.down_proj", r"re:.*\.experts\..*"):
        with pytest.raises(TargetError, match=r"layers\.0\.mlp\.experts\.\w+, which holds the matrices of several experts in one tensor"):
            rw.plan(model, rw.recipes.lora(rank=2, targets=[target]))
    router = "router" if kind == "GptOss" else "gate"
    with pytest.raises(TargetError, match="which is no linear layer; there is none inside it either; leave it out"):
        rw.plan(model, rw.recipes.lora(rank=2, targets=[router]))
    # what trains in full is not frozen
    assert not any("experts" in note for note in rw.plan(model, rw.recipes.lora(rank=2, modules_to_save=["experts"])).notes)


def test_experts_train_in_full_when_asked() -> None:
    model, batch, _ = family("mixtral")
    before = output(model, batch)
    rw.adapt(model, rw.recipes.lora(rank=2, modules_to_save=["experts"]))
    assert torch.equal(output(model, batch), before)
    (trained,) = trained_modules(model).values()
    start = state(trained.trained)
    optimizer = rw.optimizer(model, lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    assert not any(torch.equal(tensor, start[name]) for name, tensor in state(trained.trained).items())
    with rw.disabled(model):
        assert torch.equal(output(model, batch), before)


def test_a_target_that_reaches_only_linear_layers_of_its_name_is_said() -> None:
    shape = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = build("Qwen2MoeForCausalLM", **shape, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24)
    plan = rw.plan(model, rw.recipes.lora(rank=2, targets=["q_proj", "down_proj"]))
    assert [site.name for site in plan.sites] == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.shared_expert.down_proj"]
    assert any("'down_proj' among the targets names some of them, and reaches only the linear layers" in note for note in plan.notes)


def test_other_tensors_with_three_sides_are_no_experts() -> None:
    assert not stacked_weights(family("vit")[0])  # class token and position embeddings
    assert not stacked_weights(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Bilinear(2, 2, 2), nn.ConvTranspose1d(4, 4, 3)))


# --- tools -----------------------------------------------------------------------------------------------------------------------------


def rows(count: int = 4) -> list[dict[str, list[int]]]:
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in token_ids(rows=count, length=9)]


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_loop(model: nn.Module, steps: int, **options: Any) -> None:
    """What every tool below must equal: the rows in order, two a step, no clipping."""
    optimizer = rw.optimizer(model, lr=1e-2, **options)
    ids = torch.tensor([row["input_ids"] for row in rows()])
    for step in range(steps):
        batch = ids[2 * step % 4 :][:2]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def agree(model: nn.Module, other: nn.Module, atol: float = 1e-6) -> None:
    want = trained_values(other)
    assert want.keys() == trained_values(model).keys()
    for name, value in trained_values(model).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=atol, msg=name)


def trainer_arguments(folder: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    fields: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return TrainingArguments(str(folder), **fields | options)


def in_order() -> Any:
    """A Trainer that takes the rows as they come."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    return InOrder


@pytest.mark.parametrize("storage", ["keep", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_trainer_trains_as_a_plain_loop(method: str, storage: str, tmp_path: Path) -> None:
    recipe = rw.recipes.RECIPES[method](rank=4, storage=storage, dropout=0.0)
    model, other = (rw.adapt(llama(), recipe).train() for _ in range(2))
    start = trained_values(model)
    trainer = in_order()(
        model=model, args=trainer_arguments(tmp_path), train_dataset=rows(), optimizers=(rw.optimizer(model, lr=1e-2), None)
    )
    assert trainer.train().global_step == 3
    plain_loop(other, 3)
    agree(model, other)
    moved = [name for name, value in trained_values(model).items() if not torch.equal(value, start[name])]
    assert len(moved) == len(start)
    before = logits(model.eval(), token_ids())
    base = llama()
    rw.load(base, rw.save(model, tmp_path / "adapter"))
    assert torch.equal(logits(base, token_ids()), before)


@pytest.mark.parametrize("storage", ["keep", "nf4"])
def test_trainer_with_gradient_checkpointing(storage: str, tmp_path: Path) -> None:
    """Trainer turns it on; the numbers are those of a run without."""
    recipe = rw.recipes.dora(rank=4, storage=storage, dropout=0.0)
    model, other = (rw.adapt(llama(), recipe).train() for _ in range(2))
    calls = []
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
    arguments = trainer_arguments(tmp_path, activation_checkpointing=True)
    in_order()(model=model, args=arguments, train_dataset=rows(), optimizers=(rw.optimizer(model, lr=1e-2), None)).train()
    assert len(calls) == 6  # each block runs again in the backward
    plain_loop(other, 3)
    agree(model, other)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit", "opt", "gemma"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, batch, fields = family(name)
    rw.adapt(model, rw.recipes.lora(rank=4, **fields))
    perturb(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():  # where a family calls the function
        for field in ("dropout", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    gradients = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for key, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], want, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("method", METHODS)
def test_accelerate(method: str) -> None:
    from accelerate import Accelerator

    recipe = rw.recipes.RECIPES[method](rank=4, dropout=0.0)
    model, other = (rw.adapt(llama(), recipe).train() for _ in range(2))
    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader([{key: torch.tensor(value) for key, value in row.items()} for row in rows()], batch_size=2)
    prepared, optimizer, batches = accelerator.prepare(model, rw.optimizer(model, lr=1e-2), loader)
    for batch in batches:
        accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    plain_loop(other, 2)
    agree(model, other)
    plain = accelerator.unwrap_model(prepared)
    assert adapted_sites(plain)
    rw.merge(plain)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from rankwise.demo import base_folder

    return AutoTokenizer.from_pretrained(base_folder())


def speaking(tokenizer: Any, **fields: Any) -> Any:
    """A tiny Llama with the vocabulary of the tokenizer."""
    return llama(vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id, **fields)


@pytest.mark.parametrize("method", METHODS)
def test_trl_sft(method: str, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = rw.adapt(speaking(tokenizer), rw.recipes.RECIPES[method](rank=4))
    ids = token_ids()
    with rw.disabled(model):
        base = logits(model, ids)
    start = trained_values(model)
    data = Dataset.from_list([{"prompt": f"Say {word}:", "completion": f" {word}"} for word in ("one", "two", "three", "four")])
    arguments = trainer_arguments(tmp_path)
    config = SFTConfig(
        **{key: getattr(arguments, key) for key in ("output_dir", "max_steps", "report_to", "use_cpu", "bf16")}, max_length=32
    )
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, optimizers=(rw.optimizer(model, lr=1e-2), None))
    assert trainer.train().global_step == 3
    assert trainer.model is model
    assert len([name for name, value in trained_values(model).items() if torch.equal(value, start[name])]) == 0
    model.eval()
    with rw.disabled(model):
        assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("method", METHODS)
def test_trl_dpo_with_the_base_as_its_reference(method: str, tokenizer: Any, tmp_path: Path) -> None:
    """The first loss is log 2, because policy and reference are one; the reference stays the base while the policy moves."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = rw.adapt(speaking(tokenizer), rw.recipes.RECIPES[method](rank=4, dropout=0.0))
    reference, ids = rw.reference(model), token_ids()
    base, start = logits(reference, ids), trained_values(model)
    data = Dataset.from_list(
        [{"prompt": f"Say {word}:", "chosen": f" {word}", "rejected": " no"} for word in ("one", "two", "three", "four")]
    )
    config = DPOConfig(
        str(tmp_path), max_steps=3, report_to=[], use_cpu=True, bf16=False, max_length=32, logging_steps=1, save_strategy="no"
    )
    trainer = DPOTrainer(
        model,
        reference,  # type: ignore[arg-type]
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        optimizers=(rw.optimizer(model, lr=1e-2), None),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-4)
    assert losses[-1] < losses[0] - 1e-3
    assert not any(torch.equal(value, start[name]) for name, value in trained_values(model).items())
    assert torch.equal(logits(reference, ids), base)
    assert not torch.allclose(logits(model.eval(), ids), base, atol=1e-3)


def test_a_reference_is_the_base_whatever_forward_it_was_given() -> None:
    """As TRL and accelerate do: a forward that runs parts of the model, put in the place of the reference's own."""
    model, ids = llama(), token_ids()
    before = model.model(input_ids=ids).last_hidden_state
    perturb(rw.adapt(model, rw.recipes.dora(rank=4)))
    reference: Any = rw.reference(model)
    reference.forward = lambda input_ids: reference.base_model(input_ids=input_ids).last_hidden_state
    assert torch.equal(reference(input_ids=ids), before)
    assert not torch.allclose(model.model(input_ids=ids).last_hidden_state, before, atol=1e-3)


def sft(model: nn.Module, tokenizer: Any, folder: Path, optimizer: Any, **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"prompt": f"Say {word}:", "completion": f" {word}"} for word in ("one", "two", "three", "four")])
    fields: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False, "max_length": 32, "save_strategy": "no"}
    config = SFTConfig(str(folder), **fields | options)
    return SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head"]])
def test_trl_reads_the_heads_weight_past_an_adapter_and_that_is_refused(targets: list[str], tokenizer: Any, tmp_path: Path) -> None:
    """At the first step, before anything has moved. A head that trains in full is read as it trains; a plain Trainer's loss is right."""
    model = rw.adapt(speaking(tokenizer), rw.recipes.lora(rank=4, targets=targets))
    start = trained_values(model)
    with pytest.raises(TrainingError, match=r"reads the weight of lm_head past its adapter .*targets\.exclude"):
        sft(model, tokenizer, tmp_path, rw.optimizer(model, lr=1e-2), max_steps=3).train()
    assert all(torch.equal(value, start[name]) for name, value in trained_values(model).items())

    model = rw.adapt(speaking(tokenizer), rw.recipes.lora(rank=4, targets=["q_proj"], modules_to_save=["lm_head"]))
    base_head, head = model.lm_head.base_layer.weight, model.lm_head.weight
    sft(model, tokenizer, tmp_path, rw.optimizer(model, lr=1e-2), max_steps=2).train()
    assert model.lm_head.weight is head
    assert not torch.equal(head, base_head)
    with rw.disabled(model):
        assert model.lm_head.weight is base_head  # what TRL reads of the reference
    model, other = (rw.adapt(llama(), rw.recipes.lora(rank=4, targets=["q_proj", "lm_head"])).train() for _ in range(2))
    in_order()(model=model, args=trainer_arguments(tmp_path), train_dataset=rows(), optimizers=(rw.optimizer(model, lr=1e-2), None)).train()
    plain_loop(other, 3)
    agree(model, other)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi", "gpt2", "opt", "t5", "mixtral"])
def test_generate_is_that_of_the_merged_model(name: str) -> None:
    model, batch, fields = family(name)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generator: Any = model
    plain = generator.generate(batch["input_ids"], **options)
    rw.adapt(model, rw.recipes.dora(rank=4, **fields))
    assert torch.equal(generator.generate(batch["input_ids"], **options), plain)
    perturb(model, size=2.0)
    on = generator.generate(batch["input_ids"], **options)
    assert not torch.equal(on, plain)
    without_cache = generator.generate(batch["input_ids"], use_cache=False, **options)
    assert torch.equal(on, without_cache)
    assert torch.equal(rw.reference(model).generate(batch["input_ids"], **options), plain)
    rw.merge(model, keep_base=False)
    assert torch.equal(generator.generate(batch["input_ids"], **options), on)


def test_pipeline(tokenizer: Any) -> None:
    from transformers import pipeline

    model = rw.adapt(speaking(tokenizer), rw.recipes.lora(rank=4))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_full_text": False}

    def said() -> str:
        return pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")("Say one:", **options)[0]["generated_text"]

    base = said()
    perturb(model, size=3.0)
    assert said() != base
    with rw.disabled(model):
        assert said() == base


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "opt", "t5", "bert", "roberta", "vit", "mixtral"])
def test_save_pretrained_of_the_merged_model(name: str, tmp_path: Path) -> None:
    model, batch, fields = family(name)
    rw.adapt(model, rw.recipes.dora(rank=4, **fields))
    perturb(model)
    on = output(model, batch)
    rw.merge(model, keep_base=False)
    merged = output(model, batch)
    torch.testing.assert_close(merged, on, rtol=1e-4, atol=1e-4)
    saver: Any = model
    saver.save_pretrained(tmp_path)
    again, loading = type(saver).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert torch.equal(output(again.eval(), batch), merged)


def test_save_pretrained_of_an_adapted_model_is_refused(tmp_path: Path) -> None:
    """transformers would reload such a folder with the adapted layers drawn anew. Copies and pickles refuse for themselves."""
    model: Any = perturb(rw.adapt(llama(), rw.recipes.dora(rank=4)))
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        with pytest.raises(CheckpointError, match=r"rankwise\.save.*rankwise\.merge\(model, keep_base=False\).*rankwise\.export"):
            each.save_pretrained(tmp_path / "never")
        assert each.__dict__["save_pretrained"].model() is each
    rw.merge(model)  # its weights still stand under names of the adapted model
    with pytest.raises(CheckpointError, match="freshly drawn"):
        model.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    rw.unadapt(model)
    rw.merge(copies[1], keep_base=False)
    for number, each in enumerate(copies[:2]):
        assert "save_pretrained" not in each.__dict__
        each.save_pretrained(tmp_path / str(number))
        again, about = type(each).from_pretrained(tmp_path / str(number), output_loading_info=True)
        assert not about["missing_keys"]
        assert torch.equal(logits(again, token_ids()), logits(each, token_ids()))
    with pytest.raises(CheckpointError, match="freshly drawn"):
        copies[2].save_pretrained(tmp_path / "never")


def named_base(folder: Path) -> Any:
    """A tiny Llama that lies in a folder, and knows it."""
    if not folder.exists():
        llama().save_pretrained(folder)
    return type(llama()).from_pretrained(folder).eval()


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_checkpoints_of_trainer_resume_and_are_adapters(method: str, tmp_path: Path) -> None:
    """Trainer goes on from one with the very numbers; rw.load takes one; transformers loads one right, or stops, or says what it lost."""
    recipe = rw.recipes.RECIPES[method](rank=4, dropout=0.0)
    models = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        model = rw.adapt(named_base(tmp_path / "base"), recipe).train()
        arguments = trainer_arguments(tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)
        trainer = in_order()(model=model, args=arguments, train_dataset=rows(), optimizers=(rw.optimizer(model, lr=1e-2), None))
        assert trainer.train(resume_from_checkpoint=resume).global_step == 4
        models.append(model.eval())
        trainer.save_model(str(tmp_path / "saved"))
    first, resumed = (trained_values(model) for model in models)
    assert all(torch.equal(value, resumed[name]) for name, value in first.items())
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "saved"):
        assert not (folder / "config.json").exists()  # with it transformers would take the adapted names for a whole model's
        assert torch.equal(logits(rw.load(named_base(tmp_path / "base"), folder), token_ids()), logits(models[0], token_ids()))
        kind = type(models[0])
        if method == "vera":  # which transformers does not take as an adapter
            with pytest.raises(ValueError, match=r"does not support PeftType\.VERA"):
                kind.from_pretrained(folder)
            continue
        again, about = kind.from_pretrained(folder, output_loading_info=True)
        if method == "dora":  # transformers loses the magnitudes of every DoRA adapter, PEFT's own too, and reports them
            assert all("lora_magnitude_vector" in key for key in about["missing_keys"])
            assert about["missing_keys"]
        else:
            assert not about["missing_keys"]
            torch.testing.assert_close(logits(again.eval(), token_ids()), logits(models[0], token_ids()), rtol=1e-5, atol=1e-5)


def test_checkpoints_of_trl(tokenizer: Any, tmp_path: Path) -> None:
    base = speaking(tokenizer)
    model = rw.adapt(copy.deepcopy(base), rw.recipes.lora(rank=4))
    sft(model, tokenizer, tmp_path, rw.optimizer(model, lr=1e-2), max_steps=2, save_strategy="steps", save_steps=1).train()
    again = rw.load(copy.deepcopy(base), tmp_path / "checkpoint-2")
    assert torch.equal(logits(again, token_ids()), logits(model.eval(), token_ids()))


@pytest.mark.parametrize(("method", "storage"), [*((method, "keep") for method in METHODS), ("dora", "nf4")])
def test_the_compiler_gives_what_eager_gives(method: str, storage: str) -> None:
    torch._dynamo.reset()
    # one shared input and one site of its own: the compiler's time grows with the sites, which are all alike
    recipe = rw.recipes.RECIPES[method](rank=4, storage=storage, dropout=0.0, targets=["q_proj", "k_proj", "v_proj", "down_proj"])
    model = perturb(rw.adapt(llama(num_hidden_layers=1), recipe))
    batch = words()
    results = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        made = run(**batch)
        made.loss.backward()
        results.append((made.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (logits_e, gradients_e), (logits_c, gradients_c) = results
    torch.testing.assert_close(logits_c, logits_e, rtol=1e-5, atol=1e-5)
    assert gradients_c.keys() == gradients_e.keys()
    for name, want in gradients_e.items():
        assert (gradients_c[name] - want).abs().max() <= 1e-4 * want.abs().max(), name


def test_lightning(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return rw.optimizer(self.model, lr=1e-2)

    model, other = (rw.adapt(llama(), rw.recipes.dora(rank=4)).train() for _ in range(2))
    loader = torch.utils.data.DataLoader([{key: torch.tensor(value) for key, value in row.items()} for row in rows()], batch_size=2)
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(Module(model), loader)
    plain_loop(other, 2)
    agree(model, other)


PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"
SCRIPTS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_what_the_page_shows_runs(number: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    batch = dict(tokenizer(["Say one:", "Say two:"], return_tensors="pt", padding=True))
    batch["labels"] = batch["input_ids"]
    encoded = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in batch["input_ids"]]
    names: dict[str, Any] = {"model": speaking(tokenizer), "tokenizer": tokenizer, "batch": batch, "rows": encoded}
    exec(compile(SCRIPTS[number], str(PAGE), "exec"), names)


def test_the_page_names_every_family_and_every_test_that_is_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", text))
    assert named
    assert named <= set(globals())
    rows_of_families = re.findall(r"^\| ([^|]+?) +\| `([a-z0-9-]+)`", text, re.M)
    assert {key for _, key in rows_of_families} == set(FAMILIES)
