"""The hooks of a model that routes: one pair at its root, for the facts of the batch, and one at each block that has a gate."""

from typing import Any, cast

from torch import nn

from rankwise.context import CHECKPOINT, Carrying, close_context, open_context, required
from rankwise.routing.base import GATE, BlockGate
from rankwise.routing.cache import kept


def route(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a block with a gate: the weights of its layers, made anew or read from the cache."""
    gate: BlockGate = getattr(block, GATE)
    if not gate.enabled:
        return
    context = required(f"the gate of {gate.block.name}")
    if context.phase == "decode":
        context.routes[gate.block.name] = kept(context, gate.block.name)
        return
    hidden = args[0] if args else kwargs["hidden_states"]
    context.routes[gate.block.name] = gate(hidden, context)


def install(model: nn.Module) -> None:
    """The hooks of the root and of every block with a gate: module-level functions, which copies and pickles of the model keep."""
    model.register_forward_pre_hook(open_context, with_kwargs=True)
    model.register_forward_hook(close_context, with_kwargs=True, always_call=True)
    for block in gated_blocks(model):
        block.register_forward_pre_hook(route, with_kwargs=True)


def uninstall(model: nn.Module) -> None:
    """Takes gates and hooks off again, wherever the model may have been copied to since."""
    for block in gated_blocks(model):
        delattr(block, GATE)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (open_context, close_context, route)]:
                del hooks[key]
                for also in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
                    also.pop(key, None)
        function = module.__dict__.get(CHECKPOINT)
        if isinstance(function, Carrying):
            module.__dict__[CHECKPOINT] = function.checkpoint


def gated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that have a gate, in the model's order."""
    return [module for module in model.modules() if isinstance(module._modules.get(GATE), BlockGate)]


def gates_of(model: nn.Module) -> dict[str, BlockGate]:
    """Block name -> its gate."""
    gates = (cast(BlockGate, block._modules[GATE]) for block in gated_blocks(model))
    return {gate.block.name: gate for gate in gates}
