"""LoRA-drop: a short probe says whose update does something; the sites that do little share one update, or have none.

    g_i = sum over tokens of ||dW_i x||^2,    I_i = g_i / sum_j g_j        keep the fewest sites with the sum of I >= threshold

Zhou et al. 2024, "LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation", arXiv 2402.07721, section 3. Adapters of all
sites are trained briefly on a stratified sample and measured (`importance.py`, `probing.py`); then training begins anew with the plan
that is left. Sites are compared, and share, where their modules have one last name and one shape. All of this is over before the first
step: nothing changes while training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from rankwise.errors import RecipeError
from rankwise.schedules.base import Allocation, Sample, Schedule
from rankwise.updates.base import Site

if TYPE_CHECKING:
    from rankwise.inits import Beginning
    from rankwise.planning import Plan


@dataclass(frozen=True)
class LoraDrop(Schedule):
    """Allocation by output.

    threshold: share of the output energy that the sites with an update of their own reach; 1 keeps all of any energy.
    share: of the training rows, how many the probe sees (`rankwise train` draws them).
    probe_steps: of the probe, one batch each; None for one pass over the sample, at most 200.
    normalize: 'group' reaches the threshold within each type and shape of module, 'global' over the whole model, per token.
    drop: 'share': the other sites of a group use one update together; 'remove': they have none, which saves its arithmetic too.
    warm: kept sites go on from the probe's values instead of beginning anew.
    skip_first_token: the first token of each row does not count, whose activations are sometimes huge.
    strata: what the sample is stratified by, see `Sample`.
    """

    name: ClassVar[str] = "lora-drop"
    threshold: float = 0.9
    share: float = 0.1
    probe_steps: int | None = None
    normalize: Literal["group", "global"] = "group"
    drop: Literal["share", "remove"] = "share"
    warm: bool = False
    skip_first_token: bool = False
    strata: Literal["auto", "label", "length", "none"] = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise RecipeError(f"threshold={self.threshold} of the lora-drop schedule must be from 0 to 1; 0.9 is the paper's")
        if not 0 < self.share <= 1:
            raise RecipeError(f"share={self.share} of the lora-drop schedule must be above 0 and at most 1; 0.1 is usual")
        if self.probe_steps is not None and self.probe_steps < 0:
            raise RecipeError(f"probe_steps={self.probe_steps} of the lora-drop schedule must be at least 0, or None for one pass")

    @property
    def sample(self) -> Sample:
        return Sample(self.share, self.strata)

    def notes(self, sites: Sequence[Site]) -> list[str]:
        then = "share one update" if self.drop == "share" else "have none"
        warm = "; kept sites go on from the probe's values, so training does not begin at the base" if self.warm else ""
        return [
            f"a probe runs before training, on a share of {self.share:g} of the training rows, with all the adapters of this table; then "
            f"those sites of one type and shape that are not needed for {self.threshold:.3g} of the output {then}: the numbers here are "
            f"upper bounds{warm}"
        ]

    def allocate(
        self, model: nn.Module, made: "Plan", batches: Sequence[Mapping[str, Any]] | None, begun: "Mapping[str, Beginning] | None"
    ) -> Allocation:
        from rankwise.importance import allocate
        from rankwise.probing import run_probe

        probed = run_probe(model, made.recipe, batches, self.probe_steps, begun)
        left = allocate(made, probed.importance, self.threshold, self.drop, self.normalize, self.skip_first_token)
        shared = {site.owner for site in left.sites if site.owner}
        kept = [site.name for site in left.sites if not site.owner and site.name not in shared]
        return Allocation(left, {name: probed.trained[name] for name in kept} if self.warm else {})

    def begin(self, model: nn.Module) -> None:
        return None
