"""Routes on the KV cache: a prompt is routed once, when the cache is filled, and every later token follows that.

The routes are a dict block name -> c (batch, sites) on the cache object itself, so copies of it carry them; when its rows are reordered,
repeated or selected, the routes are, because the object's class is exchanged for one that does both.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rankwise.context import BatchContext
from rankwise.errors import TrainingError

ROUTES = "rankwise_routes"


class _Routed:
    """Mixed into the class of a cache: its rows move with the cache's."""

    rankwise_routes: dict[str, Tensor]
    rankwise_keeps: bool = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]  # pyright: ignore
        self._pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]  # pyright: ignore
        self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]  # pyright: ignore
        self.rankwise_routes = {name: c.repeat_interleave(repeats, dim=0) for name, c in self.rankwise_routes.items()}

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]  # pyright: ignore
        self.rankwise_routes = {}

    def _pick(self, rows: Tensor) -> None:
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(1)
        self.rankwise_routes = {name: c.index_select(0, rows.to(c.device).long()) for name, c in self.rankwise_routes.items()}


@lru_cache(maxsize=64)
def _routed(kind: type) -> type:
    return type(kind.__name__, (_Routed, kind), {"__module__": kind.__module__})


def keep(cache: Any, routes: Mapping[str, Tensor]) -> None:
    """Writes the routes of a forward onto its cache; nothing where it has none."""
    if cache is None:
        return
    if not isinstance(cache, _Routed):
        cache.__class__ = _routed(type(cache))
    cache.rankwise_routes = {name: c.detach() for name, c in routes.items()}


def kept(context: BatchContext, block: str) -> Tensor:
    """The c (batch, sites) of a block for tokens that come after a routed prompt.

    Raises:
        TrainingError: the cache holds tokens but no routes, routes of another batch, or more than one new token comes and
            `keep_routes(cache)` was not called.
    """
    cache = context.cache
    routes: Mapping[str, Tensor] = getattr(cache, ROUTES, {})
    if block not in routes:
        raise TrainingError(
            f"the cache holds tokens but no routes of {block}: it was filled by another model or while the adapter was off; begin with an "
            "empty cache"
        )
    if context.length is not None and context.length > 1 and not cache.rankwise_keeps:
        raise TrainingError(
            f"{context.length} new tokens on a cache whose prompt was routed already: the prompt continues in chunks, a second turn has "
            "come, or decoding is assisted. Give the whole prompt at once on an empty cache (no prefill_chunk_size), or call "
            "rankwise.routing.cache.keep_routes(cache) to go on with the routes of the first prompt"
        )
    c = routes[block]
    if context.batch is not None and c.shape[0] != context.batch:
        raise TrainingError(
            f"the cache holds the routes of {c.shape[0]} sequences and the call has {context.batch}; select or repeat the cache's "
            "rows with its own methods (batch_select_indices, batch_repeat_interleave), which move the routes too"
        )
    return c


def keep_routes(cache: Any) -> Any:
    """Lets several tokens at a time follow the routes that a cache holds or will hold: a second turn, assisted decoding. Returns it."""
    if not isinstance(cache, _Routed):
        cache.__class__ = _routed(type(cache))
    cache.rankwise_keeps = True
    return cache
