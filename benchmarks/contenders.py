"""The contenders of `benchmarks.train_step`: one base of random weights that all of them share, and who adapts it how."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = {  # hidden, feed-forward, layers, heads, vocabulary
    "tiny": (256, 704, 2, 4, 2048),
    "60M": (512, 1376, 8, 8, 32000),
    "130M": (768, 2048, 12, 12, 32000),
    "350M": (1024, 2736, 24, 16, 32000),
    "1B": (2048, 5461, 24, 32, 32000),
    "7B": (4096, 11008, 32, 32, 32000),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 1000  # that AdaLoRA's schedule is told


@dataclass(frozen=True)
class Case:
    """One line of the table: a method and its options. `optimizer`: the step includes clipping, the optimizer and what follows it."""

    method: str
    rank: int = 16
    dropout: float = 0.0
    optimizer: bool = False
    against: str = ""  # the case whose time it is measured by, where PEFT has no such method

    @property
    def name(self) -> str:
        """As printed."""
        return f"{self.method} r={self.rank}" + (f" dropout {self.dropout:g}" if self.dropout else "")


CASES = {
    "lora": Case("lora"),
    "lora-dropout": Case("lora", dropout=0.05),
    "dora": Case("dora"),
    "adalora": Case("adalora", rank=24, optimizer=True),
    "lora-fa": Case("lora-fa", optimizer=True),
    "vera": Case("vera", rank=256),
    "lora-24": Case("lora", rank=24),
    "loramoe": Case("loramoe", rank=4, against="lora-24"),
    "milora-mixture": Case("milora-mixture", against="lora"),
    "qlora": Case("qlora"),
}


@dataclass
class Contender:
    """One model and its step; `after` is what a training loop does once the gradients are there."""

    model: Any
    call: dict[str, Any]  # keyword arguments of the model
    after: Callable[[], object] | None = None

    def step(self) -> Tensor:
        """Forward and backward, and `after`."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(**self.call).loss
        loss.backward()
        if self.after is not None:
            self.after()
        return loss.detach()


def base_model(shape: str, dtype: torch.dtype, device: str) -> Any:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        use_cache=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).requires_grad_(False).train()
    finally:
        torch.set_default_dtype(before)


def sharing(base: nn.Module) -> Any:
    """A copy of the base over the very same weights."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]})


def floor(base: nn.Module, batch: dict[str, Tensor], wide: bool = False) -> Contender:
    """The frozen base's own forward and input gradient; `wide`: its 16-bit weights multiplied in fp32."""
    import rankwise as rw

    model = sharing(base)
    if wide:
        rw.fp32_products(model)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return Contender(model, batch)


def full(base: nn.Module, batch: dict[str, Tensor]) -> Contender:
    """Full fine-tuning: every weight has a gradient."""
    return Contender(copy.deepcopy(base).requires_grad_(True), batch)


def rankwise(base: nn.Module, batch: dict[str, Tensor], case: Case, alone: bool = False, wide: bool = False) -> Contender:
    """Ours. `alone`: the adapters without the lean norms, gated products and loss around them; `wide`: after `fp32_products`."""
    import rankwise as rw
    from rankwise import lean

    options: dict[str, Any] = {"rank": case.rank, "dropout": case.dropout, "targets": LINEARS}
    budget = {"total_steps": STEPS, "target_rank": 2 * case.rank // 3, "tinit": 1, "tfinal": STEPS // 2, "interval": 1, "alpha": 32}
    options |= {"adalora": budget, "milora-mixture": {"theta_mode": "joint"}, "qlora": {"alpha": 2 * case.rank}}.get(case.method, {})
    model = rw.adapt(sharing(base), rw.recipes.RECIPES[case.method](**options)).train()
    if alone:
        lean.uninstall(model)
    else:
        rw.fuse_loss(model)
    if wide:
        rw.fp32_products(model)
    call = dict(batch)
    if case.method == "milora-mixture":
        call["prompt_mask"] = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        call["prompt_mask"][:, : batch["input_ids"].shape[1] // 4] = True
    made = Contender(model, call)
    if case.optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = rw.optimizer(model, lr=1e-4, total_steps=STEPS)

        def after() -> None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

        made.after = after
    return made


def peft(base: nn.Module, batch: dict[str, Tensor], case: Case, upcast: bool) -> Contender:
    """PEFT's, its adapters in fp32 as by default (`upcast`) or in the base's dtype."""
    from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model

    common: dict[str, Any] = {"target_modules": LINEARS}
    plain: dict[str, Any] = {**common, "r": case.rank, "lora_alpha": 2 * case.rank, "lora_dropout": case.dropout}
    if case.method == "vera":
        config: Any = VeraConfig(r=case.rank, vera_dropout=case.dropout, save_projection=False, **common)
    elif case.method == "adalora":
        ranks = {"init_r": case.rank, "target_r": 2 * case.rank // 3, "lora_alpha": 32, "lora_dropout": case.dropout}
        config = AdaLoraConfig(**common, **ranks, tinit=1, tfinal=STEPS // 2, deltaT=1, total_step=STEPS, orth_reg_weight=0.1)
    else:
        config = LoraConfig(**plain, use_dora=case.method == "dora")
    copied = bnb_base(base) if case.method == "qlora" else sharing(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(copied, config, autocast_adapter_dtype=upcast).train()
    made = Contender(model, batch)
    if case.optimizer:
        if case.method == "lora-fa":
            from peft.optimizers import create_lorafa_optimizer

            optimizer: Any = create_lorafa_optimizer(model, r=case.rank, lora_alpha=2 * case.rank, lr=1e-4)
        else:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        step = 1

        def after() -> None:
            nonlocal step
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if case.method == "adalora":
                model.base_model.update_and_allocate(step)
                step += 1

        made.after = after
    return made


def bnb_base(base: nn.Module) -> Any:
    """The base with bitsandbytes' 4-bit layers, as transformers loads it."""
    import bitsandbytes as bnb

    model = sharing(base)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            device = module.weight.device
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, False, module.weight.dtype, True, "nf4", device="meta")
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            layer.weight._quantize(device)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer)
    model.is_loaded_in_4bit = True
    return model


def pairs(ours: Any, theirs: Any, method: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Tensors of rankwise's model and the ones of PEFT's that play the same part."""
    from rankwise.sites import adapted_sites

    modules, found = dict(theirs.named_modules()), []
    for name, site in adapted_sites(ours).items():
        layer: Any = modules[f"base_model.model.{name}"]
        update: Any = site.update
        if method == "vera":
            found += [(update.b, layer.vera_lambda_b["default"]), (update.d, layer.vera_lambda_d["default"])]
        elif method == "adalora":
            found += [(update.down, layer.lora_A["default"]), (update.up, layer.lora_B["default"])]
            found.append((update.lam, layer.lora_E["default"]))
        else:
            found += [(update.down, layer.lora_A["default"].weight), (update.up, layer.lora_B["default"].weight)]
    return found


def agreement(ours: Contender, theirs: Contender, method: str) -> dict[str, float]:
    """Gives both sides the same factors, none of them at zero, and compares loss and gradients, relative to PEFT's."""
    generator = torch.Generator().manual_seed(1)
    both = pairs(ours.model, theirs.model, method)
    with torch.no_grad():
        for mine, other in both:
            if mine.requires_grad and not bool(mine.any()):
                mine.copy_(torch.randn(mine.shape, generator=generator) * 0.01)
            other.copy_(mine.reshape(other.shape))
    losses = []
    for side in (ours, theirs):
        side.model.zero_grad(set_to_none=True)
        # AdaLoRA's penalty is in PEFT's loss and in our optimizer step: left out of both
        model = side.model.base_model.model if side is theirs and method == "adalora" else side.model
        loss = model(**side.call).loss
        loss.backward()
        losses.append(float(loss.detach()))
    difference = norm = 0.0
    for mine, other in both:
        if mine.grad is not None and other.grad is not None:
            difference += float((mine.grad.float().reshape(other.shape) - other.grad.float()).square().sum())
            norm += float(other.grad.float().square().sum())
    return {"loss": abs(losses[0] - losses[1]) / losses[1], "gradient": (difference / norm) ** 0.5}
