"""Routing axis: which updates act on which tokens?

Facts of the batch and losses that are attached inside the graph live in `rankwise.context`.
"""

from rankwise.routing.base import GATE, Block, BlockGate, RoutingChoice
from rankwise.routing.everywhere import Everywhere
from rankwise.routing.prompt_gate import PromptRouting

ROUTINGS: dict[str, type[RoutingChoice]] = {choice.name: choice for choice in (Everywhere, PromptRouting)}

__all__ = ["GATE", "ROUTINGS", "Block", "BlockGate", "Everywhere", "PromptRouting", "RoutingChoice"]
