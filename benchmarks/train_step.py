"""One training step of a low-rank method: rankwise, PEFT, full fine-tuning and the frozen floor, interleaved in one process.

    python -m benchmarks.train_step --shape 60M --method lora --dtype bf16

The floor is the frozen base's own forward and input gradient: what no adapter can avoid. overhead = step / floor - 1.
Before timing, loss and adapter gradients of rankwise are compared with PEFT's on the same weights, so that both sides are
known to do the same work.
"""

import argparse
import copy
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = {  # hidden, feed-forward, layers, heads, vocabulary
    "tiny": (256, 688, 2, 4, 2048),
    "60M": (512, 1376, 8, 8, 32000),
    "130M": (768, 2048, 12, 12, 32000),
    "350M": (1024, 2736, 24, 16, 32000),
    "1B": (2048, 5461, 24, 32, 32000),
    "7B": (4096, 11008, 32, 32, 32000),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tune_allocator() -> None:
    """Keeps glibc from unmapping large results after each operation; the same for all contenders."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except OSError:
        pass


def base_model(shape: str, dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def ours(model: nn.Module, method: str, rank: int, dropout: float) -> nn.Module:
    import rankwise as rw

    options: dict[str, Any] = {"rank": rank, "dropout": dropout, "targets": LINEARS}
    return rw.fuse_loss(rw.adapt(model, rw.recipes.RECIPES[method](**options)))


def peft(model: nn.Module, method: str, rank: int, dropout: float, upcast: bool) -> nn.Module:
    from peft import LoraConfig, VeraConfig, get_peft_model

    if method == "vera":
        config: Any = VeraConfig(r=rank, vera_dropout=dropout, target_modules=LINEARS, save_projection=False)
    else:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=LINEARS, use_dora=method == "dora")
    return get_peft_model(model, config, autocast_adapter_dtype=upcast)


def copy_factors(source: nn.Module, target: nn.Module, method: str) -> None:
    """Puts rankwise's factors into PEFT's modules, so that both compute the same function; `up` gets small random values first."""
    from rankwise.sites import adapted_sites

    modules = dict(target.named_modules())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, site in adapted_sites(source).items():
            layer: Any = modules[f"base_model.model.{name}"]
            update: Any = site.update
            if method == "vera":
                update.b.copy_(torch.randn(update.b.shape, generator=generator) * 0.01)
                layer.vera_lambda_b["default"].copy_(update.b)
                layer.vera_lambda_d["default"].copy_(update.d)
            else:
                update.up.copy_(torch.randn(update.up.shape, generator=generator) * 0.01)
                layer.lora_A["default"].weight.copy_(update.down)
                layer.lora_B["default"].weight.copy_(update.up)


def saved_bytes(step: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that one forward keeps for the backward, each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    total = sum(seen.values())
    loss.backward()
    return total


def compare(ours_model: nn.Module, peft_model: nn.Module, batch: dict[str, Tensor], method: str) -> dict[str, float]:
    """Loss and gradient differences between the two, relative to PEFT's."""
    from rankwise.sites import adapted_sites

    losses = []
    for model in (ours_model, peft_model):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
    modules = dict(peft_model.named_modules())
    difference = norm = 0.0
    for name, site in adapted_sites(ours_model).items():
        layer: Any = modules[f"base_model.model.{name}"]
        update: Any = site.update
        pairs = (
            [(update.b, layer.vera_lambda_b["default"]), (update.d, layer.vera_lambda_d["default"])]
            if method == "vera"
            else [(update.down, layer.lora_A["default"].weight), (update.up, layer.lora_B["default"].weight)]
        )
        for mine, theirs in pairs:
            difference += float((mine.grad.float() - theirs.grad.float()).square().sum())
            norm += float(theirs.grad.float().square().sum())
    return {"loss": abs(losses[0] - losses[1]) / losses[1], "gradient": (difference / norm) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="60M")
    parser.add_argument("--method", choices=["lora", "dora", "vera"], default="lora")
    parser.add_argument("--rank", type=int, default=None, help="default 16, VeRA 256")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="time full fine-tuning too")
    parser.add_argument("--output", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    rank = options.rank or (256 if options.method == "vera" else 16)

    base = base_model(options.shape, dtype, device)
    ids = torch.randint(0, SHAPES[options.shape][4], (options.batch, options.length), device=device)
    batch = {"input_ids": ids, "labels": ids}
    models = {"floor": copy.deepcopy(base).requires_grad_(False)}
    if options.full:
        models["full fine-tuning"] = copy.deepcopy(base)
    models["rankwise"] = ours(copy.deepcopy(base), options.method, rank, options.dropout)
    models["PEFT"] = peft(copy.deepcopy(base), options.method, rank, options.dropout, upcast=True)
    models["PEFT, no upcast"] = peft(base, options.method, rank, options.dropout, upcast=False)
    copy_factors(models["rankwise"], models["PEFT"], options.method)
    copy_factors(models["rankwise"], models["PEFT, no upcast"], options.method)
    embed = models["floor"].get_input_embeddings()  # type: ignore[operator]
    embed.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    for model in models.values():
        model.train()
    check = None if options.dropout else compare(models["rankwise"], models["PEFT"], batch, options.method)

    def step(model: nn.Module) -> float:
        model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        model(**batch).loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(options.repeats + 1):
        for name, model in models.items():
            gc.collect()
            seconds = step(model)
            if repeat:  # the first round warms up
                times[name].append(seconds)
    rows = {}
    for name, model in models.items():
        ratios = [mine / floor - 1 for mine, floor in zip(times[name], times["floor"], strict=True)]
        model.zero_grad(set_to_none=True)
        rows[name] = {
            "step_ms": 1000 * statistics.median(times[name]),
            "p10_ms": 1000 * statistics.quantiles(times[name], n=10)[0],
            "p90_ms": 1000 * statistics.quantiles(times[name], n=10)[-1],
            "tokens_per_s": ids.numel() / statistics.median(times[name]),
            "overhead": statistics.median(ratios),
            "saved_mib": saved_bytes(lambda model=model: model(**batch).loss, model) / 2**20,
        }
    result = {
        "setting": {key: str(value) for key, value in vars(options).items() if key != "output"} | {"rank": rank, "device": device},
        "torch": torch.__version__,
        "agreement with PEFT": check,
        "rows": rows,
    }
    print(json.dumps({"setting": result["setting"], "agreement with PEFT": check}))
    print(f"{'':18s}{'step ms':>10s}{'p10':>9s}{'p90':>9s}{'tokens/s':>10s}{'overhead':>10s}{'saved MiB':>11s}")
    for name, row in rows.items():
        print(
            f"{name:18s}{row['step_ms']:10.1f}{row['p10_ms']:9.1f}{row['p90_ms']:9.1f}{row['tokens_per_s']:10.0f}"
            f"{row['overhead']:10.3f}{row['saved_mib']:11.1f}"
        )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
