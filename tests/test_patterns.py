"""Regular expressions that somebody else wrote: Python's rules, within a second, in little memory."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import llama

import rankwise as rw
from rankwise.errors import CheckpointError, TargetError
from rankwise.patterns import PatternError, expression

NAME = "model.layers.0.self_attn.q_proj"
LONG = "a" * 60 + "b"
# each keeps Python's own engine busy for longer than anybody waits
HOSTILE = (r"(a+)+$", r"(a|a)*$", r"(a|aa)+$", r"(.*)*(.*)*(.*)*(.*)*(.*)*x", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(?:a?){60}a{60}x")
LLAMA = r"(?:\w|[a-z]|[.a-z_])*[!?]"  # the same for the names of a Llama


@pytest.mark.parametrize("text", HOSTILE)
def test_an_expression_ends_within_its_time(text: str) -> None:
    began = time.perf_counter()
    for _ in range(20):
        try:
            assert expression(text).fullmatch(LONG) is None
        except PatternError as error:
            assert "takes more than 1 s" in str(error)  # noqa: PT017
            assert repr(text) in str(error)  # noqa: PT017
            break
    assert time.perf_counter() - began < 4  # a loaded machine; the budget is one second


def test_slow_matches_add_up_over_names() -> None:
    began = time.perf_counter()

    def over_names() -> None:
        for length in range(10, 30):
            expression(r"(?:\w|[a-z])*[!?]").match("a" * length)

    with pytest.raises(PatternError, match=r"takes more than 1 s"):
        over_names()
    assert time.perf_counter() - began < 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (r"((a{1000}){1000}){1000}", "repeats something 1000000000 times"),
        (r"a{999999}", "repeats something"),
        (r"(?:q_proj){e<=1}", "a brace that counts nothing"),
        ("a" * 30_000, "has 30000 characters"),
        ("(q_proj", "not a valid regular expression"),
        (r"\p{L}", "a brace that counts nothing"),
        ("(" * 5000 + ")" * 5000, "not a valid regular expression"),
        (r"(?R)", "not a valid regular expression"),
    ],
)
def test_what_is_not_read(text: str, message: str) -> None:
    with pytest.raises(PatternError, match=re.escape(message)):
        expression(text)


def test_repeats_inside_of_repeats_multiply() -> None:
    with pytest.raises(PatternError, match="repeats something 40000 times"):
        expression(r"(a{200}){200}")


@pytest.mark.parametrize(
    "text",
    [
        r".*\.(q|k|v)_proj", r".*layers\.[0-3]\..*", r"(?!.*vision).*q_proj", r".*(?<=self_attn)\.q_proj", r"model\.layers\.\d{1,3}\..*",
        r"(?i:.*Q_PROJ)", r"(?P<all>.*)\.q_proj", r".*\.[^.]*", r"lm_head|.*q_proj", r"q_proj", r"", r"(?:.*\.)?(\d+)\..*", r".*\{x\}|.*j",
    ],
)  # fmt: skip
def test_ordinary_expressions_match_as_pythons_own(text: str) -> None:
    for name in (NAME, "lm_head", "model.layers.11.mlp.up_proj", "", "{x}"):
        for method in ("match", "fullmatch"):
            want, found = getattr(re, method)(text, name), getattr(expression(text), method)(name)
            assert (want is None) == (found is None)
            assert want is None or want.span() == found.span()
            assert want is None or want.groups() == found.groups()


def test_targets_and_patterns_of_a_recipe_are_bounded() -> None:
    for fields in ({"targets": [f"re:{LLAMA}"]}, {"targets": {"exclude": [f"re:{LLAMA}"]}}, {"rank_pattern": {f"re:{LLAMA}": 2}}):
        with pytest.raises(TargetError, match=r"takes more than 1 s"):
            rw.plan(llama(), rw.recipes.lora(rank=2, **fields))


FIELDS = {
    "target_modules": LLAMA,
    "exclude_modules": LLAMA,
    "rank_pattern": {LLAMA: 2},
    "alpha_pattern": {LLAMA: 2},
    "modules_to_save": [LLAMA.replace(r"\.", ".")],
    "layers_pattern": LLAMA,
}


@pytest.mark.parametrize("field", FIELDS)
def test_expressions_of_a_folder_of_peft_are_bounded(field: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 1]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: FIELDS[field]}))
    base = llama()
    message = "matches no module" if field == "modules_to_save" else "takes more than 1 s"  # names that end with it, and none does
    with pytest.raises(CheckpointError, match=message):
        rw.load(base, tmp_path)
    want = llama().state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in base.state_dict().items())
