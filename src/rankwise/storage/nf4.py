"""NF4 storage: a frozen linear layer whose weight is 4-bit codes; dense only for the length of a product.

    y = x dequantize(codes)^T + bias,      dx = g dequantize(codes)

The two products are custom operators: the compiler sees their inputs (the codes) and outputs, and cannot keep the dense weight between a
forward and its backward. Outside of the compiler, too, the backward saves references to the codes and dequantizes again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.errors import RecipeError, TargetError
from rankwise.kernels.site import as_they_stand
from rankwise.storage.base import Storage, StorageChoice
from rankwise.storage.nf4_codes import Codes, bytes_of, check_blocksize, dequantize, dequantize_into, quantize
from rankwise.storage.widening import widens
from rankwise.storage.workspace import dense

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _dense(codes: list[Tensor], shape: tuple[int, int], blocksize: int, recorded: torch.dtype, dtype: torch.dtype) -> Any:
    return dense(codes[0], shape, dtype, lambda out: dequantize_into(out, Codes(*codes), blocksize, recorded))


@torch.library.custom_op("rankwise::nf4_product", mutates_args=())
def _product(x: Tensor, codes: list[Tensor], bias: Tensor | None, out_features: int, blocksize: int, recorded: torch.dtype) -> Tensor:
    """x W^T + bias in x's dtype, (..., out), for x (..., in)."""
    with _dense(codes, (out_features, x.shape[-1]), blocksize, recorded, x.dtype) as weight:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@_product.register_fake
def _(x: Tensor, codes: list[Tensor], bias: Tensor | None, out_features: int, blocksize: int, recorded: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("rankwise::nf4_product_t", mutates_args=())
def _product_t(g: Tensor, codes: list[Tensor], in_features: int, blocksize: int, recorded: torch.dtype) -> Tensor:
    """g W in g's dtype, (..., in), for g (..., out)."""
    with _dense(codes, (g.shape[-1], in_features), blocksize, recorded, g.dtype) as weight:
        return g @ weight


@_product_t.register_fake
def _(g: Tensor, codes: list[Tensor], in_features: int, blocksize: int, recorded: torch.dtype) -> Tensor:
    return g.new_empty(*g.shape[:-1], in_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, bias, _, ctx.blocksize, ctx.recorded = inputs
    ctx.in_features, ctx.count, ctx.bias_dtype = x.shape[-1], len(codes), None if bias is None else bias.dtype
    ctx.save_for_backward(*codes)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    codes = list(ctx.saved_tensors)
    dx = _product_t(g, codes, ctx.in_features, ctx.blocksize, ctx.recorded) if ctx.needs_input_grad[0] else None
    d_bias = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dx, [None] * ctx.count, d_bias, None, None, None


_product.register_autograd(_backward, setup_context=_setup)


@dataclass(frozen=True)
class NF4Storage(Storage):
    """The products of one NF4Linear: its shape and format, no tensor.

    recorded: the dtype that a dense weight is rounded to.
    wide: products with a 16-bit x are computed in fp32 where `widens` says so, and rounded once.
    """

    out_features: int
    in_features: int
    blocksize: int
    recorded: torch.dtype
    wide: bool = False

    def tensors(self, layer: nn.Module) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in cast("NF4Linear", layer).held() if tensor is not None)

    def bias(self, layer: nn.Module) -> Tensor | None:
        return cast("Tensor | None", layer.bias)

    def wider(self, x: Tensor, *weights: Tensor) -> torch.dtype | None:
        return torch.float32 if self.wide and widens(x) and not torch.compiler.is_compiling() else None

    def product(self, x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x  # as F.linear itself would
        x, dtype = x.to(self.wider(x) or x.dtype), x.dtype
        with as_they_stand(x.dtype != dtype):
            return _product(x, list(weights), bias, self.out_features, self.blocksize, self.recorded).to(dtype)

    def product_t(self, g: Tensor, *weights: Tensor) -> Tensor:
        wide = g.to(self.wider(g) or g.dtype)
        return _product_t(wide, list(weights), self.in_features, self.blocksize, self.recorded).to(g.dtype)

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self.product(x.to(self.recorded), None, *self.tensors(layer))

    def read(self, layer: nn.Module) -> Tensor:
        return cast("NF4Linear", layer).dense_weight()

    def live(self, layer: nn.Module) -> Tensor:
        raise TargetError(
            "a weight held in nf4 cannot be written: rounding to 4 bits again would lose a small update; use rankwise.merge(model), which "
            "puts 16-bit layers in its place"
        )

    def write(self, layer: nn.Module, weight: Tensor) -> None:
        self.live(layer)

    def replaced(self, layer: nn.Module, weight: Tensor) -> nn.Linear:
        """A dense layer with another weight (out, in) in place of an NF4 one; the bias is the same tensor."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(weight.to(self.recorded), requires_grad=False)
        made.bias = cast(Any, layer.bias)
        return made.train(layer.training)


class NF4Linear(nn.Module):
    """A frozen linear layer in NF4: x (..., in) -> (..., out). Computes in x's dtype; differentiable in x and in the bias."""

    codes: Tensor  # (ceil(out * in / 2), 1) uint8
    absmax: Tensor  # (blocks,) uint8 with double quantization, else fp32
    nested_absmax: Tensor | None  # (superblocks,) fp32
    offset: Tensor | None  # () fp32
    bias: nn.Parameter | None

    def __init__(
        self,
        held: Codes,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        blocksize: int = 64,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Around codes as `quantize` gives them.

        Args:
            held: the codes and scales.
            in_features: input width.
            out_features: output width.
            bias: kept as it is, frozen.
            blocksize: elements to a scale.
            dtype: what a dense weight is rounded to; None means the bias's, or fp32.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        if dtype not in DTYPES:
            raise RecipeError(f"dtype={dtype} of an nf4 layer must be one of {', '.join(map(str, DTYPES))}")
        check_blocksize(blocksize)
        for name, tensor in held._asdict().items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.storage = NF4Storage(out_features, in_features, blocksize, dtype)

    @staticmethod
    def from_weight(
        weight: Tensor, bias: Tensor | None = None, blocksize: int = 64, double_quant: bool = True, dtype: torch.dtype | None = None
    ) -> "NF4Linear":
        """Quantizes a dense weight (out, in); `dtype` is what it is rounded to when it is dense again, None means its own."""
        held = quantize(weight.detach(), blocksize, double_quant)
        return NF4Linear(held, weight.shape[1], weight.shape[0], bias, blocksize, dtype or weight.dtype)

    def held(self) -> Codes:
        """The codes and scales."""
        return Codes(self.codes, self.absmax, self.nested_absmax, self.offset)

    def dense_weight(self) -> Tensor:
        """The weight (out, in) as a new dense tensor."""
        return dequantize(self.held(), (self.out_features, self.in_features), self.storage.recorded, self.storage.blocksize)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), made dense for the asker: other code reads its dtype and device. Writing to it changes nothing."""
        return self.dense_weight()

    def forward(self, x: Tensor) -> Tensor:
        return self.storage.product(x, self.bias, *self.storage.tensors(self))

    def _apply(self, fn: Any, recurse: bool = True) -> "NF4Linear":
        scales = {name: tensor for name, tensor in self._buffers.items() if tensor is not None and tensor.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in scales.items():  # model.to(bf16) moves the scales, and leaves their digits alone
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        nested = "" if self.nested_absmax is None else ", double quantization"
        return f"{self.in_features} -> {self.out_features}, nf4, blocksize={self.storage.blocksize}{nested}, bias={self.bias is not None}"


@dataclass(frozen=True)
class NF4(StorageChoice):
    """Storage choice: the linear layers of the base in 4 bits, the output head and everything else as loaded.

    double_quant: hold the scales in 8 bits; saves 0.373 bits a weight.
    blocksize: elements to a scale.
    iterations: for base='fold' (QPiSSA): how often the start is taken again from what quantization has lost; 1 is plain.
    keep: names of linear layers that stay as loaded.
    """

    name: ClassVar[str] = "nf4"
    quantizes: ClassVar[bool] = True
    double_quant: bool = True
    blocksize: int = 64
    iterations: int = 1
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_blocksize(self.blocksize)
        if self.iterations < 1:
            raise RecipeError(f"iterations={self.iterations} of nf4 must be at least 1")

    def hold(self, layer: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Module:
        bias = cast("Tensor | None", getattr(layer, "bias", None))
        return NF4Linear.from_weight(weight, bias, self.blocksize, self.double_quant, dtype).train(layer.training)

    def rounded(self, weight: Tensor) -> Tensor:
        held = quantize(weight, self.blocksize, self.double_quant)
        return dequantize(held, tuple(weight.shape), weight.dtype, self.blocksize)

    def bytes_of(self, numel: int, element: int) -> int:
        return bytes_of(numel, self.blocksize, self.double_quant)
