"""A model is given back with its last reference: nothing that rankwise keeps or hangs on it holds it, not even in a cycle.

On a GPU `del model` is how memory is made for the next one; a cycle would keep the weights until Python happens to look for cycles.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checkpoint_models import CASES, IDS, adapted, base

import rankwise as rw
from rankwise.recipes import RECIPES


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def batch() -> dict[str, torch.Tensor]:
    labels = IDS.clone()
    labels[:, :2] = -100
    return {"input_ids": IDS, "labels": labels}


@pytest.mark.parametrize("case", [*RECIPES, "mixture with a second level"])
def test_a_model_is_freed_after_training(case: str) -> None:
    if case in RECIPES:
        name, recipe, _ = CASES[case]
        model = adapted(name, recipe())
    else:
        model = rw.adapt(base(), rw.recipes.milora_mixture(rank=4))
    optimizer: Any = rw.optimizer(model, lr=1e-2, total_steps=4, validation=[batch()])
    model.train()
    for _ in range(2):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gone = weakref.ref(model)
    del model, optimizer
    assert gone() is None


def test_a_model_is_freed_after_everything_else() -> None:
    model: Any = rw.adapt(base(), rw.recipes.dora(rank=4))
    rw.fuse_loss(model)
    rw.fp32_products(model)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with rw.disabled(model):
        model(**batch())
    rw.merge(model)
    rw.unmerge(model)
    assert all(each.__dict__["save_pretrained"].model() is each for each in (copied, pickled))
    gone = [weakref.ref(each) for each in (model, copied, pickled)]
    del model, copied, pickled
    assert [known() for known in gone] == [None] * 3
