"""The routing axis: facts of the batch, losses inside the graph, gates at blocks; each trap of the design has its test."""

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import llama, perturb, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.context import (
    BatchContext,
    attach,
    current,
    facts_of,
    open_context,
    prompt_tokens,
    set_auxiliary_scale,
    takes_context,
    valid_tokens,
)
from rankwise.errors import TrainingError
from rankwise.optim import roles_of
from rankwise.recipe import Recipe
from rankwise.routing import ROUTINGS, Block, BlockGate, RoutingChoice
from rankwise.sites import adapted_sites
from rankwise.updates import LowRank, Slot
from rankwise.updates.lowrank import LowRankUpdate

torch.set_num_threads(1)

WEIGHT = 0.3


class ProbeUpdate(LowRankUpdate):
    """For tests: gates that read the sample types of the batch, and a loss on h attached to the branch."""

    def token_core(self, x: Tensor, h: Tensor) -> Tensor:
        context = current()
        assert context is not None
        types = torch.zeros(len(x)) if context.types is None else context.types
        loss = WEIGHT * (h.float().square().mean((1, 2)) * (1 + types)).mean()
        return attach(h * (1 + 0.5 * types[:, None, None]).to(h.dtype), loss, "probe")


@dataclass(frozen=True)
class Probe(LowRank):
    name: ClassVar[str] = "probe"
    module: ClassVar[Any] = ProbeUpdate
    constant_core: ClassVar[bool] = False

    @property
    def reads_context(self) -> bool:
        return True


class MeanGate(BlockGate):
    """For tests: a sigmoid of the mean over the prompt's hidden states."""

    def begin(self, generator: torch.Generator) -> None:
        self.put(router=torch.randn(self.router.shape, generator=generator))

    def forward(self, hidden: Tensor, context: BatchContext) -> Tensor:
        mask = torch.ones(hidden.shape[:2]) if context.prompt is None and context.mask is None else context.prompt
        mask = (context.mask if mask is None else mask).float()[..., None]
        pooled = (hidden.float() * mask).sum(1) / mask.sum(1)
        return torch.sigmoid(pooled @ self.router.T)


@dataclass(frozen=True)
class Mean(RoutingChoice):
    name: ClassVar[str] = "mean"
    module: ClassVar[Any] = MeanGate

    def slots(self, block: Block) -> dict[str, Slot]:
        return {"router": Slot("gate", (len(block.sites), block.width), "rankwise_gate.router")}


def probed(**changes: Any) -> Any:
    return perturb(rw.adapt(llama(**changes), Recipe(update=Probe(), rank=4, targets=rw.Targets(("q_proj", "down_proj")))), size=1.0)


def gated(**changes: Any) -> Any:
    recipe = Recipe(routing=Mean(), rank=4, targets=rw.Targets(("q_proj", "down_proj")))
    return perturb(rw.adapt(llama(**changes), recipe), size=1.0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def near(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert left.keys() == right.keys()
    assert left
    for name, want in right.items():
        assert (left[name] - want).abs().max() <= tolerance * want.abs().max() + 1e-12, name


IDS = token_ids(rows=3, length=8)
LABELS = IDS.clone()
LABELS[0, :3] = LABELS[1, :5] = LABELS[2, :2] = -100
TYPES = torch.tensor([0, 1, 1])


# --- facts of the batch ----------------------------------------------------------------------------------------------------------------


def test_facts_are_read_from_the_call_and_taken_out_of_it() -> None:
    """The model itself never sees sample_types, prompt_mask or task: an unknown keyword would be an error in a plain module."""
    seen: list[BatchContext] = []

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(current())  # type: ignore[arg-type]
            return self.first(x)

    model = rw.adapt(Plain(), Recipe(update=Probe(), rank=2)).train()
    x, prompt = torch.randn(2, 5, 6), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    model(x, sample_types=TYPES[:2], prompt_mask=prompt, task="a")
    (context,) = seen
    assert (context.batch, context.length, context.phase, context.task) == (2, 5, "train", "a")
    assert torch.equal(context.types, TYPES[:2])
    assert torch.equal(context.prompt, prompt.bool())
    assert current() is None
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 7))
    assert current() is None  # also after an error
    model.eval()(x)
    assert seen[-1].phase == "prefill"


def test_prompt_tokens_end_at_the_first_label_and_leave_padding_out() -> None:
    labels = torch.tensor([[-100, -100, 5, -100, 6], [-100, 4, 4, -100, -100], [-100, -100, -100, -100, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    wanted = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()
    assert torch.equal(prompt_tokens(labels, mask), wanted)
    model = gated()
    assert takes_context(model)
    assert torch.equal(facts_of(model, {"labels": labels, "attention_mask": mask})["prompt_mask"], wanted)
    assert facts_of(llama(), {"labels": labels}) == {}


def test_masks_of_four_dimensions_give_the_same_tokens() -> None:
    plain = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()
    longest = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]).bool()
    four = longest[:, None, None] & torch.ones(4, 6).tril().bool()
    additive = torch.zeros(2, 1, 4, 6).masked_fill(~four, torch.finfo(torch.float32).min)
    for mask in (plain.long(), four, additive, {"full_attention": four}):
        assert torch.equal(valid_tokens(mask, 4), plain)
    with pytest.raises(TrainingError, match=r"attention_mask is .*give a \(batch, length\) mask"):
        valid_tokens({"sliding_attention": four}, 4)


# --- losses inside the graph -----------------------------------------------------------------------------------------------------------


def test_an_attached_loss_has_the_gradient_of_a_loss_that_was_added() -> None:
    """Against the plain way of doing it: collect the losses and add them, in the same model."""
    collected: list[Tensor] = []
    model = probed().train()
    model(input_ids=IDS, labels=LABELS, sample_types=TYPES).loss.backward()
    got = gradients(model)
    for module in adapted_sites(model).values():
        core = type(module.update).token_core

        def collecting(x: Tensor, h: Tensor, core: Any = core, update: Any = module.update) -> Tensor:
            collected.append(WEIGHT * (h.float().square().mean((1, 2)) * (1 + TYPES)).mean())
            return h * (1 + 0.5 * TYPES[:, None, None]).to(h.dtype)

        module.update.token_core = collecting
    loss = model(input_ids=IDS, labels=LABELS, sample_types=TYPES).loss
    assert len(collected) == 4
    (loss + sum(collected)).backward()
    near(got, gradients(model), 1e-5)
    mean = model.rankwise.meter.take()["probe"]
    assert mean == pytest.approx(sum(float(one.detach()) for one in collected), rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [probed, gated])
def test_two_forwards_before_a_backward_under_checkpointing(make: Any, reentrant: bool) -> None:
    """Trap 2: the recomputed blocks see the facts and routes of their own forward, and no attached loss is lost or doubled."""
    model = make().train()
    other = token_ids(rows=3, length=8, seed=9)

    def backward() -> dict[str, Tensor]:
        first = model(input_ids=IDS, labels=LABELS, sample_types=TYPES).loss
        second = model(input_ids=other, labels=LABELS.flip(0), sample_types=1 - TYPES).loss
        (first * 2 + second / 3).backward()
        return gradients(model)

    wanted = backward()
    meter = model.rankwise.meter
    said = meter.take()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    if reentrant and make is gated:
        with pytest.raises(TrainingError, match="use_reentrant"):
            backward()
        return
    near(backward(), wanted, 1e-5)
    again = meter.take()
    assert again.keys() == said.keys()
    for name, value in said.items():
        assert again[name] == pytest.approx(value, rel=1e-5)


def test_the_scale_of_an_attached_loss_follows_the_main_loss() -> None:
    """Accumulation, a GradScaler's factor, a sum over the step's tokens: whatever the main loss gets."""
    model = probed().train()
    model(input_ids=IDS, labels=LABELS, sample_types=TYPES).loss.backward()
    whole = gradients(model)
    (model(input_ids=IDS, labels=LABELS, sample_types=TYPES).loss * 1024 / 4).backward()
    near({name: grad / 256 for name, grad in gradients(model).items()}, whole, 1e-5)
    count = int((LABELS[:, 1:] != -100).sum())
    model(input_ids=IDS, labels=LABELS, sample_types=TYPES, num_items_in_batch=torch.tensor(4 * count)).loss.backward()
    near({name: grad * 4 for name, grad in gradients(model).items()}, whole, 1e-5)
    # no loss in the output: the caller's own, at a scale that the caller gives
    set_auxiliary_scale(model, 0.25)
    logits = model(input_ids=IDS, sample_types=TYPES).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()).div(4).backward()
    near({name: grad * 4 for name, grad in gradients(model).items()}, whole, 1e-5)
    out = model(input_ids=IDS, labels=LABELS, sample_types=TYPES, return_dict=False)
    out[0].backward()
    near(gradients(model), whole, 1e-5)


def test_evaluation_attaches_nothing_and_a_step_reports_the_mean_over_its_forwards() -> None:
    model = probed()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert model.rankwise.meter.take() == {}
    gradients(model)
    optimizer = rw.optimizer(model.train(), lr=0.0)
    means = []
    for types in (TYPES, 1 - TYPES):
        model(input_ids=IDS, labels=LABELS, sample_types=types).loss.backward()
        means.append(float(model.rankwise.meter.totals["probe"]) - sum(means))
    optimizer.step()
    assert optimizer.rankwise_session.report()["routing_probe"] == pytest.approx(sum(means) / 2, rel=1e-5)  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer.rankwise_session.report() == {}  # type: ignore[attr-defined]


# --- gates at blocks -------------------------------------------------------------------------------------------------------------------


def test_a_gate_multiplies_the_whole_update_of_each_site_of_its_block() -> None:
    model = gated()
    layer = model.model.layers[1]
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        return lambda module, args, output: seen.update({f"{name}.x": args[0], f"{name}.y": output})

    layer.register_forward_hook(lambda module, args, output: seen.update(hidden=args[0]))
    layer.self_attn.q_proj.register_forward_hook(look("q"))
    layer.mlp.down_proj.register_forward_hook(look("down"))
    with torch.no_grad():
        model(input_ids=IDS)
        c = torch.sigmoid(seen["hidden"].mean(1) @ layer.rankwise_gate.router.T)
        for column, (name, module) in enumerate((("q", layer.self_attn.q_proj), ("down", layer.mlp.down_proj))):
            x, factors = seen[f"{name}.x"], module.update.factors()
            wanted = module.base_layer(x) + c[:, column, None, None] * (x @ factors.delta().T)
            torch.testing.assert_close(seen[f"{name}.y"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", ["lora", "moslora", "vera"])
def test_a_closed_gate_is_the_true_base_whatever_the_start(update: str, dtype: torch.dtype) -> None:
    """c = 0 leaves the base, to the bit, also where the start moved away from zero: its frozen half is multiplied too."""
    init = "own" if update == "vera" else "pissa"
    recipe = Recipe().replace(update=update, init=init, routing=Mean(), rank=4, targets=["q_proj", "k_proj", "down_proj"])
    base = llama(dtype=dtype)
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        model = perturb(rw.adapt(base, recipe), size=1.0)
        assert (model(input_ids=IDS).logits - before).abs().max() > 1e-2
        for layer in model.model.layers:
            layer.rankwise_gate.forward = lambda hidden, context: hidden.new_zeros(len(hidden), 3)
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_a_gate_is_counted_grouped_saved_loaded_and_taken_off(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTINGS, "mean", Mean)
    base, fresh = llama(), llama()
    before = base(input_ids=IDS).logits
    plan = rw.plan(base, Recipe(routing=Mean(), rank=4, targets=rw.Targets(("q_proj", "down_proj"))))
    assert [(block.name, block.width, len(block.sites)) for block in plan.blocks] == [("model.layers.0", 32, 2), ("model.layers.1", 32, 2)]
    assert "a gate on each block" in str(plan)
    model = gated()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trained_parameters
    assert sum(row.parameters for row in rw.summary(model)) == plan.trained_parameters
    roles = {name: role for name, (role, _) in roles_of(model).items()}
    assert roles["model.layers.0.rankwise_gate.router"] == "gate"
    optimizer = rw.optimizer(model, lr=1e-2, weight_decay=0.5)
    (group,) = (group for group in optimizer.param_groups if group["role"] == "gate")
    assert len(group["params"]) == 2
    router = group["params"][0].detach().clone()
    model(input_ids=IDS).logits.sum().mul(0).backward()
    optimizer.step()  # gradients of zero: only decay could move it
    assert torch.equal(group["params"][0], router)
    model.train()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert all(parameter.grad.any() for parameter in group["params"])
    optimizer.step()
    optimizer.rankwise_session.check_alive()  # type: ignore[attr-defined]
    model.eval()
    rw.save(model, tmp_path / "adapter")
    again = rw.load(fresh, tmp_path / "adapter")
    wanted = model(input_ids=IDS).logits
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    with rw.disabled(model):
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    with pytest.raises(rw.RankwiseError, match="cannot be merged: its update depends on the prompt"):
        rw.merge(model)
    rw.unadapt(model)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert not any(hasattr(module, "rankwise_gate") for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("make", [probed, gated])
def test_copies_and_pickles_route_by_themselves(make: Any) -> None:
    """Trap 7: hooks are no closures."""
    model = make().train()
    model(input_ids=IDS, labels=LABELS, sample_types=TYPES).loss.backward()
    model.zero_grad(set_to_none=True)
    copies = [copy.deepcopy(model)]
    if make is gated:  # a class of this file pickles by name, too
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        copies.append(torch.load(stream, weights_only=False))
    wanted = model.eval()(input_ids=IDS).logits
    for other in copies:
        assert torch.equal(other.eval()(input_ids=IDS).logits, wanted)
        perturb(other, seed=11)
        assert not torch.equal(other(input_ids=IDS).logits, wanted)
        assert torch.equal(model(input_ids=IDS).logits, wanted)
        assert not takes_context(rw.unadapt(other))
    assert open_context in model._forward_pre_hooks.values()


def test_a_part_called_on_its_own_or_checkpointed_by_hand_is_refused() -> None:
    """Where the facts would be those of another forward, or nobody's."""
    from torch.utils.checkpoint import checkpoint

    model = gated().train()
    with pytest.raises(TrainingError, match="call the model itself"):
        model.model(input_ids=IDS)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x))

    class Stack(nn.Module):
        """Checkpoints its blocks with torch's own function, so that the recomputation comes after the forward."""

        def __init__(self, layers: Sequence[nn.Module]) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    stack = rw.adapt(Stack([Layer() for _ in range(2)]), Recipe(routing=Mean(), rank=2)).train()
    y = stack(torch.randn(2, 5, 6, requires_grad=True))
    with pytest.raises(TrainingError, match="checkpoint the whole model or use gradient_checkpointing_enable"):
        y.sum().backward()


def test_where_gates_cannot_stand() -> None:
    with pytest.raises(rw.RankwiseError, match="lies in no transformer block"):
        rw.plan(llama(), Recipe(routing=Mean(), rank=4, targets=rw.Targets(("lm_head", "q_proj"))))
    stack = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(6, 6))])})
    with pytest.raises(rw.RankwiseError, match="is a Sequential, which would run or hold the gate"):
        rw.plan(stack, Recipe(routing=Mean(), rank=2))
