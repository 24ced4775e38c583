"""Gain axis: are rows of base and branch rescaled? A gain stands beside the update, so that it composes with any constant core."""

from rankwise.gains.base import Gain, GainChoice
from rankwise.gains.dora import Dora
from rankwise.gains.none import NoGain
from rankwise.gains.propulsion import Propulsion

GAINS: dict[str, type[GainChoice]] = {choice.name: choice for choice in (NoGain, Dora, Propulsion)}

__all__ = ["GAINS", "Dora", "Gain", "GainChoice", "NoGain", "Propulsion"]
