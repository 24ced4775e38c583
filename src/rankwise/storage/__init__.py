"""Storage axis: how the frozen weight of a site is held. Only this axis touches base weights.

A storage is a stateless object. Shapes: x (..., in), bias (out,), g (..., out), weights as the layer holds them; `read` gives (out, in).
"""

from rankwise.storage.base import Keep, Storage, StorageChoice
from rankwise.storage.dense import ConvOneD, Dense, Embedding, Opaque
from rankwise.storage.known import storage_of
from rankwise.storage.nf4 import NF4, NF4Linear
from rankwise.storage.wide import WideLinear, fp32_products, fp32_products_pay, native_products

STORAGES: dict[str, type[StorageChoice]] = {choice.name: choice for choice in (Keep, NF4)}

__all__ = [
    "NF4",
    "STORAGES",
    "ConvOneD",
    "Dense",
    "Embedding",
    "Keep",
    "NF4Linear",
    "Opaque",
    "Storage",
    "StorageChoice",
    "WideLinear",
    "fp32_products",
    "fp32_products_pay",
    "native_products",
    "storage_of",
]
