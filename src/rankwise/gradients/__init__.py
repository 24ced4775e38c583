"""Gradient axis: how do gradients become steps? Rules address roles (down, up, core, tail, gain, gate), never parameter names."""

from rankwise.gradients.base import GradientRule
from rankwise.gradients.direct import DirectSteps
from rankwise.gradients.lora_fa import LoraFa
from rankwise.gradients.lora_plus import LoraPlus
from rankwise.gradients.lora_pro import LoraPro
from rankwise.gradients.plain import Plain
from rankwise.gradients.role_rates import RoleRates

GRADIENTS: dict[str, type[GradientRule]] = {rule.name: rule for rule in (Plain, LoraPlus, LoraFa, RoleRates, LoraPro)}

__all__ = ["GRADIENTS", "DirectSteps", "GradientRule", "LoraFa", "LoraPlus", "LoraPro", "Plain", "RoleRates"]
