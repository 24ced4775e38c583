"""Storage axis: how the frozen weight of a site is held. Only this axis touches base weights.

A storage is a stateless object. Shapes: x (..., in), bias (out,), g (..., out), weights as the layer holds them; `read` gives (out, in).
"""

from rankwise.storage.base import Keep, Storage
from rankwise.storage.dense import ConvOneD, Dense, Embedding, Opaque, storage_of

STORAGES = {choice.name: choice for choice in (Keep,)}

__all__ = ["STORAGES", "ConvOneD", "Dense", "Embedding", "Keep", "Opaque", "Storage", "storage_of"]
