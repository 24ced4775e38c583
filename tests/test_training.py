"""The training run: what is trained on, resuming bit for bit, and everything that can go wrong in between."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from training_models import make_world, plain_config, silent_console, write_rows

from rankwise.errors import CheckpointError, ConfigError, DataError, TargetError, TrainingError
from rankwise.recipes import RECIPES
from rankwise.training.config import make_config
from rankwise.training.run import Result, total_steps, train

CAUSAL, CLASSES = "completion", "classification"
WATCHED = ("metrics.jsonl", "results.json", "adapter/adapter_model.safetensors", "checkpoints/checkpoint-5/trainable.safetensors")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


class Stopped(Exception):
    """Stands for whatever ends a process."""


def run(config: dict[str, Any], **options: Any) -> Result:
    return train(config, console=silent_console(), **options)


def cut_short(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, micro_step: int) -> None:
    """Runs until the given forward, counted from 1, and stops there without any farewell."""
    from rankwise.training.trainers import RankwiseTrainer

    step, count = RankwiseTrainer.training_step, 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == micro_step:
            raise Stopped
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RankwiseTrainer, "training_step", counted)
        with pytest.raises(Stopped):
            run(config)


def assert_same(one: Path, other: Path) -> None:
    for name in WATCHED:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what is trained on ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "batch", "accumulate"), [(CAUSAL, 24, 1), (CAUSAL, 4, 6), (CLASSES, 24, 1), (CLASSES, 4, 6)])
def test_the_trainers_loss_is_the_mean_over_our_own_labels(world: Path, tmp_path: Path, task: str, batch: int, accumulate: int) -> None:
    # one step over all rows, from a start that equals the base: its loss is the base's loss, which our own loop measured
    result = run(plain_config(world, task, tmp_path / "r", train={"steps": 1, "batch_size": batch, "accumulate": accumulate}))
    step = lines(result.run / "metrics.jsonl")[0]
    assert step["loss"] == pytest.approx(result.before["task"]["loss"], rel=1e-5)


@pytest.mark.parametrize("task", [CAUSAL, CLASSES])
def test_an_accumulated_gradient_is_that_of_one_batch(world: Path, tmp_path: Path, task: str) -> None:
    # a loss may be right where the gradients of several batches are added and not averaged
    norms = []
    for batch, accumulate in ((24, 1), (4, 6)):
        made = run(plain_config(world, task, tmp_path / f"{batch}", train={"steps": 1, "batch_size": batch, "accumulate": accumulate}))
        norms.append(lines(made.run / "metrics.jsonl")[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_rate_follows_warmup_and_schedule(world: Path, tmp_path: Path) -> None:
    steps, warmup, lr = 7, 2, 1e-2
    wanted = {
        "cosine": [
            lr * step / warmup if step < warmup else lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
            for step in range(7)
        ],
        "linear": [lr * step / warmup if step < warmup else lr * (steps - step) / (steps - warmup) for step in range(7)],
        "constant": [lr * min(1.0, step / warmup) for step in range(7)],
    }
    for name, rates in wanted.items():
        made = run(plain_config(world, CAUSAL, tmp_path / name, train={"steps": steps, "warmup": warmup, "schedule": name, "lr": lr}))
        assert [line["lr"] for line in lines(made.run / "metrics.jsonl")] == pytest.approx(rates, rel=1e-6, abs=1e-12), name


def test_the_steps_of_a_run_count_the_smaller_last_one(world: Path, tmp_path: Path) -> None:
    def steps(rows: int, **given: Any) -> int:
        return total_steps(
            make_config(plain_config(world, CAUSAL, tmp_path, train={"steps": None, "batch_size": 4, "accumulate": 3, **given})), rows
        )

    # 25 rows: 7 batches, the last one of a single row; 3 steps, the last one of a single batch
    assert [steps(rows, epochs=1) for rows in (1, 12, 13, 24, 25)] == [1, 1, 2, 2, 3]
    assert steps(25, epochs=2) == 6
    assert steps(25, epochs=0.5) == 2
    assert steps(25, epochs=0.01) == 1
    assert steps(25, epochs=2, steps=5) == 5


def test_trl_gets_exactly_the_ids_and_labels_made_here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.training.causal import CausalTrainer
    from rankwise.training.models import load_tokenizer
    from rankwise.training.prepare import prepare

    seen: list[tuple[list[int], list[int]]] = []
    inner = CausalTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True):
            seen.append((ids[mask.bool()].tolist(), labels[mask.bool()].tolist()))
        return inner(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CausalTrainer, "compute_loss", watched)
    config = plain_config(world, CAUSAL, tmp_path / "r", train={"steps": 3})
    run(config)
    encoded = prepare(make_config(config), load_tokenizer(world / "llama")[0]).train
    assert sorted(seen) == sorted(zip(encoded.input_ids, encoded.labels, strict=True))  # 3 x 2 x 4 rows: one whole pass
    assert all(-100 in labels and labels[-1] == 2 for _, labels in seen)


def test_an_adapter_on_the_output_head_trains(world: Path, tmp_path: Path) -> None:
    # TRL's loss reads the head's weight past the adapter; with it this run would end with "never received a gradient"
    result = run(plain_config(world, CAUSAL, tmp_path / "r", targets=["lm_head"], train={"lr": 0.05}))
    assert result.after["task"]["loss"] < result.before["task"]["loss"] - 0.05


def test_mixed_precision_and_checkpointing_train_the_same_way(world: Path, tmp_path: Path) -> None:
    plain = run(plain_config(world, CAUSAL, tmp_path / "plain"))
    again = run(plain_config(world, CAUSAL, tmp_path / "again", train={"checkpointing": True}))
    assert (plain.adapter / "adapter_model.safetensors").read_bytes() == (again.adapter / "adapter_model.safetensors").read_bytes()
    half = run(plain_config(world, CAUSAL, tmp_path / "half", train={"precision": "bf16"}))
    assert half.after["task"]["loss"] == pytest.approx(plain.after["task"]["loss"], abs=0.02)
    assert half.after["task"]["loss"] != plain.after["task"]["loss"]


def test_a_run_leaves_everything_that_defines_it(world: Path, tmp_path: Path) -> None:
    general = {"train": str(world / "rows.jsonl"), "eval": str(world / "rows.jsonl"), "general": str(world / "general.jsonl")}
    result = run(plain_config(world, CAUSAL, tmp_path / "r", data=general, train={"eval_every": 2}))
    assert {"task", "general"} == set(result.before) == set(result.after)
    assert result.after["task"]["loss"] < result.before["task"]["loss"]
    metrics = lines(result.run / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in metrics if "eval_task_loss" in line] == [2, 4, 5]  # and after the last one
    assert not any("second" in key or "time" in key for line in metrics for key in line)
    assert [line["step"] for line in lines(result.run / "timing.jsonl")] == [1, 2, 3, 4, 5]
    assert {"python", "torch", "transformers", "trl", "rankwise", "platform"} <= set(
        json.loads((result.run / "run.json").read_text())["versions"]
    )
    assert "all-linear" in (result.run / "plan.txt").read_text()
    assert json.loads((result.run / "data.json").read_text())["train"]["rows"] == 24
    assert json.loads((result.adapter / "training.json").read_text())["task"] == CAUSAL


def test_checkpoints_hold_what_trains_and_never_the_base(world: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    result = run(plain_config(world, CLASSES, tmp_path / "r"))
    folders = sorted(path.name for path in result.run.checkpoints.iterdir())
    assert folders == ["checkpoint-4", "checkpoint-5"]  # the last two
    checkpoint = result.run.checkpoints / "checkpoint-5"
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == sorted(
        [
            "adapter",
            "optimizer.pt",
            "rng_state.pth",
            "scheduler.pt",
            "session.json",
            "session.safetensors",
            "trainable.safetensors",
            "trainer_state.json",
        ]
    )
    for file in (checkpoint / "trainable.safetensors", checkpoint / "adapter/adapter_model.safetensors"):
        assert not [key for key in load_file(file) if "embeddings" in key or "base_layer" in key]


def test_the_head_of_a_classifier_starts_from_the_seed(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = run(plain_config(world, CLASSES, tmp_path / "one"))
    torch.manual_seed(2)
    two = run(plain_config(world, CLASSES, tmp_path / "two"))
    other = run(plain_config(world, CLASSES, tmp_path / "other", seed=1))
    assert one.before == two.before
    assert one.after == two.after
    assert other.before != one.before
    assert "trained in full: classifier, 66 parameters" in (one.run / "plan.txt").read_text()


# --- resuming ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resumes_bit_for_bit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    recipe = RECIPES[name]()  # neither a folded start nor a schedule that writes into the base allows dropout
    dropout = 0.1 if recipe.base == "keep" and not recipe.schedule.rewrites_base else 0.0
    # these rows have no kinds, without which the balance loss cannot tell what to balance
    method = {"name": name, "delta": 0} if recipe.update.missing_fact() else name
    changes = {"method": method, "dropout": dropout, "targets": ["q_proj", "v_proj", "down_proj"]}
    whole = run(plain_config(world, CAUSAL, tmp_path / "whole", **changes))
    config = plain_config(world, CAUSAL, tmp_path / "cut", **changes)
    cut_short(config, monkeypatch, 8)  # the second forward of step 4; the last checkpoint is that of step 2
    resumed = run(config)
    assert_same(whole.run.root, resumed.run.root)
    assert whole.after == resumed.after != whole.before


@pytest.mark.parametrize(("name", "storage"), [("lora-ga", "keep"), ("corda", "keep"), ("pissa", "keep"), ("corda", "nf4")])
def test_a_resumed_run_makes_no_start_again(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, storage: str) -> None:
    changes: dict[str, Any] = {"method": {"name": name, "storage": storage}, "targets": ["q_proj", "down_proj"]}
    whole = run(plain_config(world, CAUSAL, tmp_path / "whole", **changes))
    config = plain_config(world, CAUSAL, tmp_path / "cut", **changes)
    cut_short(config, monkeypatch, 8)
    with monkeypatch.context() as patch:

        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("the start was made again")

        patch.setattr(type(RECIPES[name]().init), "begin", refuse)
        patch.setattr("rankwise.adapting.beginnings", refuse)
        with pytest.raises(AssertionError, match="made again"):
            run(config | {"output": str(tmp_path / "other")})  # a new run does make it
        resumed = run(config)
    assert_same(whole.run.root, resumed.run.root)


@pytest.mark.parametrize(
    ("micro_step", "changes"), [(1, {}), (7, {}), (7, {"eval_every": 1}), (9, {"save_every": 3, "batch_size": 8, "accumulate": 1})]
)
def test_a_cut_anywhere_resumes_bit_for_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_step: int, changes: dict[str, Any]
) -> None:
    # in the last case a pass has three steps, so that the checkpoints stand at the ends of passes
    train = changes | ({"steps": 9} if "batch_size" in changes else {})
    # dropout, so that the state of the random numbers is seen to come back
    whole = run(plain_config(world, CLASSES, tmp_path / "whole", train=train, dropout=0.2))
    config = plain_config(world, CLASSES, tmp_path / "cut", train=train, dropout=0.2)
    cut_short(config, monkeypatch, micro_step)
    resumed = run(config)
    for name in ("metrics.jsonl", "results.json", "adapter/adapter_model.safetensors"):
        assert (whole.run / name).read_bytes() == (resumed.run / name).read_bytes(), name


KILLED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from rankwise.training import trainers
{patch}
from rankwise.training.run import train
from rich.console import Console
train(json.load(open(sys.argv[1])), console=Console(file=open(os.devnull, "w")))
"""
AT_A_STEP = """
step, count = trainers.RankwiseTrainer.training_step, 0
def killed(self, *args, **kwargs):
    global count
    count += 1
    if count == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
trainers.RankwiseTrainer.training_step = killed
"""
WHILE_SAVING = """
save = torch.save
def killed(value, path, *args, **kwargs):
    if "checkpoint-4" in str(path):
        open(path, "wb").write(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return save(value, path, *args, **kwargs)
torch.save = killed
"""


@pytest.mark.parametrize(("task", "patch"), [(CAUSAL, AT_A_STEP), (CLASSES, AT_A_STEP), (CLASSES, WHILE_SAVING)])
def test_a_killed_process_resumes_bit_for_bit(world: Path, tmp_path: Path, task: str, patch: str) -> None:
    config = plain_config(world, task, tmp_path / "cut", dropout=0.1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = KILLED.format(patch=textwrap.dedent(patch))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.json")], capture_output=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    found = [path.name for path in (tmp_path / "cut/checkpoints").iterdir() if not path.name.startswith(".")]
    assert found == ["checkpoint-2"]
    resumed = run(config)
    whole = run(plain_config(world, task, tmp_path / "whole", dropout=0.1))
    assert_same(whole.run.root, resumed.run.root)


def test_the_first_interrupt_finishes_the_step_and_saves_it(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.training.run import Interrupted
    from rankwise.training.trainers import RankwiseTrainer

    step, count = RankwiseTrainer.training_step, 0

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    config = plain_config(world, CAUSAL, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(RankwiseTrainer, "training_step", interrupted)
        with pytest.raises(Interrupted, match="stopped at step 3 of 5, which is saved; give the same command again"):
            run(config)
    assert (tmp_path / "cut/checkpoints/checkpoint-3").is_dir()
    assert_same(run(plain_config(world, CAUSAL, tmp_path / "whole")).run.root, run(config).run.root)


# --- what goes wrong ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(world: Path, tmp_path: Path) -> None:
    config = plain_config(world, CAUSAL, tmp_path / "r", train={"lr": 1e30, "save_every": 1})
    with pytest.raises(
        TrainingError, match=r"the loss is (nan|inf) at step 2; the last good checkpoint is .*checkpoint-1\. Lower train\.lr"
    ) as caught:
        run(config)
    assert "1e+30" in str(caught.value)
    assert [line["step"] for line in lines(tmp_path / "r/metrics.jsonl")] == [1]


def test_a_gradient_that_is_no_number_never_reaches_a_parameter(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    from rankwise.training.trainers import RankwiseTrainer

    clip = RankwiseTrainer._clip_grad_norm

    def poisoned(self: Any, model: Any) -> Any:
        if self.state.global_step == 3:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))
        return clip(self, model)

    monkeypatch.setattr(RankwiseTrainer, "_clip_grad_norm", poisoned)
    with pytest.raises(TrainingError, match=r"norm of the gradient is nan at step 4; the last good checkpoint is .*checkpoint-2"):
        run(plain_config(world, CAUSAL, tmp_path / "r"))
    state = load_file(tmp_path / "r/checkpoints/checkpoint-2/trainable.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.training.trainers import RankwiseTrainer

    save, limits = RankwiseTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self: Any, *args: Any) -> Any:
        if self.state.global_step == 4:  # writes beyond 4 KiB now fail, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            return save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    config = plain_config(world, CAUSAL, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(RankwiseTrainer, "_save_checkpoint", full)
        with pytest.raises(
            TrainingError, match=r"the checkpoint of step 4 could not be written: .*checkpoint-2 is intact\. Free some space"
        ):
            run(config)
    assert [path.name for path in (tmp_path / "cut/checkpoints").iterdir()] == ["checkpoint-2"]
    assert_same(run(plain_config(world, CAUSAL, tmp_path / "whole")).run.root, run(config).run.root)


def test_states_of_the_output_folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "r"
    config = plain_config(world, CAUSAL, output)
    with pytest.raises(TargetError):
        run(config | {"targets": ["nothing"]})
    assert not output.exists()  # a run that cannot start leaves nothing behind
    cut_short(config, monkeypatch, 7)
    with pytest.raises(
        ConfigError,
        match=r"holds another run \(rank was 4, is 8; recipe\.rank was 4, is 8\); choose another output, or start over with --fresh",
    ):
        run(config | {"rank": 8})
    first = run(config)
    before = (output / "metrics.jsonl").read_bytes()
    console = silent_console()
    again = train(config, console=console)
    assert "is finished (5 steps); nothing is left to do" in console.file.getvalue()
    assert (again.before, again.after, again.steps) == (first.before, first.after, 5)
    assert (output / "metrics.jsonl").read_bytes() == before
    assert run(config | {"rank": 8}, fresh=True).steps == 5
    elsewhere = tmp_path / "mine"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match=r"holds files that are no run of rankwise, such as thesis\.txt"):
            run(plain_config(world, CAUSAL, elsewhere), fresh=fresh)
    assert (elsewhere / "thesis.txt").read_text() == "years of work"


def test_changed_data_is_another_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"p {i}", "completion": f"c {i}"} for i in range(24)])
    config = plain_config(world, CAUSAL, tmp_path / "r", data=str(rows))
    cut_short(config, monkeypatch, 7)
    write_rows(rows, [{"prompt": f"p {i}", "completion": f"d {i}"} for i in range(24)])
    with pytest.raises(ConfigError, match=r"holds another run \(data\..*rows\.jsonl"):
        run(config)


@pytest.mark.parametrize("task", [CAUSAL, CLASSES])
def test_an_adapter_opens_scores_and_merges_as_it_was_trained(world: Path, tmp_path: Path, task: str) -> None:
    from rankwise.training.use import evaluate, generate, merge, open_adapter

    result = run(plain_config(world, task, tmp_path / "r"))
    for place in (result.run.root, result.adapter):
        before, after = evaluate(open_adapter(place))
        assert before == result.before
        assert after == result.after
    opened = open_adapter(result.run.root)
    if task == CAUSAL:
        written = generate(opened, "say 3", tokens=6, compare=True)
        assert set(written) == {"base", "adapter"}
    else:
        with pytest.raises(ConfigError, match="a classifier does not write text"):
            generate(opened, "x")
    done = merge(result.run.root, tmp_path / "merged")
    assert done["difference"] < 1e-5
    plain = open_adapter(result.run.root).model
    ids = torch.tensor([[5, 6, 7]])
    import transformers

    kind = transformers.AutoModelForCausalLM if task == CAUSAL else transformers.AutoModelForSequenceClassification
    torch.testing.assert_close(kind.from_pretrained(tmp_path / "merged")(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="exists; choose a new folder"):
        merge(result.run.root, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="no such folder"):
        open_adapter(tmp_path / "nowhere")


def test_labels_outside_the_classes_and_models_that_are_none(world: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "odd.jsonl", [{"text": "a", "label": "evn"}])
    config = plain_config(world, CLASSES, tmp_path / "r")
    with pytest.raises(DataError, match=r"odd\.jsonl, line 1: the label 'evn' is none of the classes; did you mean 'even'"):
        run(config | {"data": {"train": str(world / "classes.jsonl"), "eval": str(rows)}})
    hollow = tmp_path / "hollow"
    with pytest.raises(ConfigError, match="no such folder"):
        run(config | {"model": str(hollow)})
    hollow.mkdir()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        run(config | {"model": str(hollow)})
    for file in (world / "bert").iterdir():
        if file.suffix != ".safetensors":
            (hollow / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="holds no weights"):
        run(config | {"model": str(hollow)})
    whole = (world / "bert/model.safetensors").read_bytes()
    (hollow / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="is cut off or broken"):
        run(config | {"model": str(hollow)})
    assert not (tmp_path / "r").exists()
