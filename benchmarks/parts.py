"""What the parts of training cost: starts, DoRA's norm, NF4, GaLore, LoRA-Pro, optimizer and clipping, AdaLoRA's bookkeeping.

    python -m benchmarks.parts --only nf4,clipping --threads 1
    python -m benchmarks.parts --small                  # every section on small shapes, a few minutes

Each line is one contender of one section; contenders run in turns in one process, after their results were compared. `ratio` is the median
over rounds of its time over that of the section's baseline in the same round, `difference` how far its result is from the reference, and
`target` what it should reach. The same script runs on a GPU.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import parts_inits, parts_optimizers
from benchmarks.common import interleave, machine, table, tune_allocator, write_json
from benchmarks.parts_rows import Row, Setting, compared


def dora(setting: Setting) -> Iterator[Row]:
    """The row norm of the adapted weight in training: from the factors and a kept constant, as PEFT makes it, and dense."""
    from peft import LoraConfig, get_peft_model

    import rankwise as rw
    from rankwise.sites import adapted_sites

    shapes = [(1024, 1024)] if setting.small else [(2048, 2048), (4096, 4096), (11008, 4096)]
    for out, wide in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            base = nn.Sequential(setting.linear(out, wide, dtype))
            ours = rw.adapt(nn.Sequential(setting.linear(out, wide, dtype)), rw.recipes.dora(rank=16, alpha=32, targets=["0"]))
            config = LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules=["0"])
            theirs = get_peft_model(base, config, autocast_adapter_dtype=False)
            layer: Any = theirs.base_model.model[0]
            site: Any = adapted_sites(ours)["0"]
            weight, up, down = layer.base_layer.weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight
            with torch.no_grad():
                site.update.up.normal_(std=0.02)
                down.copy_(site.update.down)
                up.copy_(site.update.up)
                site.base_layer.weight.copy_(weight)
                site.gain.begin(site.base_layer, site.storage, site.update.factors(), None)

            @torch.no_grad()
            def peft(layer: Any = layer, dtype: Any = dtype) -> Tensor:  # as its forward does: through an identity, detached, then the norm
                magnitude, lora_a, lora_b = (part["default"] for part in (layer.lora_magnitude_vector, layer.lora_A, layer.lora_B))
                made = magnitude.get_lora_weight(lora_A=lora_a, lora_B=lora_b, adapter_name="default").to(dtype)
                return magnitude.get_weight_norm(layer.base_layer.weight, made, 2.0)

            @torch.no_grad()
            def dense(weight: Tensor = weight, up: Tensor = up, down: Tensor = down) -> Tensor:
                return torch.linalg.vector_norm(torch.addmm(weight, up, down, alpha=2.0), dim=1)

            @torch.no_grad()
            def factored(site: Any = site) -> Tensor:
                return site.gain.norm(site.base_layer, site.storage, site.update.factors(), None)

            exact = (weight.double() + 2 * up.double() @ down.double()).norm(dim=1)
            contenders: dict[str, Callable[[], Tensor]] = {"rankwise": factored, "PEFT": peft, "dense": dense}
            agreement = {name: compared(call(), exact) for name, call in contenders.items()}
            assert max(agreement.values()) < (1e-5 if dtype == torch.float32 else 1e-2), agreement
            what = f"row norm {out} x {wide}, {setting.name(dtype)}"
            times = interleave(contenders, setting.repeats)
            yield from setting.rows("dora", what, times, "PEFT", agreement, {"rankwise": "<= 0.2"})


def nf4(setting: Setting) -> Iterator[Row]:
    """Quantize, dequantize, and a linear layer's forward with its input gradient, against bitsandbytes."""
    logging.disable(logging.WARNING)
    import bitsandbytes as bnb
    import bitsandbytes.functional as bf

    from rankwise.storage import NF4Linear
    from rankwise.storage.nf4_codes import dequantize, dequantize_into, quantize

    shapes = [(1024, 1024)] if setting.small else [(768, 768), (2048, 768), (4096, 4096)]
    for out, wide in shapes:
        weight = setting.randn(out, wide) * 0.02
        held = quantize(weight)
        codes, state = bf.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert torch.equal(codes.view(-1), held.codes.view(-1)), "codes differ"
        contenders: dict[str, Callable[[], object]] = {
            "rankwise": lambda weight=weight: quantize(weight),
            "bitsandbytes": lambda weight=weight: bf.quantize_4bit(weight, quant_type="nf4", compress_statistics=True),
        }
        same = {"rankwise": 0.0}
        yield from setting.rows("nf4", f"quantize {out} x {wide}", interleave(contenders, setting.repeats), "bitsandbytes", same)
        for dtype in (torch.float32, torch.bfloat16):
            state.dtype = dtype
            theirs = bf.dequantize_4bit(codes, state)
            mine = dequantize(held, (out, wide), dtype)
            agreement = {"rankwise": compared(mine, theirs)}
            assert agreement["rankwise"] < (1e-6 if dtype == torch.float32 else 1e-2), agreement
            buffer = torch.empty(out * wide, dtype=dtype, device=setting.device)
            contenders = {
                "rankwise": lambda held=held, buffer=buffer, dtype=dtype: dequantize_into(buffer, held, 64, dtype),
                "bitsandbytes": lambda codes=codes, state=state: bf.dequantize_4bit(codes, state),
            }
            what = f"dequantize {out} x {wide}, {setting.name(dtype)}"
            yield from setting.rows("nf4", what, interleave(contenders, setting.repeats), "bitsandbytes", agreement)
            layer = NF4Linear.from_weight(weight, dtype=dtype)
            other: Any = bnb.nn.Linear4bit(wide, out, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
            other.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
            other = other.to(setting.device)
            if not other.weight.bnb_quantized:
                other.weight = other.weight._quantize(setting.device)
            x = setting.randn(128 if setting.small else 1024, wide).to(dtype)
            g = setting.randn(len(x), out).to(dtype)

            def both(layer: Any, x: Tensor = x, g: Tensor = g) -> Tensor:
                leaf = x.detach().requires_grad_(True)
                layer(leaf).backward(g)
                assert leaf.grad is not None
                return leaf.grad

            frozen = nn.Linear(wide, out, bias=False, device=setting.device, dtype=dtype).requires_grad_(False)
            frozen.weight.copy_(mine)
            agreement = {"rankwise": compared(both(layer), both(other)), "dense layer": compared(both(frozen), both(other))}
            assert max(agreement.values()) < (1e-5 if dtype == torch.float32 else 2e-2), agreement
            layers = {"rankwise": layer, "bitsandbytes": other, "dense layer": frozen}
            times = interleave({name: lambda each=each: both(each) for name, each in layers.items()}, setting.repeats)
            what = f"linear {out} x {wide}, {len(x)} tokens, {setting.name(dtype)}"
            yield from setting.rows("nf4", what, times, "bitsandbytes", agreement)


SECTIONS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "inits": parts_inits.inits,
    "dora": dora,
    "nf4": nf4,
    "galore": parts_optimizers.galore,
    "lora-pro": parts_optimizers.lora_pro,
    "clipping": parts_optimizers.clipping,
    "adalora": parts_optimizers.adalora,
}


def _text(rows: list[Row]) -> str:
    return table(rows, [column for column in rows[0] if column != "section"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--small", action="store_true", help="small shapes and short periods, for a quick look")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--period", type=int, default=200, help="steps of GaLore's refresh period; its share of the mean depends on it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/parts.json"))
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"unknown sections: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    allocator = tune_allocator()
    torch.set_num_threads(options.threads)
    setting = Setting("cuda" if torch.cuda.is_available() else "cpu", options.small, options.repeats, options.period)
    before = machine()
    rows: list[Row] = []
    for name in names:
        torch.manual_seed(0)
        mine = []
        for row in SECTIONS[name](setting):
            mine.append(row)
            print(".", end="", file=sys.stderr, flush=True)
        rows += mine
        print(
            f"\n{name}: {' '.join((SECTIONS[name].__doc__ or '').split())}\n{_text(mine)}\n",
            flush=True,
        )
        result = {"machine": before, "allocator_tuned": allocator, "command": sys.argv[1:], "rows": rows}
        write_json(options.output, result)  # after each section, so that an interrupted run keeps what it has
    print(f"{before['text']}, {before['threads']} thread(s), load before the run {before['load']}")


if __name__ == "__main__":
    main()
