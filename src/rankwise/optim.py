"""The optimizer: parameters grouped by role, and the hooks through which rules and schedules act.

`optimizer(model, lr)` is a real torch optimizer that has the hooks; `attach(model, optimizer)` gives them to a foreign one. A plain loop,
HF Trainer
and TRL therefore behave alike, and none can forget an event.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.errors import TrainingError
from rankwise.gradients import DirectSteps, GradientRule
from rankwise.matching import output_head
from rankwise.record import adapted
from rankwise.resizing import grow, resize
from rankwise.schedules import Change, Event, Moment, Running, Schedule, Sliced
from rankwise.sites import AdaptedLinear, adapted_sites, parts_of

#: decay would pull these to a uniform choice, or to no activation at all
UNDECAYED = frozenset({"gate", "activation"})
#: steps after which a site that never had a gradient is warned of, in loops that never ask `check_alive`
PATIENCE = 10


def roles_of(model: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
    """Name of each trained parameter -> (role, parameter). What belongs to no adapter (a head, a bias) has the role 'other'."""
    by_id: dict[int, str] = {}
    for part in parts_of(model):
        by_id.update({id(getattr(part, name)): role for name, role in part.roles.items()})
    return {name: (by_id.get(id(p), "other"), p) for name, p in model.named_parameters() if p.requires_grad}


def groups_of(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups, one per role that has parameters, each with its 'role'. Every trained tensor is in exactly one."""
    groups: dict[str, dict[str, Any]] = {}
    for role, parameter in roles_of(model).values():
        group = groups.setdefault(role, {"params": [], "role": role, "lr": lr, "weight_decay": weight_decay})
        group["params"].append(parameter)
    return list(groups.values())


def optimizer(
    model: nn.Module,
    lr: float | None = None,
    weight_decay: float = 0.0,
    kind: Callable[..., Optimizer] | None = None,
    total_steps: int | None = None,
    validation: Any = None,
    **options: Any,
) -> Optimizer:
    """An optimizer over what trains, grouped by role, that fires rankwise's events.

    Args:
        model: an adapted model.
        lr: learning rate; None takes the recipe's own.
        weight_decay: decoupled decay of every role, before the gradient rule scales it.
        kind: any optimizer class that takes parameter groups, lr and weight_decay; None is AdamW, its moments held as the recipe's
            `states` say. Roles whose gradients the recipe's rule makes into steps (LoRA-Pro in weight space) move by them; `kind` then
            serves the others.
        total_steps: optimizer steps that the run will take; schedules with phases (AdaLoRA) must know it.
        validation: batches of rows that are not trained on, for routings that learn from them too; anything that can be read again and
            again in the same order, such as a list.
        **options: passed on to it. Plain AdamW runs fused unless told otherwise.
    """
    recipe = adapted(model).recipe
    lr = recipe.lr if lr is None else lr
    if kind is None and recipe.states == "8bit":
        from rankwise.galore import GaLore  # whose groups without a rank are plain AdamW

        kind = GaLore
        options.setdefault("states", "8bit")
    kind = torch.optim.AdamW if kind is None else kind
    if kind is torch.optim.AdamW:
        options.setdefault("fused", True)
    groups = groups_of(model, lr, weight_decay)
    if recipe.gradient.direct:
        made: Optimizer = DirectSteps(groups, kind, recipe.gradient.direct, lr, weight_decay, **options)
    else:
        made = kind(groups, lr=lr, weight_decay=weight_decay, **options)
    return attach(model, made, total_steps, validation)


def attach(model: nn.Module, optimizer: Optimizer, total_steps: int | None = None, validation: Any = None) -> Optimizer:
    """Gives an optimizer rankwise's hooks: regroups its parameters by role, and fires `backward` before and `step` after each step.

    Raises:
        TrainingError: the optimizer misses parameters that train, or holds frozen ones of the base; total_steps is missing where the
            recipe's schedule must know it; the optimizer would normalize gradients that the recipe's rule makes into steps.
    """
    rule = adapted(model).recipe.gradient
    if rule.direct and not (isinstance(optimizer, DirectSteps) and optimizer.direct >= rule.direct):
        raise TrainingError(
            f"gradient={rule.name!r} makes finished steps of the gradients of {', '.join(sorted(rule.direct))}, which "
            f"{type(optimizer).__name__} would change once more; make the optimizer with rankwise.optimizer(model, kind=...)"
        )
    roles = {id(parameter): role for role, parameter in roles_of(model).values()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, (_, parameter) in roles_of(model).items() if id(parameter) not in held]
    if missing:
        raise TrainingError(f"the optimizer does not hold {len(missing)} parameters that train, such as {missing[0]}; make it after adapt")
    _regroup(optimizer, roles)
    Session(model, optimizer, total_steps, validation)
    return optimizer


def _regroup(optimizer: Optimizer, roles: dict[int, str]) -> None:
    """Splits groups by role, in place, keeping every option; parameters of other models get the role 'other'."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_role: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_role.setdefault(roles.get(id(parameter), "other"), []).append(parameter)
        groups.extend({**group, "params": params, "role": role} for role, params in by_role.items())
    optimizer.param_groups[:] = groups


# Handles of the gradient transforms of each model, outside of it: copies and pickles of a model carry no hooks.
_TRANSFORMS: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()
# What runs over each model: one session at a time, so that nothing is tapped or transformed twice.
_RUNNING: weakref.WeakKeyDictionary[nn.Module, list[Running]] = weakref.WeakKeyDictionary()


class Session:
    """The hooks of one optimizer over one adapted model. Holds no closures on parameters that could be copied with the model."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int | None = None, validation: Any = None) -> None:
        record = adapted(model)
        self.model, self.optimizer = weakref.ref(model), weakref.ref(optimizer)
        self.rule: GradientRule = record.recipe.gradient
        self.schedule: Schedule = record.recipe.schedule
        self.steps = 0
        for earlier in _RUNNING.pop(model, []):
            earlier.close()
        begun = {"gradient": self.rule.begin(model), "schedule": record.recipe.schedule.begin(model)}
        begun["routing"] = record.recipe.routing.begin(model, validation)
        self.running: dict[str, Running] = {name: running for name, running in begun.items() if running is not None}
        _RUNNING[model] = list(self.running.values())
        for running in self.running.values():
            running.expect(total_steps)
        self.waiting = {name: module for name, module in adapted_sites(model).items() if _trains(module)}
        self.attached: dict[str, float] = {}
        self._before: list[tuple[dict[str, Any], Any, Any]] = []
        self.handles: list[Any] = [optimizer.register_step_pre_hook(self._pre), optimizer.register_step_post_hook(self._post)]
        self._transform(model)
        optimizer.rankwise_session = self  # type: ignore[attr-defined]

    def _transform(self, model: nn.Module) -> None:
        # a second optimizer of the same model must not transform gradients twice
        for handle in _TRANSFORMS.pop(model, []):
            handle.remove()
        transforms = []
        for module in adapted_sites(model).values():
            update = module.own_update  # the gradient of a shared tensor is transformed once, when it is the sum over its sites
            if update is not None:
                for name, role in update.roles.items():
                    transform = self.rule.transform(module, role)
                    if transform is not None:
                        transforms.append(getattr(update, name).register_hook(transform))
        _TRANSFORMS[model] = transforms
        self.handles.extend(transforms)

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()
        for running in self.running.values():
            running.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the hooks to go on where they were: finished steps, sites still without a gradient, and the
        ranks where a schedule changes them."""
        state: dict[str, Any] = {"steps": self.steps, "waiting": list(self.waiting)}
        if self.schedule.changes_ranks and (model := self.model()) is not None:
            state["ranks"] = {name: module.site.rank for name, module in adapted_sites(model).items()}
        if self.schedule.changes_experts and (model := self.model()) is not None:
            state["experts"] = {name: module.site.experts for name, module in adapted_sites(model).items()}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave. Called before the model's own state is loaded, whose shapes follow the ranks and experts."""
        if (model := self.model()) is not None and (optimizer := self.optimizer()) is not None:
            sites, ranks = adapted_sites(model), state.get("ranks", {})
            cut = {name: torch.arange(rank) for name, rank in ranks.items() if rank < sites[name].site.rank}
            self._apply(Change(ranks=cut), model, optimizer)
            experts = state.get("experts", {})
            while behind := [name for name, count in experts.items() if sites[name].site.experts < count]:
                self._apply(Change(grown=behind), model, optimizer)
        self.steps = int(state["steps"])
        self.waiting = {name: module for name, module in self.waiting.items() if name in state["waiting"]}

    def tensors(self) -> dict[str, Tensor]:
        """The state of the gradient rule and of the schedule, for a checkpoint."""
        return {f"{name}.{key}": tensor for name, running in self.running.items() for key, tensor in running.tensors().items()}

    def restore_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `tensors` gave, after the model's own state was loaded."""
        for name, running in self.running.items():
            running.restore({key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")})

    def report(self) -> dict[str, float]:
        """What rule and schedule say of the step that just ended, and the losses that were attached to its forwards."""
        said = {f"{name}_{key}": value for name, running in self.running.items() for key, value in running.report().items()}
        return said | {f"routing_{name}": value for name, value in self.attached.items()}

    def fire(self, event: Event, optimizer: Optimizer) -> None:
        """Calls the gradient rule and the schedule, and brings the optimizer in line with what they changed."""
        for running in self.running.values():
            change = running.on(event, Moment(self.steps, optimizer))
            if change is not None and (model := self.model()) is not None:
                self._apply(change, model, optimizer)

    def _apply(self, change: Change, model: nn.Module, optimizer: Optimizer) -> None:
        cuts = [*change.sliced, *(resize(model, change.ranks) if change.ranks else ())]
        _follow(optimizer, change.reset, cuts)
        if change.grown:
            before = {id(parameter) for _, parameter in roles_of(model).values()}
            grow(model, change.grown)
            _take_in(optimizer, model, before)
        if cuts or change.grown:
            self._transform(model)  # hooks stand on the parameters that were replaced

    def _pre(self, optimizer: Optimizer, *_: Any) -> None:
        self._note_gradients()
        if self.steps == 0:
            self._refuse_a_head_past_its_adapter()
        if self.running and getattr(optimizer, "grad_scale", None) is not None:
            raise TrainingError(
                "the gradients are still multiplied by a GradScaler's scale, which the recipe's schedule or gradient rule would take for "
                "their size; call scaler.unscale_(optimizer) before scaler.step(optimizer), or train in bf16"
            )
        self.fire("backward", optimizer)
        # Multipliers act at step time and are taken back after it: schedulers and checkpoints only ever see the base rate.
        self._before = [(group, group["lr"], group.get("weight_decay")) for group in optimizer.param_groups]
        for group, lr, decay in self._before:
            role = group.get("role", "other")
            if (rate := self.rule.rate(role)) != 1.0:
                group["lr"] = lr * rate
            factor = 0.0 if role in UNDECAYED else self.rule.decay(role) * self.schedule.decay(role)
            if decay and factor != 1.0:
                group["weight_decay"] = decay * factor

    def _post(self, optimizer: Optimizer, *_: Any) -> None:
        for group, lr, decay in self._before:
            group["lr"] = lr
            if decay is not None:
                group["weight_decay"] = decay
        self._before = []
        self.steps += 1
        if self.steps == PATIENCE and self.waiting:
            warnings.warn(self._silence(), stacklevel=2)
        if (model := self.model()) is not None:
            self.attached = adapted(model).meter.take()
        self.fire("step", optimizer)

    def _note_gradients(self) -> None:
        for name in [name for name, module in self.waiting.items() if _has_gradient(module)]:
            del self.waiting[name]

    def _refuse_a_head_past_its_adapter(self) -> None:
        """An adapted output head whose parameters the first backward did not reach at all, while it reached others or there are no others:
        the loss was made with the head's bare weight, so it is another model's."""
        model = self.model()
        head = None if model is None else output_head(model)
        if model is None or not isinstance(head, AdaptedLinear) or not _trains(head):
            return
        mine = {id(p) for p in head.parameters()}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in mine]
        reached = any(p.grad is not None for p in others) or not others
        if reached and all(p.grad is None for p in head.parameters()):
            raise TrainingError(
                f"the loss reads the weight of {head.site.name} past its adapter (TRL's does at the output head), so it is not the adapted "
                "model's; take the head out with targets.exclude, or train with transformers' Trainer, rankwise train or a plain loop"
            )

    def check_alive(self) -> None:
        """Raises TrainingError when a site has had no gradient in any step so far: its adapter would do nothing."""
        if self.steps and self.waiting:
            raise TrainingError(self._silence())

    def _silence(self) -> str:
        names = list(self.waiting)
        return (
            f"{len(names)} of the adapted sites never received a gradient, such as {names[0]}; the model does not use them in its forward, "
            "or something reads their weights past the adapter: take them out with targets.exclude"
        )


def _follow(optimizer: Optimizer, reset: Sequence[nn.Parameter], sliced: Sequence[Sliced]) -> None:
    for parameter in reset:
        optimizer.state.pop(parameter, None)
    for cut in sliced:
        state = optimizer.state.pop(cut.was, None)
        # a state in blocks of its own (8-bit moments) cannot be cut along a dimension: it begins anew
        if state is not None and all(value.numel() == 1 or value.shape == cut.was.shape for value in _tensors(state)):
            optimizer.state[cut.now] = {
                key: value.index_select(cut.dim, cut.index) if isinstance(value, Tensor) and value.shape == cut.was.shape else value
                for key, value in state.items()
            }
        for group in optimizer.param_groups:
            group["params"] = [cut.now if parameter is cut.was else parameter for parameter in group["params"]]


def _take_in(optimizer: Optimizer, model: nn.Module, before: set[int]) -> None:
    """Brings the groups in line with what trains now: parameters that froze leave with their state, new ones join the group of their role.

    Groups keep their number and options, and the order of a model that was built like this, so that learning rate schedules and
    checkpoints fit.
    """
    roles = roles_of(model).values()
    order = {id(parameter): position for position, (_, parameter) in enumerate(roles)}
    gone = before - order.keys()
    groups = {group["role"]: group for group in optimizer.param_groups if any(id(p) in before for p in group["params"])}
    for group in optimizer.param_groups:
        for parameter in [p for p in group["params"] if id(p) in gone]:
            optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for role, parameter in roles:
        if id(parameter) not in before:
            if role not in groups:
                raise TrainingError(f"the optimizer has no group for the role {role!r} of what a new expert brings")
            groups[role]["params"].append(parameter)
    for group in groups.values():
        group["params"].sort(key=lambda parameter: order.get(id(parameter), -1))


def next_task(model: nn.Module, optimizer: Optimizer) -> None:
    """Tells rules and schedules that the data of another task begin. AM-LoRA freezes what it has and begins a new LoRA; the optimizer
    follows. With recipes to which tasks mean nothing nothing happens.

    Args:
        model: the adapted model.
        optimizer: what `rankwise.optimizer` or `attach` returned for it.

    Raises:
        TrainingError: the optimizer is not one of this model's.
    """
    session = getattr(optimizer, "rankwise_session", None)
    if session is None or session.model() is not model:
        raise TrainingError("next_task needs the optimizer of this model, from rankwise.optimizer or rankwise.attach")
    session.fire("task", optimizer)


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _trains(module: AdaptedLinear) -> bool:
    """Whether a site must get a gradient sooner or later: a schedule may have left it with rank 0, a gate may never choose it."""
    return module.place is None and any(p.requires_grad and p.numel() for p in module.parameters())


def _has_gradient(module: AdaptedLinear) -> bool:
    gradients: Sequence[Tensor | None] = [
        p.grad for part in (module.own_update, module.gain) if part is not None for p in part.parameters() if p.requires_grad
    ]
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)
