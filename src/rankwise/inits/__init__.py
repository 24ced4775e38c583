"""Init axis: where do the factors start? A choice is a pure function (site, weight, statistics, generator) -> a starting pair."""

from rankwise.inits.base import Beginning, Calibration, Init, Statistics, site_generator, stacked_beginnings
from rankwise.inits.corda import Corda
from rankwise.inits.deep_lora import DeepFrames
from rankwise.inits.eva import Eva
from rankwise.inits.lora_ga import LoraGa
from rankwise.inits.lora_one import LoraOne
from rankwise.inits.olora import OLora
from rankwise.inits.own import Own
from rankwise.inits.random import Gaussian, Kaiming, Orthonormal, RandomUp
from rankwise.inits.rosa import Slice
from rankwise.inits.spectral import MinorComponents, Pissa

_CHOICES: tuple[type[Init], ...] = (
    Kaiming, Gaussian, Orthonormal, RandomUp, Own, Pissa, MinorComponents, OLora, LoraGa, Corda, DeepFrames, Slice, Eva, LoraOne,
)  # fmt: skip

INITS: dict[str, type[Init]] = {init.name: init for init in _CHOICES}

__all__ = [
    "INITS", "Beginning", "Calibration", "Corda", "DeepFrames", "Eva", "Gaussian", "Init", "Kaiming", "LoraGa", "LoraOne",
    "MinorComponents", "OLora", "Orthonormal", "Own", "Pissa", "RandomUp", "Slice", "Statistics", "site_generator", "stacked_beginnings",
]  # fmt: skip
