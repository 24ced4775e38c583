"""Update axis: what the factors are. A choice (frozen dataclass) says which tensors an update owns; its module maps them to Factors."""

from rankwise.updates.attention_mixture import AttentionMixture
from rankwise.updates.base import Part, Role, Site, Slot, Update, UpdateChoice
from rankwise.updates.deep import Deep
from rankwise.updates.experts import Experts
from rankwise.updates.lowrank import LowRank, lora_slots
from rankwise.updates.mixer import Mixer
from rankwise.updates.none import NoUpdate
from rankwise.updates.projected import Projected
from rankwise.updates.randlora import RandLora
from rankwise.updates.svd import Svd
from rankwise.updates.vera import Vera

UPDATES: dict[str, type[UpdateChoice]] = {
    choice.name: choice for choice in (LowRank, Mixer, Vera, Svd, Deep, Projected, NoUpdate, Experts, AttentionMixture, RandLora)
}

__all__ = [
    "UPDATES",
    "AttentionMixture",
    "Deep",
    "Experts",
    "LowRank",
    "Mixer",
    "NoUpdate",
    "Part",
    "Projected",
    "RandLora",
    "Role",
    "Site",
    "Slot",
    "Svd",
    "Update",
    "UpdateChoice",
    "Vera",
    "lora_slots",
]
