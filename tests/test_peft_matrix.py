"""Every recipe on three families of models: what is saved loads in PEFT with equal logits, or PEFT refuses the file."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from checkpoint_models import CASES, adapted, base, logits, relative, train
from peft import PeftModel
from safetensors.torch import load_file

import rankwise as rw
from rankwise.recipes import RECIPES
from rankwise.storage import NF4Linear

TOLERANCE = 1e-5
OPTIONS: dict[str, dict[str, Any]] = {"milora-mixture": {"theta_mode": "joint"}}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def as_held(model: Any, name: str) -> Any:
    """The base for PEFT: fresh, and where the adapted one holds 4 bits, with what these stand for."""
    fresh = base(name)
    held = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    for key, tensor in held.items():
        weight = fresh.get_parameter(key.replace(".base_layer", ""))
        weight.data.copy_(tensor.T if name == "gpt2" else tensor)  # a Conv1D is held transposed
    return fresh


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", RECIPES)
def test_peft_computes_the_same_or_refuses(method: str, name: str, tmp_path: Path) -> None:
    """What the file's type must be is that of the same recipe in the list of the checkpoint tests."""
    fields: dict[str, Any] = {"rank": 4}
    if name == "bert":  # the pooler sees one token a row, too few for the inits that read data
        fields |= {"modules_to_save": ["classifier"], "targets": {"include": ["all-linear"], "exclude": ["pooler.dense"]}}
    model = train(adapted(name, RECIPES[method](**fields | OPTIONS.get(method, {}))))
    wanted = logits(model)
    assert relative(wanted, logits(as_held(model, name))) > 1e-4  # something was learned
    rw.save(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    # LoRA-drop finds nothing to drop in two layers, and is then a LoRA
    assert written == ("LORA" if method == "lora-drop" else CASES[method][2])
    if written == "RANKWISE":
        with pytest.raises(KeyError, match="RANKWISE"):
            PeftModel.from_pretrained(base(name), tmp_path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = PeftModel.from_pretrained(as_held(model, name), tmp_path).eval()
    assert relative(logits(theirs), wanted) < TOLERANCE
    held = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    arrived = [p.numel() for n, p in theirs.named_parameters() if any(part in n for part in ("lora_", "vera_lambda", "modules_to_save"))]
    assert held == sum(arrived)


def test_the_table_in_the_docs_names_tests_that_exist() -> None:
    tests = Path(__file__).parent
    named = re.findall(r"(test_\w+\.py)(?:::(\w+))?", (tests.parent / "docs" / "peft.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    for file, function in named:
        assert not function or f"def {function}(" in (tests / file).read_text(encoding="utf-8"), f"{file}::{function}"
