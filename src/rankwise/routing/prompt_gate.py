"""MiLoRA, the mixture: a gate on each block looks at the prompt once and switches the LoRAs of k of the block's layers on.

    h = Pooler(H of the prompt tokens that enter the block)                         H (batch, length, d), h (batch, d)
    g = Ra(h),   Ra(x) = (sum_j a_j x^j) / (1 + |sum_i b_i x^i|)                    a (7), b (5): near GELU at the start
    p = softmax(router g),   on = the k largest of p                                router (layers, d)
    y = W x + c_m (update of layer m) x + bias                                      c (batch, layers), from p and `on`
    loss = balance * mean over blocks of  layers * sum_i f_i pbar_i                 f: share of prompts whose largest p is i

Zhang et al. 2024, "MiLoRA: Efficient Mixture of Low-Rank Adaptation", arXiv 2410.18035, sections 3 and 4.3. Nothing of it is on the tokens
that are generated: c is made at prefill and kept on the KV cache. The paper does not give c; all layers on must be LoRA, so c is 1 there
('ste'). All of it is computed in fp32: powers of six of a residual stream overflow fp16.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from rankwise.context import BatchContext, attach, attaching
from rankwise.errors import RecipeError, TrainingError
from rankwise.routing.base import Block, BlockGate, RoutingChoice
from rankwise.routing.gating import gates_of
from rankwise.schedules.base import Change, Event, Moment, Running
from rankwise.updates.base import Slot

# A fit of GELU by least squares, dense on [-5, 5] and with light weight out to +-50: within 3.0e-3 on [-5, 5], and near x beyond. Fits on
# [-5, 5] alone have poles of no use outside.
GELU_NUMERATOR = (-0.0026043071, 0.4999984, 0.4157658, 0.12066255, 0.014140582, 0.00056248457, 6.7645826e-06)
GELU_DENOMINATOR = (-1.0923533e-05, 0.24133067, -8.7665211e-07, 0.0011250003, -2.8726352e-10)
_EPSILON = 1e-6


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """(sum_j a_j x^j) / (1 + |sum_{i>0} b_i x^i|), elementwise, by Horner's rule; the kink of |.| has gradient 0."""
    top = torch.zeros_like(x) + numerator[-1]
    for a in numerator[:-1].flip(0):
        top = top * x + a
    bottom = torch.zeros_like(x) + denominator[-1]
    for b in denominator[:-1].flip(0):
        bottom = bottom * x + b
    return top / (1 + (bottom * x).abs())


def load_balance(p: Tensor) -> Tensor:
    """layers * sum_i f_i pbar_i of p (prompts, layers): 1 where all is even, `layers` where one layer has all. f has no gradient."""
    f = torch.zeros_like(p).scatter(1, p.argmax(1, keepdim=True), 1.0).mean(0)  # the first of equals, as everywhere
    return p.shape[1] * (f * p.mean(0)).sum()


# True while the activation's own step is computed: only then do its coefficients have a gradient
_VALIDATING: ContextVar[bool] = ContextVar("rankwise_validating", default=False)


@contextmanager
def validating() -> Iterator[None]:
    """Within the block a bilevel activation has gradients."""
    token = _VALIDATING.set(True)
    try:
        yield
    finally:
        _VALIDATING.reset(token)


class PromptGate(BlockGate):
    """c (batch, layers) from the hidden states of the prompt."""

    router: Tensor  # (layers, d)
    numerator: Tensor  # (7,)
    denominator: Tensor  # (5,)

    def begin(self, generator: torch.Generator) -> None:
        self.put(router=0.02 * torch.randn(self.router.shape, generator=generator))
        self.put(numerator=torch.tensor(GELU_NUMERATOR), denominator=torch.tensor(GELU_DENOMINATOR))
        # a pooling query of zero starts as the mean

    def forward(self, hidden: Tensor, context: BatchContext) -> Tensor:
        prompt = prompt_of(hidden, context)
        with torch.autocast(hidden.device.type, enabled=False):
            p = self.probabilities(hidden, prompt)
            c = self.weights(p)
            if self.choice.balance and attaching() is not None:
                c = attach(c, self.choice.balance / max(1, context.blocks) * load_balance(p), "load")
        return c

    def probabilities(self, hidden: Tensor, prompt: Tensor) -> Tensor:
        """p (batch, layers) from hidden states (batch, length, d) and the prompt's tokens (batch, length), in the gate's dtype."""
        h = self.pool(hidden.to(self.router.dtype), self._counted(prompt))
        if self.choice.router_norm:
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + _EPSILON)
        coefficients = self.numerator, self.denominator
        if self.choice.theta_mode == "bilevel" and not _VALIDATING.get():
            coefficients = tuple(coefficient.detach() for coefficient in coefficients)
        return (rational(h, *coefficients) @ self.router.T).softmax(-1)

    def _counted(self, prompt: Tensor) -> Tensor:
        if not self.choice.skip_first:
            return prompt
        first = prompt & (prompt.cumsum(1) == 1)
        return torch.where(prompt.sum(1, keepdim=True) > 1, prompt & ~first, prompt)

    def pool(self, hidden: Tensor, prompt: Tensor) -> Tensor:
        """(batch, d): the prompt in one vector; no token's place plays a part but in 'last'."""
        if self.choice.pooler == "self-attention":
            scores = (hidden @ self.get_parameter("query")).masked_fill(~prompt, float("-inf"))  # (batch, length)
            return (scores.softmax(-1)[:, None] @ hidden.masked_fill(~prompt[..., None], 0))[:, 0]
        if self.choice.pooler == "average":
            return hidden.masked_fill(~prompt[..., None], 0).sum(1) / prompt.sum(1, keepdim=True)
        if self.choice.pooler == "last":
            last = (prompt * torch.arange(1, prompt.shape[1] + 1, device=prompt.device)).argmax(1)
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        return hidden.masked_fill(~prompt[..., None], float("-inf")).amax(1)

    def weights(self, p: Tensor) -> Tensor:
        """c (batch, layers): 0 for all but the k most probable layers; ties go to the first."""
        k = self.choice.k
        on = torch.zeros_like(p).scatter(1, p.sort(dim=1, descending=True, stable=True).indices[:, :k], 1.0)
        if self.choice.gate == "hard":
            return on
        chosen = p * on
        if self.choice.gate == "prob":
            return chosen
        if self.choice.gate == "prob_renorm":
            return k * chosen / chosen.sum(1, keepdim=True)
        return on + (chosen - chosen.detach())  # exactly `on`, with the gradient of the probabilities


def prompt_of(hidden: Tensor, context: BatchContext) -> Tensor:
    """(batch, length) bool: the tokens that the gates of this forward may look at.

    Raises:
        TrainingError: nobody said where the prompt ends and it would have to be guessed, or a row has no prompt.
    """
    if context.routed_by is not None:
        return context.routed_by
    prompt = context.prompt
    if prompt is None:
        if context.phase == "train" and context.generates:
            raise TrainingError(
                "routing by prompt must know where the prompts end, or it would read the answers: call the model with labels (-100 on the "
                "prompt) or with prompt_mask=(batch, length)"
            )
        if context.uncached and context.generates:
            raise TrainingError(
                "use_cache=False without prompt_mask: each call would be routed anew, by prompt and generated tokens alike; generate with "
                "the cache, or pass prompt_mask=(batch, length) of the prompts' tokens in each call"
            )
        prompt = context.mask if context.mask is not None else hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    prompt = prompt.to(hidden.device)
    if prompt.shape != hidden.shape[:2]:
        raise TrainingError(
            f"hidden states of shape {tuple(hidden.shape)} and prompt tokens of shape {tuple(prompt.shape)} do not belong together: blocks "
            "with gates need (batch, length, width), without packing rows into one"
        )
    bare = prompt.sum(1) == 0
    if bool(bare.any()):
        if context.phase == "train":
            raise TrainingError(
                f"row {int(bare.nonzero()[0])} of the batch has no prompt token in front of its first label; routing by prompt needs rows "
                "of prompt and completion (task: completion or chat), or prompt_mask"
            )
        valid = torch.ones_like(prompt) if context.mask is None else context.mask.to(prompt.device)
        prompt = torch.where(bare[:, None], valid & (valid.cumsum(1) == 1), prompt)  # a text without prompt: its first token
    context.routed_by = prompt
    return prompt


@dataclass(frozen=True)
class PromptRouting(RoutingChoice):
    """One decision per prompt and block: the mixture of MiLoRA.

    k: layers of each block whose update is on. The paper says 3 and 1 in different places.
    gate: 'ste', 1 forward and the probability's gradient backward; 'prob', the probability; 'prob_renorm', k times its share among those
        that are on; 'hard', 1 without a gradient, so that the router learns from the balance loss alone and chooses at random.
    pooler: 'self-attention', 'average', 'last' or 'max', over the prompt's tokens.
    balance: weight of the load-balance loss; the paper's lambda.
    theta_mode: how the activation's coefficients learn: 'bilevel', a step of their own on validation rows after each step, which
        `rankwise.optimizer(..., validation=batches)` must get; 'joint', with all the rest; 'frozen-gelu', not at all.
    theta_lr: rate of that step.
    router_norm: divide the pooled vector by its root mean square; the paper does not say so, False is its letter.
    skip_first: leave the first token out, onto which softmax over a residual stream with massive activations may collapse.
    """

    name: ClassVar[str] = "milora-mixture"
    module: ClassVar[type[BlockGate] | None] = PromptGate
    k: int = 3
    gate: Literal["ste", "prob", "prob_renorm", "hard"] = "ste"
    pooler: Literal["self-attention", "average", "last", "max"] = "self-attention"
    balance: float = 1e-2
    theta_mode: Literal["bilevel", "joint", "frozen-gelu"] = "bilevel"
    theta_lr: float = 1e-6
    router_norm: bool = True
    skip_first: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RecipeError(f"k={self.k} must be at least 1: how many layers of a block are on")
        for label in ("balance", "theta_lr"):
            if not 0 <= getattr(self, label) < float("inf"):
                raise RecipeError(f"{label}={getattr(self, label)} of routing={self.name!r} must be at least 0")
        for label, known in (
            ("gate", ("ste", "prob", "prob_renorm", "hard")),
            ("pooler", ("self-attention", "average", "last", "max")),
            ("theta_mode", ("bilevel", "joint", "frozen-gelu")),
        ):
            if getattr(self, label) not in known:
                raise RecipeError(
                    f"{label}={getattr(self, label)!r} of routing={self.name!r} is unknown; use {', '.join(map(repr, known))}"
                )

    def slots(self, block: Block) -> dict[str, Slot]:
        fixed = self.theta_mode == "frozen-gelu"
        slots = {
            "router": Slot("gate", (len(block.sites), block.width), "rankwise_gate.router"),
            "numerator": Slot("activation", (len(GELU_NUMERATOR),), "rankwise_gate.numerator", fixed),
            "denominator": Slot("activation", (len(GELU_DENOMINATOR),), "rankwise_gate.denominator", fixed),
        }
        if self.pooler == "self-attention":
            slots["query"] = Slot("gate", (block.width,), "rankwise_gate.query")
        return slots

    def check(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            if self.k > len(block.sites):
                raise RecipeError(
                    f"k={self.k} of routing={self.name!r}, but {block.name} has {len(block.sites)} adapted layers; lower k or adapt more"
                )

    @property
    def wants_validation(self) -> bool:
        return self.theta_mode == "bilevel"

    def begin(self, model: nn.Module, validation: Iterable[Mapping[str, Any]] | None) -> Running | None:
        if self.theta_mode != "bilevel":
            return None
        if validation is None:
            raise TrainingError(
                "theta_mode='bilevel' takes a step on validation rows after each step; pass validation=batches (dicts as the model takes "
                "them) to rankwise.optimizer or rankwise.attach, or choose theta_mode='joint' or 'frozen-gelu'"
            )
        return ActivationSteps(model, self.theta_lr, validation)


class ActivationSteps(Running):
    """The other level: after each step on training rows, AdamW on the activations' coefficients alone, on one validation batch."""

    def __init__(self, model: nn.Module, lr: float, validation: Iterable[Mapping[str, Any]]) -> None:
        self.model = weakref.ref(model)  # running schedules are kept per model: a reference of their own would keep it for ever
        self.parameters = [
            p for gate in gates_of(model).values() for name, p in gate.named_parameters() if gate.roles[name] == "activation"
        ]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        self.validation = validation
        self.batches: Iterator[Mapping[str, Any]] = iter(())
        self.drawn = 0
        self.loss: Tensor | None = None

    def on(self, event: Event, moment: Moment) -> Change | None:
        model = self.model()
        if event != "step" or model is None:
            return None
        device = self.parameters[0].device
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self._next().items()}
        mode, meter = model.training, cast(Any, model).rankwise.meter
        try:
            model.train()
            with torch.enable_grad(), validating():
                loss = model(**batch).loss
                gradients = torch.autograd.grad(loss, self.parameters)
        finally:
            model.train(mode)
            meter.take()  # what the validation forward attached is no part of the step's report
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()
        return None

    def _next(self) -> Mapping[str, Any]:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.validation)
            batch = next(self.batches, None)
        if batch is None:
            raise TrainingError("validation gave no batch; theta_mode='bilevel' needs rows that are not trained on")
        self.drawn += 1
        return batch

    def tensors(self) -> dict[str, Tensor]:
        state = {
            f"{index}.{key}": value
            for index, parameter in enumerate(self.parameters)
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return state | {"drawn": torch.tensor(self.drawn)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for index, parameter in enumerate(self.parameters):
            mine = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{index}.")}
            if mine:
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter).clone() for key, value in mine.items()
                }
        for _ in range(int(tensors["drawn"])):  # the batches that the run has seen
            self._next()

    def report(self) -> dict[str, float]:
        return {} if self.loss is None else {"validation_loss": float(self.loss)}
