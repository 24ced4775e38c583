"""Facts of the batch for routers and gates, and losses attached inside the graph.

A hook at the model's root makes one `BatchContext` for each forward and keeps it current for its length. Two things outlive a forward:

- A checkpointed block runs again in the backward, after other forwards may have come (DPO makes two before one backward). transformers'
  blocks call `_gradient_checkpointing_func(function, *args)`; what is handed to it is wrapped, so that the recomputation runs under the
  context of *its* forward, whichever arguments the block passes on to its own parts.
- A loss that is attached to a tensor of a branch (`attach`) adds its gradient when the backward passes that tensor: an identity whose
  backward gives the loss the gradient `scale`. It is neither lost nor counted twice by checkpointing. `scale` is what the model's own loss
  received, taken by an identity around `output.loss`, so accumulation, GradScaler and the like reach both alike.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rankwise.errors import TrainingError

#: keyword arguments of the model's call that are meant for routers; the root's hook takes them out
FACTS = ("sample_types", "prompt_mask", "task")
_IGNORED = -100


@dataclass
class Meter:
    """Sums of the losses attached in the forwards since the last step, on the device; read once a step."""

    scale: float = 1.0  # of attached losses where the model's output has no loss to follow
    totals: dict[str, Tensor] = field(default_factory=dict)
    forwards: int = 0

    def add(self, name: str, value: Tensor) -> None:
        """One loss of one forward."""
        self.totals[name] = self.totals[name] + value if name in self.totals else value

    def take(self) -> dict[str, float]:
        """Name -> mean over the forwards, which is then forgotten."""
        means = {name: float(total) / max(1, self.forwards) for name, total in self.totals.items()}
        self.totals, self.forwards = {}, 0
        return means


@dataclass(eq=False)
class BatchContext:
    """What routers may know of one forward.

    mask: (batch, length) bool, tokens that are no padding; None where all are. prompt: (batch, length) bool, those of them that belong to
    the prompt; None where it is not known. types: (batch,) int64 kind of each sample, or None. task: name or number of the task, or None.
    phase: 'train', 'prefill' or 'decode' (a cache that holds tokens already). cache: the cache object of the call, or None.
    sites, blocks: adapted layers of the model, and blocks with a gate. routed_by: (batch, length) bool, the tokens that gates look at, once
    the first gate has settled them. routes: block name -> c (batch, sites of the block), of the gates of this forward.
    scale: the gradient of an attached loss; `share` of it goes to this forward where the main loss is a sum over several.
    """

    phase: Literal["train", "prefill", "decode"]
    meter: Meter
    batch: int | None = None
    length: int | None = None
    mask: Tensor | None = None
    prompt: Tensor | None = None
    types: Tensor | None = None
    task: Any = None
    cache: Any = None
    sites: int = 1
    blocks: int = 0
    labelled: bool = False
    uncached: bool = False  # the caller said use_cache=False
    generates: bool = False  # the model can write text
    routed_by: Tensor | None = None
    routes: dict[str, Tensor] = field(default_factory=dict)
    scale: Tensor | float = 1.0
    share: Tensor | float = 1.0
    root: int = 0  # id of the model whose forward this is
    outer: "BatchContext | None" = None
    counted: bool = False
    watched: bool = False


_CURRENT: ContextVar[BatchContext | None] = ContextVar("rankwise_batch_context", default=None)


def current() -> BatchContext | None:
    """The context of the forward that runs, or None outside of one (a part of the model called on its own)."""
    return _CURRENT.get()


def required(what: str) -> BatchContext:
    """The current context.

    Raises:
        TrainingError: there is none, so `what` cannot be known.
    """
    context = current()
    if context is None:
        raise TrainingError(
            f"{what} needs the facts of the batch, and no forward of the adapted model is running: call the model itself rather than a "
            "part of it; where a part is checkpointed by hand, checkpoint the whole model or use gradient_checkpointing_enable()"
        )
    return context


@contextmanager
def under(context: BatchContext | None) -> Iterator[None]:
    """Makes a context the current one for the block."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


# --- losses inside the graph -----------------------------------------------------------------------------------------------------------


def attach(tensor: Tensor, loss: Tensor, name: str) -> Tensor:
    """The tensor, with a loss attached: when the backward passes it, the loss gets the gradient that the model's own loss got.

    Args:
        tensor: any tensor of the branch that the backward will pass.
        loss: a scalar that depends on what trains, already multiplied by its weight. In evaluation nothing is attached.
        name: under which it is reported ('routing_' before it), summed over all that a forward attaches, averaged over forwards.
    """
    context = attaching()
    return tensor if context is None else cast(Tensor, _Attach.apply(tensor, loss, context, name))


def attaching() -> BatchContext | None:
    """The current context if losses are attached now: in training, with gradients. Else None, and there is nothing to compute."""
    context = current()
    return None if context is None or context.phase != "train" or not torch.is_grad_enabled() else context


class _Attach(torch.autograd.Function):
    """Identity in the tensor; its backward gives the loss the scale of the forward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor, context: BatchContext, name: str) -> Tensor:
        ctx.context, ctx.name, ctx.value = context, name, loss.detach()
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        context: BatchContext = ctx.context
        context.meter.add(ctx.name, ctx.value)
        if not context.counted:
            context.counted = True
            context.meter.forwards += 1
        scale = torch.as_tensor(context.scale, device=ctx.value.device).to(ctx.value.dtype)
        return grads[0], scale.expand_as(ctx.value), None, None


class _Watch(torch.autograd.Function):
    """Identity around the model's loss; its backward, the first of all, tells the attached losses their scale."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, context: BatchContext, weight: Tensor | None) -> Tensor:
        ctx.context = context
        ctx.save_for_backward(weight)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grads
        (weight,) = ctx.saved_tensors
        context: BatchContext = ctx.context
        # log-probabilities, whose negative sum the caller takes: the gradient is each supervised token's share
        received = context.share * g.detach().sum() if weight is None else -(g.detach() * weight).sum()
        context.scale = received + (context.scale if context.watched else 0.0)
        context.watched = True
        return g, None, None


def set_auxiliary_scale(model: nn.Module, scale: float) -> None:
    """What attached losses are multiplied by where the model is called without labels and the caller makes the loss: as that loss is
    scaled, such as 1 / accumulated batches. Where the model gives a loss, its own scale is followed and this is not read."""
    cast(Any, model).rankwise.meter.scale = scale


# --- the hooks -------------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Under:
    """A function that runs under a context, also when it is run again in the backward."""

    function: Callable[..., Any]
    context: BatchContext | None
    with_grad: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = self.context
        if context is not None and context.routes and self.with_grad and not torch.is_grad_enabled():
            raise TrainingError(
                "gates cannot train under checkpointing with use_reentrant=True, whose forward keeps no graph; call "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        with under(context):
            return self.function(*args, **kwargs)


@dataclass(eq=False)
class Carrying:
    """A checkpointing function that carries the context of the forward into the recomputation."""

    checkpoint: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(_Under(function, current(), torch.is_grad_enabled()), *args, **kwargs)


CHECKPOINT = "_gradient_checkpointing_func"


def _carry(model: nn.Module) -> None:
    """Wraps the checkpointing function of every block; checkpointing may have been switched on after adapt."""
    for module in model.modules():
        function = module.__dict__.get(CHECKPOINT)
        if function is not None and not isinstance(function, Carrying):
            module.__dict__[CHECKPOINT] = Carrying(function)


@lru_cache(maxsize=64)
def _parameters(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def open_context(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the root: reads the call, takes out what the model does not know, makes the context current."""
    facts = {name: kwargs.get(name) for name in FACTS}
    kwargs = {name: value for name, value in kwargs.items() if name not in FACTS}
    given = dict(zip(_parameters(type(model).forward), args, strict=False)) | kwargs
    context = _context_of(model, args, given, facts)
    context.outer, context.root = current(), id(model)
    _CURRENT.set(context)
    if model.training:
        _carry(model)
    return args, kwargs


def close_context(model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Forward hook of the root, called after errors too: watches the loss, hands the routes to the cache, ends the context."""
    context = current()
    if context is None or context.root != id(model):  # the call was refused before it had a context
        return output
    _CURRENT.set(context.outer)
    if output is None:
        return output
    if context.phase == "train" and torch.is_grad_enabled():
        output = _watched(output, context)
    elif context.routes:
        from rankwise.routing.cache import keep

        cache = _read(output, "past_key_values")
        keep(context.cache if cache is None else cache, context.routes)
    return output


def _watched(output: Any, context: BatchContext) -> Any:
    for name, weight in (("loss", None), ("log_probs", "label_mask")):
        value = _read(output, name)
        if isinstance(value, Tensor) and value.requires_grad:
            watched = _Watch.apply(value, context, None if weight is None else _read(output, weight))
            if isinstance(output, dict):
                cast(Any, output)[name] = watched
            else:
                setattr(output, name, watched)
    if isinstance(output, tuple) and context.labelled and isinstance(output[0], Tensor) and output[0].dim() == 0:
        return (_Watch.apply(output[0], context, None), *output[1:])
    return output


def _read(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


# --- reading a call --------------------------------------------------------------------------------------------------------------------


def _context_of(model: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any], facts: Mapping[str, Any]) -> BatchContext:
    record = cast(Any, model).rankwise
    tokens = next((given[key] for key in ("input_ids", "inputs_embeds") if given.get(key) is not None), None)
    if tokens is None:
        tokens = next((value for value in (*args, *given.values()) if isinstance(value, Tensor)), None)
    ids = given.get("input_ids") is not None
    batch = None if tokens is None or not tokens.dim() else tokens.shape[0]
    length = None if tokens is None or tokens.dim() < (2 if ids else 3) else tokens.shape[1]
    cache, labels = given.get("past_key_values"), given.get("labels")
    filled = cache is not None and bool(cache.get_seq_length())
    phase = "decode" if filled else "train" if model.training and torch.is_grad_enabled() else "prefill"
    mask = None if filled else valid_tokens(given.get("attention_mask"), length)
    context = BatchContext(
        phase,
        record.meter,
        batch,
        length,
        mask,
        types=facts["sample_types"],
        task=facts["task"],
        cache=cache,
        sites=len(record.plan.sites),
        blocks=len(record.plan.blocks),
        labelled=labels is not None,
        uncached=given.get("use_cache") is False,
        generates=bool(getattr(model, "can_generate", bool)()),
        scale=record.meter.scale,
    )
    if facts["prompt_mask"] is not None:
        context.prompt = facts["prompt_mask"].bool() if mask is None else facts["prompt_mask"].bool() & mask
    elif labels is not None and labels.dim() == 2 and labels.shape[1] == length:
        context.prompt = prompt_tokens(labels, mask)
    items = given.get("num_items_in_batch")
    if items is not None and labels is not None:  # the main loss is a sum over the step's tokens: this forward's share of it
        supervised = labels[:, 1:] if labels.dim() == 2 else labels
        context.share = (supervised != _IGNORED).sum() / items
    return context


def prompt_tokens(labels: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, length) bool: tokens without a label before the first one that has one, padding left out."""
    before = (labels != _IGNORED).cumsum(1) == 0
    return before if mask is None else before & mask.bool()


def valid_tokens(mask: Any, length: int | None) -> Tensor | None:
    """(batch, length) bool from the attention mask of a call whose cache is empty.

    A static cache comes with a (batch, 1, length, longest) mask, boolean or additive: what its last row may see is no padding.

    Raises:
        TrainingError: a mask of another kind.
    """
    if isinstance(mask, Mapping):  # one mask for each kind of attention
        mask = mask.get("full_attention", mask)
    if mask is None or length is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shown = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__} of {', '.join(mask)}"
        raise TrainingError(f"attention_mask is {shown}, from which routing cannot tell padding; give a (batch, length) mask")
    if mask.dim() == 4:
        last = mask[:, 0, -1, :length]
        return last >= 0 if last.is_floating_point() else last.bool()
    return mask[:, -length:].bool()


# --- asked from outside ----------------------------------------------------------------------------------------------------------------


def takes_context(model: nn.Module) -> bool:
    """Whether a model was adapted with something that reads facts of the batch, so that its call takes `FACTS`."""
    return open_context in model._forward_pre_hooks.values()


def facts_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a call of the model without labels, from a batch that has them: where its prompts end.

    Empty for a model that would not know what to do with them.
    """
    labels = batch.get("labels")
    if not takes_context(model) or labels is None or labels.dim() != 2:
        return {}
    return {"prompt_mask": prompt_tokens(labels, valid_tokens(batch.get("attention_mask"), labels.shape[1]))}
