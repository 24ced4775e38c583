"""The loss of a causal language model whose output head is frozen, in chunks over the supervised tokens: hooks at the model's root.

The root is called without its labels and keeps the logits of no token; its decoder's last hidden state is what `kernels/head_loss.py` takes
the loss of. So every family whose loss is the cross-entropy of  head(hidden)  is served without a forward of its own here, and whether
a model is of that kind is tried before anything is installed.
"""

import inspect
import math
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.errors import TargetError
from rankwise.kernels.head_loss import IGNORED, head_loss
from rankwise.storage import WideLinear, storage_of


@dataclass(eq=False)
class _Call:
    """What the hooks of one call of the root hand on to each other."""

    root: int
    labels: Tensor
    shifted: bool  # whether the label of a token already stands at the token that predicts it
    items: Any  # what the sum is divided by; None for the number of supervised tokens
    outer: "_Call | None"
    hidden: Tensor | None = None


_CALL: ContextVar[_Call | None] = ContextVar("rankwise_fused_loss", default=None)


def fuse_loss(model: nn.Module) -> nn.Module:
    """From now on a training call of the model with labels takes the loss over the supervised tokens alone, in chunks; returns the model.

    The loss and its gradients are those of the model's own forward. All logits are never alive at once, so the output of such a call holds
    logits of no token, (batch, 0, vocabulary). Calls without labels, in evaluation, without gradients or with `logits_to_keep` are left
    alone. `unfuse_loss` takes it back.

    Args:
        model: a causal language model of transformers, adapted, whose output head is an nn.Linear that neither trains nor is adapted.

    Raises:
        TargetError: the head trains, has an adapter or hooks; or the model's loss is another function of what its decoder returns
            (scaled or capped logits, an auxiliary loss, an encoder before it), as one call on eight tokens shows.
    """
    if any(hook is _take_labels for hook in model._forward_pre_hooks.values()):
        return model
    name, decoder = type(model).__name__, getattr(model, "base_model", model)
    if decoder is model or "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        raise TargetError(f"fuse_loss serves causal language models of transformers, and {name} is called otherwise; train it without")
    if not _fusable(model):
        raise TargetError(
            f"the output head of {name} trains, has an adapter or hooks, so the loss is more than its weight; train it without fuse_loss"
        )
    # after the hook that reads the labels for routing, and before the one that watches the loss
    model.register_forward_pre_hook(_take_labels, with_kwargs=True)
    decoder.register_forward_hook(_keep_hidden)
    model.register_forward_hook(_put_loss, with_kwargs=True, prepend=True, always_call=True)
    try:
        own, fused = _tried(model)
    except BaseException:
        unfuse_loss(model)
        raise
    if not math.isclose(own, fused, rel_tol=1e-3):
        unfuse_loss(model)
        raise TargetError(
            f"the loss of {name} is not the cross-entropy of its output head: {own:.6g} on eight tokens, where the head alone gives "
            f"{fused:.6g}; train it without fuse_loss"
        )
    return model


def unfuse_loss(model: nn.Module) -> nn.Module:
    """The model's own loss again; returns the model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_take_labels, _keep_hidden, _put_loss)]:
                del hooks[key]
                for also in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
                    also.pop(key, None)
    return model


def _tried(model: nn.Module) -> tuple[float, float]:
    """The loss of eight tokens by the model's own forward and by the hooks."""
    head, training = _head(model), model.training
    ids = (torch.arange(8, device=head.weight.device) * 7919 % head.weight.shape[0])[None]
    model.eval()
    call = _Call(0, ids, False, None, _CALL.get())  # no root is 0: the decoder's output is kept and nothing else changes
    token = _CALL.set(call)
    try:
        with torch.no_grad():
            own = model(input_ids=ids, labels=ids).loss
            fused = _loss(model, call)
    finally:
        _CALL.reset(token)
        model.train(training)
    return float(own), float(fused)


def _head(model: nn.Module) -> nn.Linear:
    return cast(Any, model).get_output_embeddings()


def _fusable(model: nn.Module) -> bool:
    head = _head(model)
    plain = (
        type(head) in (nn.Linear, WideLinear) and "forward" not in head.__dict__ and not head._forward_hooks and not head._forward_pre_hooks
    )
    return plain and not any(parameter.requires_grad for parameter in head.parameters())


def _take_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
    called = model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    called = called and not kwargs.get("fused_lm_head")  # TRL's trainers ask the forward for per-token numbers of their own
    if labels is None or not called or kwargs.get("logits_to_keep") is not None or not _fusable(model):
        return None
    targets = labels if shifted is None else shifted
    _CALL.set(_Call(id(model), targets, shifted is not None, kwargs.get("num_items_in_batch"), _CALL.get()))
    rest = {name: value for name, value in kwargs.items() if name not in ("labels", "shift_labels", "num_items_in_batch")}
    return args, {**rest, "logits_to_keep": torch.empty(0, dtype=torch.long, device=labels.device)}


def _keep_hidden(decoder: nn.Module, args: Any, output: Any) -> None:
    call = _CALL.get()
    if call is not None:
        call.hidden = output[0]


def _put_loss(model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    call = _CALL.get()
    if call is None or call.root != id(model):
        return output
    _CALL.set(call.outer)
    if output is None:  # the forward failed
        return output
    loss = _loss(model, call)
    return (loss, *output) if isinstance(output, tuple) else type(output)(**{**output, "loss": loss})


def _loss(model: nn.Module, call: _Call) -> Tensor:
    head, hidden = _head(model), cast(Tensor, call.hidden)
    labels = call.labels if call.shifted else F.pad(call.labels, (0, 1), value=IGNORED)[..., 1:]
    labels = labels.reshape(-1).to(hidden.device)
    (supervised,) = (labels != IGNORED).nonzero(as_tuple=True)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if len(supervised) < len(rows):
        rows, labels = rows[supervised], labels[supervised]
    total = head_loss(rows, head.weight, head.bias, labels, storage_of(head))
    items = len(supervised) if call.items is None else call.items
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)
