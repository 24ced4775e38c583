"""Counts and refusals, classification, preview and collation."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from chat_templates import STYLES, byte_tokenizer, tokenizer_of
from helpers import minilm_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rankwise.errors import DataError
from rankwise.training.classification import encode_classification
from rankwise.training.collate import Collator
from rankwise.training.encoded import IGNORED, check_encoded
from rankwise.training.preview import HEAD, TAIL, preview, preview_text
from rankwise.training.rows import Rows
from rankwise.training.shapes import recognise
from rankwise.training.tokenize import encode_rows

END = ("<eos>",)


def encoded(rows, tokenizer, max_length=None, **options):
    made = Rows(rows, "data.jsonl", list(range(1, len(rows) + 1)))
    return encode_rows(made, recognise(made, "causal-lm"), tokenizer, max_length, **options)


# --- counts ----------------------------------------------------------------------------------------------------------


def test_cut_and_empty_rows():
    """Letters of this vocabulary are a token each, so lengths can be read off: x * 6 + y * 3 + end = 10."""
    tokenizer = byte_tokenizer(END, "<eos>")
    rows = [
        {"prompt": "x" * 6, "completion": "y" * 3},  # 10: fits
        {"prompt": "x" * 6, "completion": "y" * 4},  # 11: only the end token is lost
        {"prompt": "x" * 20, "completion": "y"},  # nothing of the answer is left
        {"prompt": "x" * 10, "completion": "y"},  # nor here
        {"prompt": "x", "completion": "y"},
    ]
    made = encoded(rows, tokenizer, 10)
    assert [len(ids) for ids in made.input_ids] == [10, 10, 10, 10, 3]
    report = made.report
    assert (report.rows, report.sequences, report.tokens, report.longest) == (5, 5, 43, 22)
    assert (report.supervised, report.empty, report.cut, report.cut_answers, report.no_end) == (4 + 4 + 2, 2, 3, 3, 0)
    assert report.lines == {"cut": (2, 3, 4), "cut_answers": (2, 3, 4), "no_end": (), "empty": (3, 4)}
    assert "3 of 5 rows lost a part of their answer to the cut (lines 2, 3, 4)" in report.text()
    with pytest.raises(DataError, match=r"2 of 5 rows have no supervised token \(lines 3, 4\).*; 3 of 5 .*longest sequence has 22.*'cut'"):
        check_encoded(made)
    with pytest.raises(DataError, match="3 of 5 rows lost a part"):
        check_encoded(made, {"empty", "no-end"})
    with pytest.raises(DataError, match="2 of 5 rows have no supervised"):
        check_encoded(made, {"cut"})
    kept = check_encoded(made, {"cut", "empty"})
    assert kept.lines == [1, 2, 5]
    assert kept.input_ids == [made.input_ids[index] for index in (0, 1, 4)]
    with pytest.raises(DataError, match="unknown word 'cutt'; did you mean 'cut'"):
        check_encoded(made, {"cutt"})


def test_a_cut_that_costs_no_answer():
    tokenizer = tokenizer_of("chatml")
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z" * 90}]}
    made = encoded([row], tokenizer, 60)
    assert (made.report.cut, made.report.cut_answers, made.report.no_end) == (1, 0, 0)
    assert check_encoded(made) is made


def test_rows_without_any_answer():
    row = {"messages": [{"role": "user", "content": "x"}]}
    made = encoded([row, row], tokenizer_of("chatml"))
    assert made.report.empty == 2
    with pytest.raises(DataError, match="2 of 2 rows have no supervised token"):
        check_encoded(made)
    with pytest.raises(DataError, match="there is nothing to train"):
        check_encoded(made, {"empty"})


def test_tokenizer_without_an_end():
    made = encoded([{"text": "abc"}, {"prompt": "a", "completion": "b"}][:1], byte_tokenizer(("<pad>",), None))
    assert made.report.no_end == 1
    with pytest.raises(DataError, match="set the tokenizer's eos_token"):
        check_encoded(made)


def test_a_single_token_trains_nothing():
    """A label at the first position has nothing before it that could predict it."""
    made = encoded([{"text": "a"}, {"text": "<eos>"}], byte_tokenizer(END, "<eos>"))
    assert [len(ids) for ids in made.input_ids] == [2, 1]
    assert (made.report.supervised, made.report.empty, made.report.lines["empty"]) == (1, 1, (2,))


def test_duplicates_between_train_and_evaluation():
    tokenizer = tokenizer_of("bare")
    train = encoded([{"prompt": str(n), "completion": "a"} for n in range(5)], tokenizer)
    evaluation = encoded([{"prompt": str(n), "completion": "a"} for n in (9, 3, 8, 4, 3)], tokenizer, train=train)
    assert train.report.duplicates is None
    assert evaluation.report.duplicates == 3
    assert evaluation.report.lines["duplicates"] == (2, 4, 5)
    assert "3 of 5 rows also stand in the training rows (lines 2, 4, 5)" in evaluation.report.text()
    assert check_encoded(evaluation) is evaluation  # said, not refused


def test_as_a_dataset():
    made = encoded([{"prompt": "a", "completion": "b"}] * 3, tokenizer_of("bare"))
    assert len(made) == 3
    assert made[1] == {"input_ids": made.input_ids[1], "labels": made.labels[1]}
    dataset = made.as_dataset()
    assert dataset.column_names == ["input_ids", "labels"]
    assert [dict(row) for row in dataset] == [made[index] for index in range(3)]


# --- classification --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder())


def labelled(*pairs) -> Rows:
    return Rows([{"text": text, "label": label} for text, label in pairs], "data.jsonl", list(range(1, len(pairs) + 1)))


def test_classes(minilm):
    train = encode_classification(labelled(("A mail reader.", "mail"), ("A game of chess.", "games"), ("More mail.", "mail")), minilm, 64)
    assert train.names == ["games", "mail"]
    assert train.labels == [1, 0, 1]
    assert train.counts == {"games": 1, "mail": 2}
    assert minilm.decode(train.input_ids[0]) == "[CLS] a mail reader. [SEP]"
    evaluation = encode_classification(labelled(("Chess.", "games")), minilm, 64, train.names)
    assert (evaluation.labels, evaluation.names) == ([0], train.names)
    assert [dict(row) for row in train.as_dataset()] == [train[index] for index in range(3)]


def test_truncation_is_counted(minilm):
    made = encode_classification(labelled(("word " * 100, "a"), ("word", "b")), minilm, 16)
    assert [len(ids) for ids in made.input_ids] == [16, 3]
    assert made.input_ids[0][-1] == minilm.sep_token_id
    assert (made.report.cut, made.report.lines["cut"], made.report.longest, made.report.tokens) == (1, (1,), 102, 19)
    assert encode_classification(labelled(("word " * 100, "a"), ("word", "b")), minilm, None).report.cut == 0


def test_number_labels(minilm):
    made = encode_classification(labelled(("a", 10), ("b", 9), ("c", 10)), minilm, 16)
    assert made.names == ["9", "10"]  # as numbers, not as words
    assert made.labels == [1, 0, 1]
    assert encode_classification(labelled(("a", "10")), minilm, 16, made.names).labels == [1]


def test_label_errors(minilm):
    rows = labelled(("a", "mail"), ("b", "maill"))
    with pytest.raises(
        DataError, match=r"data.jsonl, line 2: the label 'maill' is none of the classes; did you mean 'mail'.*: games, mail$"
    ):
        encode_classification(rows, minilm, 16, ["games", "mail"])
    with pytest.raises(DataError, match="every row has the label 'mail'; a classifier needs at least two"):
        encode_classification(labelled(("a", "mail")), minilm, 16)
    with pytest.raises(DataError, match="classification needs the keys 'text' and 'label'"):
        encode_classification(Rows([{"prompt": "a"}], "f", [1]), minilm, 16)
    blank = encode_classification(labelled((" ", "a"), ("b", "b")), minilm, 16)
    assert blank.report.notes == ("1 rows have a blank text (lines 1)",)


# --- preview ---------------------------------------------------------------------------------------------------------


def test_preview_marks_the_loss():
    tokenizer = tokenizer_of("chatml")
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"[b]a{n}\x1b[31m"}]} for n in range(5)]
    made = encoded(rows, tokenizer)
    text = preview_text(made, tokenizer, 2)
    assert text.count("[[") == text.count("]]") == 3  # the legend and two rows
    assert "2 of 5 rows; the loss is on the completion tokens (of a conversation, every assistant turn); chat template" in text
    assert "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n[[[b]a0\\x1b[31m<|im_end|>]]" in text
    assert "line 2 (" in text
    assert "a2" not in text
    assert "\x1b" not in text
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        console.print(preview(made, tokenizer, 1))
    assert "\x1b[1;32m[[[b]a0" in capture.get()


def test_preview_keeps_the_border_of_long_rows():
    tokenizer = tokenizer_of("bare")
    row = {"prompt": "BEGIN" + "p" * 5000 + "BORDER", "completion": "ANSWER" + "c" * 5000 + "LAST"}
    text = preview_text(encoded([row], tokenizer), tokenizer)
    assert "BORDER<|assistant|>[[ANSWER" in text
    assert "LAST<|end|>]]" in text
    assert "BEGIN" in text
    assert len(text) < 2 * (HEAD + TAIL) + 500


def test_preview_of_odd_rows(minilm):
    tokenizer = byte_tokenizer(END, "<eos>")
    made = encoded([{"prompt": "x" * 30, "completion": "y"}], tokenizer, 10)
    text = preview_text(made, tokenizer)
    assert "no token has the loss" in text
    assert "ends at max_length 10" in text
    assert "no chat template, rows end in '<eos>'" in text
    text = preview_text(encode_classification(labelled(("Chess", "games"), ("Post", "mail")), minilm, 16), minilm)
    assert "[CLS] chess [SEP]  [[games]]" in text
    assert "2 classes, the loss is on the class" in text


# --- collation -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=5),
    pad=st.integers(0, 9),
    multiple=st.sampled_from([None, 1, 4, 7]),
    data=st.data(),
)
def test_collation_round_trip(rows, pad, multiple, data):
    """Each row is got back through the mask, also where the padding id stands in the row; what is padded has no loss."""
    features = [
        {"input_ids": row, "labels": data.draw(st.lists(st.sampled_from([IGNORED, 3]), min_size=len(row), max_size=len(row)))}
        for row in rows
    ]
    kept = copy.deepcopy(features)
    batch = pickle.loads(pickle.dumps(Collator(pad, pad_to_multiple_of=multiple)))(features)
    assert features == kept
    length = max(map(len, rows))
    assert batch["input_ids"].shape[1] == (length if multiple is None else -(-length // multiple) * multiple)
    for index, feature in enumerate(features):
        mask = batch["attention_mask"][index].bool()
        assert mask.tolist() == [True] * len(feature["input_ids"]) + [False] * (batch["input_ids"].shape[1] - len(feature["input_ids"]))
        assert batch["input_ids"][index][mask].tolist() == feature["input_ids"]
        assert batch["labels"][index][mask].tolist() == feature["labels"]
        assert (batch["input_ids"][index][~mask] == pad).all()
        assert (batch["labels"][index][~mask] == IGNORED).all()
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_collation_of_classes():
    batch = Collator(0)([{"input_ids": [1, 2], "labels": 3}, {"input_ids": [1], "labels": 0}])
    assert batch["labels"].tolist() == [3, 0]
    assert "labels" not in Collator(0)([{"input_ids": [1]}])
    assert Collator(0, label_pad=-1)([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1], "labels": [1]}])["labels"][
        1
    ].tolist() == [1, -1]


# --- import time -----------------------------------------------------------------------------------------------------


def test_importing_the_data_side_loads_nothing_slow():
    names = "classification, collate, conversation, encoded, preview, rows, shapes, tokenize"
    slow = "{'torch', 'transformers', 'datasets', 'rich'}"
    code = f"import sys; from rankwise.training import {names}; print(sorted({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_style_is_used():
    assert {"chatml", "llama3", "llama2", "gemma", "mistral", "default-system", "thinking", "bare"} <= STYLES.keys()
