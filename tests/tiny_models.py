"""Tiny models with random weights, and what tests do to them again and again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.sites import AdaptedLinear, adapted_sites

VOCABULARY = 67

torch.set_num_threads(1)  # the models are far too small for more


def _spread(model: nn.Module) -> nn.Module:
    """Weights of order 1 / sqrt(in) and biases that are not zero, so that nothing can hide in small numbers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Llama: hidden 32, key and value narrower than query, two layers, attention biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    return _spread(LlamaForCausalLM(LlamaConfig(**shape | changes))).to(dtype)


def gpt2(seed: int = 0) -> Any:
    """GPT-2, whose linear layers are Conv1D with weights of shape (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return _spread(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)))


def token_ids(rows: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def perturb(model: nn.Module, seed: int = 5, size: float = 0.2) -> nn.Module:
    """Moves every trained number of the adapters away from its start, so that no term of the equation is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in adapted_sites(model).values():
            for part in (module.update, module.gain):
                for parameter in [] if part is None else part.parameters():
                    reach = size * (float(parameter.abs().mean()) or 0.3)
                    parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * reach)
    return model


class OneLinear(nn.Module):
    """A single linear layer as a model: `proj`."""

    def __init__(self, width_in: int, width_out: int, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.proj = nn.Linear(width_in, width_out, bias=bias, dtype=dtype)
        with torch.no_grad():
            self.proj.weight.copy_(torch.randn(width_out, width_in, generator=generator, dtype=torch.float64) * width_in**-0.5)
            if bias:
                self.proj.bias.copy_(torch.randn(width_out, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Attention(nn.Module):
    """q, k and v of one block, which read one input."""

    def __init__(self, width: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.q_proj = nn.Linear(width, 16, dtype=dtype)
        self.k_proj = nn.Linear(width, 8, dtype=dtype)
        self.v_proj = nn.Linear(width, 8, bias=False, dtype=dtype)
        self.skip = ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.cat([getattr(self, name)(x) for name in ("q_proj", "k_proj", "v_proj") if name != self.skip], dim=-1)


def one_linear(weight: Tensor, bias: Tensor | None = None) -> OneLinear:
    """A model of one linear layer with a given weight (out, in)."""
    model = OneLinear(weight.shape[1], weight.shape[0], bias is not None, weight.dtype)
    with torch.no_grad():
        model.proj.weight.copy_(weight)
        if bias is not None:
            model.proj.bias.copy_(bias)
    return model


def site(model: nn.Module, name: str = "proj") -> AdaptedLinear:
    return adapted_sites(model)[name]


def dense_weight(module: AdaptedLinear) -> Tensor:
    """gain * (W + scaling * diag(tail) up core down - start), dense, written out from the parameters alone, in fp64."""
    weight = module.storage.read(module.base_layer).double()
    if module.update is not None:
        factors = module.update.factors()
        core = torch.eye(factors.down.shape[0], dtype=torch.float64)
        if factors.core is not None:
            core = torch.diag(factors.core.double()) if factors.core.dim() == 1 else factors.core.double()
        delta = module.site.scaling * factors.up.double() @ core @ factors.down.double()
        weight = weight + (delta if factors.tail is None else factors.tail.double()[:, None] * delta)
        if module.offset is not None and not module.folded:
            weight = weight - module.site.scaling * module.offset.up.double() @ module.offset.down.double()
    if module.gain is not None and module.gain.choice.name == "dora":
        magnitude = (module.gain.magnitude0 + module.gain.magnitude).double()
        weight = weight * (magnitude / weight.norm(dim=1))[:, None]
    if module.gain is not None and module.gain.choice.name == "propulsion":
        weight = weight * ((1 + module.gain.z.double()) ** module.gain.choice.degree)[:, None]
    return weight.detach()


@contextmanager
def saved_tensors() -> Iterator[dict[int, int]]:
    """Storage address -> bytes of the tensors that autograd saves within the block; equal storages count once."""
    kept: list[Tensor] = []
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # alive until the end, so that no address is used twice
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def activation_bytes(sizes: dict[int, int], model: nn.Module) -> int:
    """Bytes of saved tensors that are neither parameters nor buffers of the model."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    return sum(size for address, size in sizes.items() if address not in own)
