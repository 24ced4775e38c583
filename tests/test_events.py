"""Events: what a stateful schedule or gradient rule is told, what it may change, and that its state resumes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import RecipeError, TrainingError
from rankwise.gradients import GradientRule
from rankwise.schedules import Change, Event, Moment, Running, Schedule, Sliced
from rankwise.sites import adapted_sites


class Recorded(Running):
    """Notes every event; at step 2 forgets the state of `up`, at step 3 cuts `down` and `up` to the first two ranks."""

    def __init__(self, model: nn.Module) -> None:
        self.site: Any = next(iter(adapted_sites(model).values()))
        self.seen: list[tuple[str, int]] = []
        self.count = torch.zeros((), dtype=torch.int64)

    def on(self, event: Event, moment: Moment) -> Change | None:
        self.seen.append((event, moment.step))
        self.count += 1
        update = self.site.update
        if event == "step" and moment.step == 2:
            return Change(reset=[update.up])
        if event == "step" and moment.step == 3:
            keep = torch.tensor([0, 2])
            cuts = []
            for name, dim in (("down", 0), ("up", 1)):
                was = getattr(update, name)
                now = nn.Parameter(was.detach().index_select(dim, keep))
                setattr(update, name, now)
                cuts.append(Sliced(was, now, keep, dim))
            return Change(sliced=cuts)
        return None

    def tensors(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.count = tensors["count"].clone()

    def report(self) -> dict[str, float]:
        return {"count": float(self.count)}


@dataclass(frozen=True)
class Watching(Schedule):
    name: ClassVar[str] = "watching"

    def begin(self, model: nn.Module) -> Running:
        return Recorded(model)


@dataclass(frozen=True)
class Remembering(GradientRule):
    name: ClassVar[str] = "remembering"

    def begin(self, model: nn.Module) -> Running:
        return Recorded(model)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(**fields: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = rw.adapt(Toy(), rw.recipes.lora(rank=3).replace(**fields))
    return model, rw.optimizer(model, lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_schedule_hears_of_each_step_before_and_after() -> None:
    model, optimizer = adapted(schedule=Watching())
    step(model, optimizer)
    running: Any = optimizer.rankwise_session.running["schedule"]  # type: ignore[attr-defined]
    assert running.seen == [("backward", 0), ("step", 1)]
    assert optimizer.rankwise_session.report() == {"schedule_count": 2.0}  # type: ignore[attr-defined]


def test_a_gradient_rule_may_have_state_too() -> None:
    model, optimizer = adapted(gradient=Remembering())
    step(model, optimizer)
    assert optimizer.rankwise_session.running["gradient"].seen == [("backward", 0), ("step", 1)]  # type: ignore[attr-defined]


def test_a_reset_forgets_the_moments_of_that_parameter_alone() -> None:
    model, optimizer = adapted(schedule=Watching())
    update: Any = adapted_sites(model)["layer"].update
    for _ in range(2):
        step(model, optimizer)
    assert update.up not in optimizer.state
    assert optimizer.state[update.down]["step"] == 2


def test_sliced_parameters_keep_their_moments_and_go_on_training() -> None:
    model, optimizer = adapted(schedule=Watching())
    update: Any = adapted_sites(model)["layer"].update
    for _ in range(2):
        step(model, optimizer)
    was = update.down
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()  # the third step, after which the parameters are cut
    assert update.down is not was
    assert update.down.shape == (2, 6)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(update.down), id(update.up)}
    assert was not in optimizer.state
    state = optimizer.state[update.down]
    assert state["exp_avg"].shape == (2, 6)
    assert state["step"] == 3
    before = update.down.detach().clone()
    optimizer.zero_grad()
    step(model, optimizer)
    assert not torch.equal(update.down, before)


def test_state_travels_through_tensors() -> None:
    model, optimizer = adapted(schedule=Watching())
    step(model, optimizer)
    tensors = optimizer.rankwise_session.tensors()  # type: ignore[attr-defined]
    assert set(tensors) == {"schedule.count"}
    _, other = adapted(schedule=Watching())
    other.rankwise_session.restore_tensors(tensors)  # type: ignore[attr-defined]
    assert other.rankwise_session.running["schedule"].count == 2  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Shrinking(Schedule):
    """Keeps ranks 0 and 2 after the third step."""

    name: ClassVar[str] = "shrinking"
    changes_ranks: ClassVar[bool] = True

    def begin(self, model: nn.Module) -> Running:
        return Shrink()

    def decay(self, role: str) -> float:
        return 0.5 if role == "up" else 1.0


class Shrink(Running):
    total: int | None = -1

    def expect(self, total_steps: int | None) -> None:
        self.total = total_steps

    def on(self, event: Event, moment: Moment) -> Change | None:
        return Change(ranks={"layer": torch.tensor([0, 2])}) if event == "step" and moment.step == 3 else None


@pytest.mark.parametrize("update", ["lora", "moslora"])
def test_ranks_are_cut_for_any_update_and_training_goes_on(update: str) -> None:
    """MoSLoRA's mixer has two dimensions of the rank: both are cut."""
    model, optimizer = adapted(schedule=Shrinking(), update=update)
    for _ in range(2):
        step(model, optimizer)
    part: Any = adapted_sites(model)["layer"].update
    model(torch.randn(4, 6)).square().sum().backward()
    moments = {name: (p, optimizer.state[p]["exp_avg"]) for name, p in part.named_parameters()}
    optimizer.step()
    assert adapted_sites(model)["layer"].site.rank == 2
    assert [tuple(p.shape) for p in part.parameters()] == [(2, 6), (5, 2), *([(2, 2)] if update == "moslora" else [])]
    assert {id(p) for p in optimizer.state} == {id(p) for p in part.parameters()}
    for name, p in part.named_parameters():
        was, full = moments[name]  # the moment tensor is updated in place by the step, then cut
        for dim, size in enumerate(was.shape):
            if p.shape[dim] != size:
                full = full.index_select(dim, torch.tensor([0, 2]))
        assert torch.equal(optimizer.state[p]["exp_avg"], full)
    before = {name: p.detach().clone() for name, p in part.named_parameters()}
    optimizer.zero_grad()
    step(model, optimizer)
    assert all(not torch.equal(p, before[name]) for name, p in part.named_parameters())
    # what a resumed run takes up: the ranks first
    state = optimizer.rankwise_session.state()  # type: ignore[attr-defined]
    assert state["ranks"] == {"layer": 2}
    again, other = adapted(schedule=Shrinking(), update=update)
    other.rankwise_session.restore(state)  # type: ignore[attr-defined]
    assert again.rankwise.plan.sites[0].rank == 2
    assert {id(p) for g in other.param_groups for p in g["params"]} == {id(p) for p in again.parameters() if p.requires_grad}


def test_a_state_in_blocks_begins_anew_when_its_parameter_is_cut() -> None:
    model, optimizer = adapted(schedule=Shrinking())
    for _ in range(2):
        step(model, optimizer)
    part: Any = adapted_sites(model)["layer"].update
    optimizer.state[part.down]["absmax1"] = torch.ones(7)  # as an 8-bit optimizer keeps it: blocks across rows and columns
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    assert part.down not in optimizer.state
    assert optimizer.state[part.up]["exp_avg"].shape == (5, 2)


def test_a_start_that_is_subtracted_cannot_be_cut() -> None:
    model, optimizer = adapted(schedule=Shrinking(), init="pissa")
    for _ in range(2):
        step(model, optimizer)
    with pytest.raises(RecipeError, match="layer has no factors or a start of its own, so its rank cannot change"):
        step(model, optimizer)


def test_the_schedule_hears_of_the_runs_length_and_scales_decay() -> None:
    model, _ = adapted(schedule=Shrinking())
    optimizer: Any = rw.optimizer(model, lr=1e-2, weight_decay=0.1, total_steps=17)
    assert optimizer.rankwise_session.running["schedule"].total == 17
    assert rw.optimizer(model).rankwise_session.running["schedule"].total is None  # type: ignore[attr-defined]
    seen: dict[str, float] = {}
    optimizer.register_step_pre_hook(lambda made, *_: seen.update({group["role"]: group["weight_decay"] for group in made.param_groups}))
    step(model, optimizer)
    assert seen == {"down": 0.1, "up": 0.05}
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


def test_scaled_gradients_do_not_reach_a_schedule() -> None:
    model, optimizer = adapted(schedule=Watching())
    optimizer.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]  what GradScaler.step sets for a fused optimizer
    with pytest.raises(TrainingError, match="unscale_"):
        step(model, optimizer)
    _, plain = adapted()
    plain.grad_scale = None  # type: ignore[attr-defined]
    plain.step()
