"""What every method's test file asks again: a run from a configuration that resumes bit for bit, and a file that holds all there is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import relative
from tiny_models import logits, token_ids
from torch import Tensor, nn
from training_models import plain_config, silent_console

import rankwise as rw

TARGETS = ["q_proj", "v_proj", "down_proj"]


class Stopped(Exception):
    """Stands for a killed process."""


def interrupted(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *stops: int) -> Any:
    """The result of a run that is stopped before each of these steps and begun again."""
    from rankwise.training.run import train
    from rankwise.training.trainers import RankwiseTrainer

    inner = RankwiseTrainer.training_step
    for stop in stops:

        def stopped(self: Any, *args: Any, stop: int = stop, **kwargs: Any) -> Any:
            if self.state.global_step + 1 == stop:
                raise Stopped
            return inner(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(RankwiseTrainer, "training_step", stopped)
            with pytest.raises(Stopped):
                train(config, console=silent_console())
    return train(config, console=silent_console())


def cut_and_resumed(config: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, *stops: int) -> Any:
    """A run from a configuration, `config` of its output's name, learns; stopped before each of these steps and resumed it writes the same
    bytes. Returns the run that was never stopped."""
    from rankwise.training.run import train

    whole = train(config("whole"), console=silent_console())
    resumed = interrupted(config("cut"), monkeypatch, *stops)
    for name in ("metrics.jsonl", "results.json", "adapter/adapter_model.safetensors", "adapter/rankwise.json"):
        assert (whole.run / name).read_bytes() == (resumed.run / name).read_bytes(), name
    assert whole.after["task"]["loss"] < whole.before["task"]["loss"]
    return whole


def resumes_bit_for_bit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], **changes: Any) -> Any:
    """`cut_and_resumed` for a method's options over the usual configuration, stopped twice."""

    def config(name: str) -> dict[str, Any]:
        given = {"method": method, "targets": TARGETS} | {key: value for key, value in changes.items() if key != "train"}
        plain = plain_config(world, "completion", tmp_path / name, **given)
        plain["train"] |= {"steps": 6, "save_every": 1, "accumulate": 1} | changes.get("train", {})
        return plain

    return cut_and_resumed(config, monkeypatch, 2, 5)


def comes_back_from_its_file(model: nn.Module, fresh: Any, folder: Path) -> dict[str, Any]:
    """Saved, loaded over a fresh base without data, merged, unmerged and taken off; returns rankwise.json. `model` must have trained."""
    ids = token_ids()
    trained, base = logits(model, ids), logits(fresh(), ids)
    assert relative(trained, base) > 1e-3
    rw.save(model, folder)
    loaded = rw.load(fresh(), folder)
    assert torch.equal(logits(loaded, ids), trained)
    rw.merge(loaded)
    assert relative(logits(loaded, ids), trained) < 1e-4
    rw.unmerge(loaded)
    assert torch.equal(logits(loaded, ids), trained)
    with rw.disabled(loaded):
        assert torch.equal(logits(loaded, ids), base)
    assert torch.equal(logits(rw.unadapt(loaded), ids), base)
    return json.loads((folder / "rankwise.json").read_text())


def trained_a_little(model: nn.Module, batch: dict[str, Tensor], steps: int = 3, lr: float = 1e-2) -> nn.Module:
    """A few steps of the recipe's own optimizer."""
    optimizer = rw.optimizer(model, lr=lr)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
