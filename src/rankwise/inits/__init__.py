"""Init axis: where do the factors start? A choice is a pure function (site, weight, statistics, generator) -> a starting pair."""

from rankwise.inits.base import Beginning, Init, site_generator
from rankwise.inits.olora import OLora
from rankwise.inits.own import Own
from rankwise.inits.random import Gaussian, Kaiming, Orthonormal, RandomUp
from rankwise.inits.spectral import MinorComponents, Pissa

INITS: dict[str, type[Init]] = {init.name: init for init in (Kaiming, Gaussian, Orthonormal, RandomUp, Own, Pissa, MinorComponents, OLora)}

__all__ = [
    "INITS", "Beginning", "Gaussian", "Init", "Kaiming", "MinorComponents", "OLora", "Orthonormal", "Own", "Pissa", "RandomUp",
    "site_generator"
]  # fmt: skip
