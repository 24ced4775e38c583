"""CorDA: components of the weight times the covariance of its inputs, from dense decompositions in fp64."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_models import relative
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from rich.console import Console
from tiny_models import Attention, gpt2, llama, logits, token_ids
from torch import Tensor, nn
from training_models import make_world, plain_config

import rankwise as rw
from rankwise import calibration as module_under_test
from rankwise.calibration import beginnings
from rankwise.errors import CalibrationError, ConfigError, RecipeError
from rankwise.inits import Corda, MinorComponents, Pissa, Statistics, site_generator
from rankwise.planning import plan
from rankwise.sites import adapted_sites
from rankwise.taps import Sum
from rankwise.updates import Site

RANK = 4
DOUBLE = torch.float64
SHAPES = [(24, 40), (40, 24), (32, 32)]
MODES: list[Any] = ["ipm", "kpm"]


def rows(width: int, tokens: int = 200, seed: int = 3) -> Tensor:
    """(tokens, width) in fp64, well conditioned but far from white."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=DOUBLE)).Q
    return torch.randn(tokens, width, generator=generator, dtype=DOUBLE) @ (mix * torch.linspace(0.3, 3, width, dtype=DOUBLE)) @ mix.T


def weight_of(out: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) / width**0.5


def statistics(x: Tensor) -> Statistics:
    c = x.T @ x / x.shape[0]
    return Statistics(x.shape[0], covariance=c, energy=float(c.trace()))


def begin(weight: Tensor, given: Statistics, rank: int = RANK, alpha: float = 10.0, **options: Any) -> tuple[Tensor, Tensor, float]:
    """(down, up, scaling) of a start."""
    place = Site("proj", "linear", weight.shape[1], weight.shape[0], rank, alpha / rank)
    begun = Corda(**options).begin(place, weight, given, site_generator(0, "proj"))
    assert begun.down is not None
    assert begun.up is not None
    return begun.down, begun.up, alpha / rank


def batch(count: int = 4, length: int = 15, seed: int = 1) -> dict[str, Tensor]:
    ids = token_ids(count, length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gathered(model: nn.Module, batches: list[dict[str, Tensor]], budget: int = 2**30, **options: Any) -> dict[str, Statistics]:
    """Site name -> the statistics that its init gets."""
    found: dict[str, Statistics] = {}

    class Recording(Corda):
        def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Any:
            assert statistics is not None
            found[site.name] = statistics
            return super().begin(site, weight, statistics, generator)

    recipe = rw.recipes.corda(rank=RANK).replace(init=Recording(**options))
    beginnings(model, recipe, plan(model, recipe).sites, batches, budget)
    return found


# --- the start -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("corda", 1)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_white_inputs_it_is_pissa_and_milora(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    white = Statistics(999, covariance=torch.eye(shape[1], dtype=DOUBLE), energy=float(shape[1]))
    place = Site("proj", "linear", shape[1], shape[0], RANK, 2.5)
    for mode, other in (("ipm", Pissa()), ("kpm", MinorComponents())):
        expected = other.begin(place, weight, None, site_generator(0, "proj"))
        down, up, _ = begin(weight, white, mode=mode, balance="official")
        torch.testing.assert_close(down, expected.down, rtol=0, atol=1e-10)
        torch.testing.assert_close(up, expected.up, rtol=0, atol=1e-10)


@pytest.mark.check("corda", 2)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("balance", ["norm", "official"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_a_projection_of_the_weight(shape: tuple[int, int], balance: Any, mode: Any) -> None:
    weight, given = weight_of(*shape), statistics(rows(shape[1]))
    down, up, scaling = begin(weight, given, mode=mode, balance=balance)
    assert given.covariance is not None
    u = torch.linalg.svd(weight @ given.covariance, full_matrices=False).U
    u = u[:, :RANK] if mode == "ipm" else u[:, -RANK:]
    torch.testing.assert_close(scaling * up @ down, u @ u.T @ weight, rtol=0, atol=1e-11)


def official(weight: Tensor, c: Tensor, mode: str, scaling: float) -> tuple[Tensor, Tensor]:
    """(down, up) through the inverse, as the paper and the official code write it."""
    u, s, vt = torch.linalg.svd(weight @ c, full_matrices=False)
    picked = slice(0, RANK) if mode == "ipm" else slice(len(s) - RANK, len(s))
    v = vt @ torch.linalg.inv(c)
    return (s[picked] / scaling).sqrt()[:, None] * v[picked], u[:, picked] * (s[picked] / scaling).sqrt()


@pytest.mark.check("corda", 3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_identity_gives_what_the_inverse_gives(shape: tuple[int, int], damping: float, mode: Any) -> None:
    weight, given = weight_of(*shape), statistics(rows(shape[1]))
    assert given.covariance is not None
    c = given.covariance + damping * given.covariance.diagonal().mean() * torch.eye(shape[1], dtype=DOUBLE)
    down, up, scaling = begin(weight, given, mode=mode, balance="official", damping=damping)
    expected_down, expected_up = official(weight, c, mode, scaling)
    # the order of kpm's components is the other way round
    order = slice(None) if mode == "ipm" else torch.arange(RANK - 1, -1, -1)
    expected_down, expected_up = expected_down[order], expected_up[:, order]
    signs = (up * expected_up).sum(0).sign()
    assert relative(up, expected_up * signs) < 1e-6
    assert relative(down, expected_down * signs[:, None]) < 1e-6


@pytest.mark.check("corda", 3)
def test_only_the_identity_survives_a_covariance_of_low_rank() -> None:
    weight, given = weight_of(32, 48), statistics(rows(48, tokens=6))
    assert given.covariance is not None
    down, up, scaling = begin(weight, given)
    u = torch.linalg.svd(weight @ given.covariance).U[:, :RANK]
    torch.testing.assert_close(scaling * up @ down, u @ u.T @ weight, rtol=0, atol=1e-11)
    try:
        by_inverse = official(weight, given.covariance, "ipm", scaling)
        wrong = scaling * by_inverse[1] @ by_inverse[0]
    except torch.linalg.LinAlgError:
        return
    assert relative(wrong, u @ u.T @ weight) > 1e-6


@pytest.mark.check("corda", 4)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", ["keep", "fold"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_start_is_the_base(make: Any, base: str, mode: Any) -> None:
    model, ids = make(), token_ids()
    before = logits(model, ids)
    damping = 0.01 if mode == "kpm" else 0.0  # 60 tokens are fewer than the 128 inputs of GPT-2's last layer
    rw.adapt(model, rw.recipes.corda(rank=RANK, mode=mode, base=base, damping=damping), calibration=[batch()])
    assert relative(logits(model, ids), before) <= (0 if base == "keep" else 1e-5)
    assert all(module.offset is not None and bool(module.offset.up.any()) for module in adapted_sites(model).values())


# --- the covariance --------------------------------------------------------------------------------------------------------------------


def watched_inputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Site name -> all its inputs that are no padding, (tokens, in), in fp64."""
    seen: dict[str, list[Tensor]] = {}
    kept: list[Tensor] = []
    names = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [m.register_forward_hook(lambda m, x, y: seen.setdefault(names[m], []).append(x[0][kept[0]].double())) for m in names]
    for b in batches:
        kept[:] = [b["attention_mask"].bool()]
        with torch.no_grad():
            model(**b)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.check("corda", 5)
@pytest.mark.parametrize("budget", [1, 30_000, 2**30])
def test_chunks_batch_shapes_and_padding_give_the_same_covariance(budget: int) -> None:
    model = llama()
    whole = batch(4, 15)
    single = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(4)]
    filler = torch.full((4, 6), 5)
    padded = {
        "input_ids": torch.cat([whole["input_ids"], filler], 1),
        "attention_mask": torch.cat([whole["attention_mask"], torch.zeros_like(filler)], 1),
    }
    exact = watched_inputs(model, [whole])
    for data in ([whole], single, [padded]):
        found = gathered(model, data, budget)
        for name, given in found.items():
            x, weight = exact[name], model.get_submodule(name).weight.double()
            c = x.T @ x / len(x)
            assert given.tokens == len(x) == 60
            assert given.energy == pytest.approx(float(c.trace()), rel=1e-4)
            if given.product is None:
                assert given.covariance is not None
                assert relative(given.covariance.double(), c) < 1e-4
            else:
                assert relative(given.product.double(), weight @ c) < 1e-4


@pytest.mark.check("corda", 5)
def test_the_product_is_gathered_where_it_is_smaller() -> None:
    model = llama()  # intermediate 48, hidden 32
    found = gathered(model, [batch()])
    assert {name.rpartition(".")[2] for name, given in found.items() if given.product is not None} == {"down_proj"}
    assert all((given.product is None) != (given.covariance is None) for given in found.values())
    by_covariance = gathered(llama(), [batch()], mode="kpm")  # whose small end the rounding of the outputs would drown
    for name, given in found.items():
        c = by_covariance[name].covariance
        assert c is not None
        if given.product is not None:
            assert relative(given.product, model.get_submodule(name).weight.detach() @ c) < 1e-4


@pytest.mark.check("corda", 6)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("c", [0.01, 7.0])
def test_larger_inputs_leave_the_product_and_move_only_the_official_balance(mode: Any, c: float) -> None:
    weight, x = weight_of(24, 40), rows(40)
    for balance in ("official", "norm"):
        down, up, _ = begin(weight, statistics(x), mode=mode, balance=balance)
        down_c, up_c, _ = begin(weight, statistics(c * x), mode=mode, balance=balance)
        torch.testing.assert_close(up_c @ down_c, up @ down, rtol=0, atol=1e-11)
        grown = c if balance == "official" else 1.0
        torch.testing.assert_close(up_c, grown * up, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(down_c, down / grown, rtol=1e-8, atol=1e-10)
        if balance == "norm":
            assert float(down.norm()) == pytest.approx(float(up.norm()), rel=1e-10)


@pytest.mark.check("corda", 7)
@pytest.mark.parametrize("shape", SHAPES)
def test_kpm_takes_what_the_data_needs_least(shape: tuple[int, int]) -> None:
    weight, given = weight_of(*shape), statistics(rows(shape[1]))
    assert given.covariance is not None
    m = weight @ given.covariance
    _, up, _ = begin(weight, given, mode="kpm")
    u = torch.linalg.qr(up).Q

    def lost(directions: Tensor) -> float:
        return float((directions.T @ m).norm())

    s = torch.linalg.svdvals(m)
    assert lost(u) == pytest.approx(float(s[-RANK:].square().sum().sqrt()), rel=1e-6)
    generator = torch.Generator().manual_seed(1)
    column_space = torch.linalg.svd(m, full_matrices=False).U  # for out > in, what lies outside of it is lost for nothing
    for _ in range(20):
        inside = torch.linalg.qr(torch.randn(column_space.shape[1], RANK, generator=generator, dtype=DOUBLE)).Q
        assert lost(u) < lost(column_space @ inside)
    minor = torch.linalg.svd(weight, full_matrices=False).U[:, -RANK:]
    assert lost(u) < 0.9 * lost(minor)


@pytest.mark.check("corda", 8)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_modes_take_orthogonal_directions(shape: tuple[int, int]) -> None:
    weight, given = weight_of(*shape), statistics(rows(shape[1]))
    top, bottom = (torch.linalg.qr(begin(weight, given, mode=mode)[1]).Q for mode in MODES)
    assert float((top.T @ bottom).abs().max()) < 1e-9


LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tiny_models import llama, logits, token_ids
import rankwise as rw
from rankwise.inits import Corda
Corda.begin = None
torch.save(logits(rw.load(llama(), sys.argv[2] + "/a"), token_ids()), sys.argv[2] + "/logits.pt")
"""


@pytest.mark.check("corda", 9)
def test_a_new_process_loads_it_without_calibration_data(tmp_path: Path) -> None:
    model = rw.adapt(llama(), rw.recipes.corda(rank=RANK), calibration=[batch()])
    optimizer, ids = rw.optimizer(model, lr=1e-2), token_ids()
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rw.save(model, tmp_path / "a")
    subprocess.run([sys.executable, "-c", LOAD, str(Path(__file__).parent), str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(model, ids))


@pytest.mark.check("corda", 10)
def test_sites_that_read_one_input_share_one_accumulator(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Sum] = []

    class Counted(Sum):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(module_under_test, "Sum", Counted)
    found = gathered(llama(num_hidden_layers=1), [batch()])
    assert len(found) == 7
    assert len(made) == 4  # q k v | o | gate up | down
    q, k, v, gate, up = (
        found[f"model.layers.0.{name}"]
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    )
    assert q.covariance is k.covariance is v.covariance is not None
    assert gate.covariance is up.covariance is not q.covariance
    assert q.tokens == 60  # counted once


def test_names_alone_do_not_make_an_input_shared() -> None:
    class Misnamed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(2 * x)], dim=-1)

    model = Misnamed()
    x = rows(16, 50)
    found = gathered(model, [{"x": x}])
    assert found["q_proj"].covariance is found["k_proj"].covariance
    for name, factor in (("q_proj", 1), ("v_proj", 4)):
        given, weight = found[name], model.get_submodule(name).weight.detach()
        expected = factor * x.T @ x / 50
        if given.covariance is None:
            torch.testing.assert_close(given.product, weight @ expected, rtol=0, atol=1e-10)
        else:
            torch.testing.assert_close(given.covariance, expected, rtol=0, atol=1e-10)


# --- bad input -------------------------------------------------------------------------------------------------------------------------


def test_bad_calibration_data_is_refused_with_the_remedy() -> None:
    broken = llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[:] = torch.inf
    cases: list[tuple[Any, Any, Any, str]] = [
        (rw.recipes.corda(rank=RANK), llama(), None, r"calibration is missing.*calibration=\[batch, ...\]"),
        (rw.recipes.corda(rank=8), llama(), [batch(1, 5)], r"saw 5 calibration tokens, fewer than rank=8.*calibration_rows"),
        (
            rw.recipes.corda(rank=4, mode="kpm"),
            llama(),
            [batch(2, 10)],
            r"saw 20 calibration tokens, fewer than its 32 inputs.*damping=0.01",
        ),
        (rw.recipes.corda(rank=RANK), broken, [batch()], "are not finite"),
    ]
    for recipe, model, data, message in cases:
        with pytest.raises(CalibrationError, match=message):
            rw.adapt(model, recipe, calibration=data)
        assert not adapted_sites(model)
    rw.adapt(llama(), rw.recipes.corda(rank=4, mode="kpm", damping=0.01), calibration=[batch(2, 10)])
    with pytest.raises(RecipeError, match="damping=-1"):
        rw.recipes.corda(damping=-1)
    with pytest.raises(CalibrationError, match="gives zero for all calibration inputs"):
        begin(torch.zeros(8, 8, dtype=DOUBLE), statistics(rows(8)))


def test_components_that_the_data_does_not_excite_are_finite_and_said() -> None:
    weight = weight_of(24, 24)
    x = rows(24, 100)
    x[:, 10:] = 0
    begun = Corda(mode="kpm").begin(Site("p", "linear", 24, 24, RANK, 1.0), weight, statistics(x), site_generator(0, "p"))
    assert begun.notes == ("4 components are not excited by the calibration data",)
    assert begun.down is not None
    assert begun.up is not None
    u = torch.linalg.qr(begun.up).Q
    torch.testing.assert_close(begun.up @ begun.down, u @ u.T @ weight, rtol=0, atol=1e-8)


# --- rankwise train ----------------------------------------------------------------------------------------------------------------------


def test_rankwise_train_calibrates_on_rows_of_its_own(tmp_path: Path) -> None:
    from rankwise.training.forecast import forecast
    from rankwise.training.run import train

    world = make_world(tmp_path)
    config = plain_config(world, "completion", tmp_path / "r", method={"name": "corda", "calibration_rows": 10}, train={"steps": 1})
    console = Console(file=io.StringIO(), width=200)
    result = train(config, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Calibrating on 10 of 24 training rows, 3 batches" in text
    assert result.after != result.before
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert "Calibration  10 training rows in 3 batches, once, before the first step" in forecast(path)
    assert "calibration runs before training (covariance): 10 rows" in " ".join(forecast(path).split())
    few = plain_config(world, "completion", tmp_path / "s", rank=16, method={"name": "lora-ga", "calibration_rows": 1})
    with pytest.raises(CalibrationError, match="calibration_rows"):
        train(few, console=console)
    with pytest.raises(ConfigError, match="method 'lora' has no option 'calibration_rows'"):
        train(plain_config(world, "completion", tmp_path / "t", method={"name": "lora", "calibration_rows": 1}), console=console)


# --- PEFT ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [4, 10])
@pytest.mark.parametrize("mode", MODES)
def test_the_official_form_is_pefts(mode: Any, alpha: int) -> None:
    """PEFT takes rows one by one; ours come as one batch, with padding."""
    targets = ["q_proj", "k_proj", "down_proj"]
    ids = [token_ids(1, length, seed=length) for length in (30, 20, 40)]
    theirs = llama()
    corda = CordaConfig(corda_method=mode, prune_temporary_fields=False)
    config = LoraConfig(r=RANK, lora_alpha=alpha, init_lora_weights="corda", target_modules=targets, corda_config=corda)
    preprocess_corda(theirs, config, run_model=lambda: [theirs(input_ids=row) for row in ids] and None)
    covariances = {name: m.covariance_matrix for name, m in theirs.named_modules() if hasattr(m, "covariance_matrix")}
    theirs = get_peft_model(theirs, config)

    padded = torch.zeros(3, 40, dtype=torch.long)
    for number, row in enumerate(ids):
        padded[number, : row.shape[1]] = row
    mask = torch.tensor([[1] * n + [0] * (40 - n) for n in (30, 20, 40)])
    data = [{"input_ids": padded, "attention_mask": mask}]
    options: dict[str, Any] = {"mode": mode, "balance": "official", "damping": 0.01, "normalize": "sample"}
    found = gathered(llama(), data, **options)
    ours = rw.adapt(llama(), rw.recipes.corda(rank=RANK, alpha=alpha, targets=targets, **options), calibration=data)
    for name, module in adapted_sites(ours).items():
        c = found[name].covariance
        assert c is not None
        assert relative(c, covariances[name]) < 1e-4
        layer = theirs.base_model.model.get_submodule(name)
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        update: Any = module.update
        down, up = update.down.detach(), update.up.detach()
        order = slice(None) if mode == "ipm" else torch.arange(RANK - 1, -1, -1)
        a, b = a[order], b[:, order]
        signs = (up * b).sum(0).sign()
        assert relative(up, b * signs) < 1e-3, name
        assert relative(down, a * signs[:, None]) < 1e-3, name
        assert relative(up @ down, b @ a) < 1e-3
