"""`rankwise train` over a sequence of tasks: with any recipe, resumed bit for bit inside a task and between two, and what is reported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_models import make_world, plain_config, silent_console, write_rows

import rankwise as rw
from rankwise.errors import ConfigError, DataError
from rankwise.sites import adapted_sites
from rankwise.training.config import load_config, make_config, to_yaml
from rankwise.training.run import train
from rankwise.training.sequence import summary
from rankwise.training.trainers import RankwiseTrainer
from rankwise.training.use import evaluate, open_adapter

LETTERS = ("ab", "cd", "ef")
torch.set_num_threads(1)  # the models are far too small for more


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models, and for each of three tasks rows of two classes of its own, and prompts with their completions."""
    root = make_world(tmp_path_factory.mktemp("world"))
    everything = []
    for number, letters in enumerate(LETTERS):
        rows = [{"text": f"{letters[i % 2] * 3} {i}", "label": letters[i % 2], "task": number} for i in range(12)]
        everything += rows
        write_rows(root / f"classes-{number}.jsonl", [{"text": row["text"], "label": row["label"]} for row in rows])
        write_rows(root / f"rows-{number}.jsonl", [{"prompt": f"say {letters} {i}", "completion": letters * 2} for i in range(8)])
    write_rows(root / "all.jsonl", [{"text": row["text"], "label": row["label"]} for row in everything])
    return root


def config(world: Path, kind: str, output: Path, method: Any = "am-lora", count: int = 3, **train_changes: Any) -> dict[str, Any]:
    name = "classes" if kind == "classification" else "rows"
    files = [str(world / f"{name}-{number}.jsonl") for number in range(count)]
    tasks = [{"name": LETTERS[number], "data": {"train": file, "eval": file}} for number, file in enumerate(files)]
    plain = plain_config(world, kind, output, method=method, train={"steps": 3, "accumulate": 1, "save_every": 1} | train_changes)
    return {key: value for key, value in plain.items() if key != "data"} | {"data": {"tasks": tasks}, "rank": 2, "dropout": 0.1}


NEW = {"name": "am-lora", "selector_train": "new", "sparsity": "gates"}


@pytest.mark.parametrize(("kind", "method"), [("classification", "am-lora"), ("completion", NEW), ("classification", "lora")], ids=str)
def test_a_sequence_resumes_bit_for_bit_wherever_it_was_stopped(
    kind: str, method: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside the first task, between the first and the second, and inside the third."""
    whole = train(config(world, kind, tmp_path / "whole", method), console=silent_console())
    inner = RankwiseTrainer.training_step

    class Stopped(Exception):
        """Stands for whatever ends a process."""

    for task, step in ((0, 2), (1, 1), (2, 2)):

        def stopped(self: Any, *args: Any, task: int = task, step: int = step, **kwargs: Any) -> Any:
            if self.run.root.name.startswith(f"{task + 1:02d}-") and self.state.global_step + 1 == step:
                raise Stopped
            return inner(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(RankwiseTrainer, "training_step", stopped)
            with pytest.raises(Stopped):
                train(config(world, kind, tmp_path / "cut", method), console=silent_console())
    resumed = train(config(world, kind, tmp_path / "cut", method), console=silent_console())
    files = ["results.json", "adapter/adapter_model.safetensors", "adapter/rankwise.json"]
    files += [f"tasks/{n + 1:02d}-{LETTERS[n]}/{name}" for n in range(3) for name in ("metrics.jsonl", "results.json")]
    for name in files:
        assert (whole.run / name).read_bytes() == (resumed.run / name).read_bytes(), name
    assert whole.sequence == resumed.sequence == json.loads((whole.run / "results.json").read_text())["sequence"]
    assert resumed.steps == 9
    # only what was seen is scored, and what is scored was learned
    matrix = whole.sequence["matrix"]  # pyright: ignore
    assert [[value is None for value in row] for row in matrix] == [[j > i for j in range(3)] for i in range(3)]
    for number, letters in enumerate(LETTERS):
        after = json.loads((whole.run / "tasks" / f"{number + 1:02d}-{letters}" / "results.json").read_text())["after"]
        assert list(after) == list(LETTERS[: number + 1])
        if kind == "completion":  # three steps are too few for a head that starts at random
            assert after[letters]["loss"] < whole.before[letters]["loss"]
    if kind == "classification":  # one label space: the union
        assert json.loads((whole.adapter / "training.json").read_text())["labels"] == list("abcdef")
    # a finished run says so again, and says the same
    again = train(config(world, kind, tmp_path / "cut", method), console=silent_console())
    assert again.sequence == whole.sequence
    # the adapter opens, with a LoRA per task where the method has that, and scores as reported
    opened = open_adapter(whole.run.root)
    experts = {module.site.experts for module in adapted_sites(opened.model).values()}
    assert experts == ({1} if method == "lora" else {3})
    before, after = evaluate(opened)
    assert before == whole.before
    assert after == whole.after
    # and so does what each task left
    first = open_adapter(whole.run.root / "tasks" / "01-ab" / "adapter")
    assert {module.site.experts for module in adapted_sites(first.model).values()} == {1}


def test_what_is_reported_is_what_the_papers_define() -> None:
    rows = [
        {"a": {"accuracy": 0.8}},
        {"a": {"accuracy": 0.9}, "b": {"accuracy": 0.7}},
        {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.8}, "c": {"accuracy": 0.6}},
    ]
    found = summary(rows)
    assert found["matrix"] == [[0.8, None, None], [0.9, 0.7, None], [0.5, 0.8, 0.6]]
    assert found["average"] == pytest.approx((0.5 + 0.8 + 0.6) / 3)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.5) + (0.7 - 0.8)) / 2)
    assert found["backward_transfer"] == pytest.approx(((0.5 - 0.8) + (0.8 - 0.7)) / 2)
    losses = summary([{"a": {"loss": 1.0}}, {"a": {"loss": 1.5}, "b": {"loss": 2.0}}])
    assert (losses["score"], losses["forgetting"], losses["backward_transfer"]) == ("loss", 0.5, -0.5)
    assert summary(rows[:1])["forgetting"] is None


def test_one_task_is_a_sequence_and_filters_pick_its_rows(world: Path, tmp_path: Path) -> None:
    plain = config(world, "classification", tmp_path / "run", count=1)
    both = str(world / "all.jsonl")
    plain["data"]["tasks"] = [{"name": "first pair", "data": {"train": both, "eval": both}, "filter": {"label": ["a", "b"]}}]
    result = train(plain, console=silent_console())
    assert result.sequence is not None
    assert result.sequence["forgetting"] is None
    assert result.after["first pair"]["rows"] == 12
    assert json.loads((result.adapter / "training.json").read_text())["labels"] == ["a", "b"]
    assert (result.run / "tasks" / "01-first-pair" / "metrics.jsonl").is_file()


def test_a_schedule_gets_the_length_of_the_sequence(world: Path, tmp_path: Path) -> None:
    """AdaLoRA prunes over all tasks together, not within each."""
    method = {"name": "adalora", "target_rank": 1, "tinit": 2, "tfinal": 3}
    plain = config(world, "completion", tmp_path / "run", method)
    result = train(plain, console=silent_console())
    budgets = []
    for number, letters in enumerate(LETTERS):
        lines = (result.run / "tasks" / f"{number + 1:02d}-{letters}" / "metrics.jsonl").read_text().splitlines()
        budgets += [json.loads(line)["schedule_budget"] for line in lines]
    assert len(budgets) == 9
    assert budgets[1] == budgets[0] > budgets[3] > budgets[5] == budgets[8]
    rates = [json.loads(line)["lr"] for line in (result.run / "tasks" / "02-cd" / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3])  # while the rate falls within each task


def test_the_plan_names_every_task(world: Path, tmp_path: Path) -> None:
    from rankwise.training.forecast import forecast

    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(make_config(config(world, "classification", tmp_path / "run"))))
    text = forecast(path)
    assert "Task ab\n" in text
    assert "9 steps (3 + 3 + 3 over 3 tasks)" in text
    assert load_config(path).data.tasks == make_config(config(world, "classification", tmp_path / "run")).data.tasks


def test_tasks_may_stand_at_the_top() -> None:
    tasks = [{"name": "one", "data": "a.jsonl"}]
    config = make_config({"model": "m", "tasks": tasks})
    assert config.data.tasks is not None
    assert config.data.tasks[0].data.train == "a.jsonl"
    assert config == make_config({"model": "m", "data": {"tasks": tasks}})


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"tasks": []}, "data.tasks is empty; name at least one task"),
        ({}, "key 'data.train' is missing"),
        ({"tasks": [{"name": "a", "data": "x"}, {"name": "a", "data": "y"}]}, "data.tasks names two tasks 'a'"),
        ({"train": "x", "tasks": [{"name": "a", "data": "x"}]}, "data.train beside data.tasks"),
        ({"tasks": [{"name": "a"}]}, "data.tasks.0.data' is missing"),
        ({"tasks": [{"name": "a", "data": {"eval": "x"}}]}, "key 'data.tasks.0.data.train' is missing"),
        ({"tasks": [{"name": "a", "data": {"train": "x", "general": "y"}}]}, "data.general is not for a single task"),
        ({"tasks": [{"name": "a", "data": {"tasks": [{"name": "b", "data": "x"}]}}]}, "a task holds no tasks of its own"),
        ({"tasks": [{"name": "a", "data": {"train": "x", "filter": {"b": 1}}, "filter": {"b": 1}}]}, "has a filter twice"),
        ({"tasks": [{"nam": "a", "data": "x"}]}, "data.tasks.0.name"),
    ],
)
def test_what_is_wrong_with_tasks_is_named(data: Any, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"model": "m", "data": data})
    assert wanted in str(caught.value)


def test_what_is_wrong_with_the_rows_of_a_task_is_named(world: Path, tmp_path: Path) -> None:
    def refused(change: Any, kind: type[Exception], wanted: str) -> None:
        plain = config(world, "classification", tmp_path / "run")
        plain["data"]["tasks"][1] |= change
        with pytest.raises(kind, match=wanted):
            train(plain, console=silent_console())
        assert not (tmp_path / "run").exists()

    both, second = str(world / "all.jsonl"), str(world / "classes-1.jsonl")
    refused({"filter": {"label": ["x"]}}, DataError, r"task 'cd': .*classes-1.jsonl: no row has label in \['x'\], which filter asks for")
    refused(
        {"filter": {"kind": 1}}, DataError, "task 'cd': .*line 1: filter names the column 'kind', which the row lacks; it has text, label"
    )
    refused({"data": second}, ConfigError, "task 'cd' has no rows to evaluate on")
    # a class that no task trains on
    write_rows(world / "unseen.jsonl", [{"text": "zzz", "label": "z"}])
    unseen = {"train": second, "eval": str(world / "unseen.jsonl")}
    refused({"data": unseen}, DataError, "task 'cd': .*unseen.jsonl, line 1: the label 'z' is none of the classes")
    # another task's class is one of the union
    plain = config(world, "classification", tmp_path / "fine", steps=1)
    plain["data"]["tasks"][1]["data"] = {"train": second, "eval": both}
    assert train(plain, console=silent_console()).after["cd"]["rows"] == 36


def test_am_lora_trains_without_tasks_too(world: Path, tmp_path: Path) -> None:
    """One data set is one task: one LoRA beside the zero one."""
    plain = plain_config(world, "completion", tmp_path / "run", method="am-lora")
    result = train(plain, console=silent_console())
    assert result.after["task"]["loss"] < result.before["task"]["loss"]
    model = open_adapter(result.run.root).model
    assert {module.site.experts for module in adapted_sites(model).values()} == {1}
    with pytest.raises(rw.RankwiseError, match="cannot be merged: its update depends on the token"):
        rw.merge(model)
    assert isinstance(model, torch.nn.Module)
