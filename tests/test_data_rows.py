"""Reading rows and recognising their shape; every fault is a DataError that says where."""

import gzip
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankwise.errors import DataError
from rankwise.training.rows import Rows, read_rows
from rankwise.training.shapes import normalise, prompt_messages, recognise

ROWS = [{"text": "one"}, {"text": "zwei é 2"}]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "data", "lines"),
    [
        ("a.jsonl", jsonl(ROWS), [1, 2]),
        ("a.jsonl", b"\xef\xbb\xbf\n" + jsonl(ROWS).replace(b"\n", b"\r\n\r\n"), [2, 4]),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0), [1, 2]),
        ("a.json", json.dumps(ROWS, indent=2).encode(), [2, 5]),
        ("a.json", json.dumps(ROWS).encode() + b"\n", [1, 1]),
        ("a.json", jsonl(ROWS), [1, 2]),
        ("a.json.gz", gzip.compress(json.dumps(ROWS, indent=0).encode(), mtime=0), [2, 5]),
    ],
)
def test_files(tmp_path, name, data, lines):
    (tmp_path / name).write_bytes(data)
    rows = read_rows(tmp_path / name)
    assert rows.rows == ROWS
    assert rows.lines == lines
    assert rows.place(1) == f"{tmp_path / name}, line {lines[1]}"


def test_separator_inside_a_string(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert read_rows(str(tmp_path / "a.jsonl")).rows == [{"text": "a\u2028b\x85c"}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": "a"}\n\n{"text": "b"\n', r"a.jsonl, line 3: broken JSON: Expecting ',' delimiter \(column 13\)"),
        (b'{"text": "a"}\n["b"]\n', "a.jsonl, line 2: a row must be a JSON object .* this one is an array"),
        (b"{}\n7\n", "line 2: .* a number"),
        (b"{}\nnull", "line 2: .* null"),
        (b"", "a.jsonl: the file holds no row"),
        (b" \n\n", "the file holds no row"),
        (b'{\n "text": 1\n}\n', "line 1: broken JSON: .*pretty-printed"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: not UTF-8 \(invalid start byte, byte 0xff\)"),
        ('{"text": "a"}'.encode("utf-16"), "line 1: not UTF-8"),
        (b'{"text": "\\ud83d"}\n', "line 1: an escape .* half of a surrogate pair"),
        (b"[" * 100_000, "line 1: broken JSON: nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "line 1: broken JSON"),
    ],
)
def test_broken_lines(tmp_path, data, message):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a": 1},\n{"a": }]', "line 2: broken JSON"),
        (b'[{"a": 1}\n{"a": 2}]', "line 2: broken JSON: expected ',' or ']'"),
        (b'[{"a": 1},\n 7]', "line 2: a row must be a JSON object"),
        (b'[{"a": 1}', "line 1: broken JSON"),
        (b'[{"a": 1},]', "line 1: broken JSON"),
        (b'[{"a": 1}] {', "something follows the end"),
        (b'[\n{"a": "\\udc00"}]', "line 2: .*surrogate"),
        (b"[]", "holds no row"),
        (b'[{"a": 1},\n\xff]', "line 2: not UTF-8"),
    ],
)
def test_broken_arrays(tmp_path, data, message):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "a.json")


@settings(max_examples=300, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.text(alphabet='[]{}",:\\u dD8e19\n', max_size=60).map(str.encode),
        st.lists(st.one_of(st.just(b"\n"), st.just(b'{"a": 1}'), st.just(b","), st.just(b"["), st.just(b"]"))).map(b"".join),
    ),
    name=st.sampled_from(["x.jsonl", "x.json", "x.jsonl.gz"]),
)
@example(data=b"\x1f\x8b\x08\x00", name="x.jsonl.gz")
@example(data=gzip.compress(b'{"a": 1}', mtime=0)[:-6], name="x.jsonl.gz")
@example(data=gzip.compress(b"\x00" * 40, mtime=0)[:12] + b"\xff" * 30, name="x.jsonl.gz")
def test_any_bytes_are_rows_or_a_data_error(tmp_path_factory, data, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    try:
        rows = read_rows(path)
    except DataError:
        return
    assert rows.rows
    assert all(isinstance(row, dict) for row in rows.rows)
    assert len(rows.lines) == len(rows.rows)
    assert rows.lines == sorted(rows.lines)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(max_size=3), st.text(max_size=9) | st.integers() | st.lists(st.none() | st.text(max_size=3), max_size=2), max_size=3
        ),
        min_size=1,
        max_size=4,
    )
)
@pytest.mark.parametrize("indent", [None, 1])
def test_what_is_written_is_read(tmp_path_factory, indent, rows):
    path = tmp_path_factory.getbasetemp() / "roundtrip.json"
    path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    assert read_rows(path).rows == rows


def test_missing_and_unknown_files(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(jsonl(ROWS))
    with pytest.raises(DataError, match=r"no such file or folder: .*trian.jsonl; near names in .*: train.jsonl"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"no such file or folder: .*qqq.json; there are in .*: train.jsonl"):
        read_rows(str(tmp_path / "zz" / "qqq.json"))
    (tmp_path / "train.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"train.csv: unknown kind of data file; known are .jsonl"):
        read_rows(tmp_path / "train.csv")
    with pytest.raises(DataError, match="is one file and has no split 'test'"):
        read_rows(tmp_path / "train.jsonl", "test")
    assert read_rows(tmp_path / "train.jsonl", "train").rows == ROWS


def test_folders(tmp_path):
    with pytest.raises(DataError, match=r"no train.jsonl in this folder; it holds no data file"):
        read_rows(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "valid.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS[:1]), mtime=0))
    assert read_rows(tmp_path).rows == ROWS
    held_out = read_rows(str(tmp_path), "test")
    assert held_out.rows == ROWS[:1]
    assert held_out.source.endswith("valid.jsonl.gz")
    (tmp_path / "test.jsonl").write_bytes(jsonl(ROWS[1:]))
    assert read_rows(tmp_path, "test").rows == ROWS[1:]
    assert read_rows(tmp_path, "valid").rows == ROWS[:1]
    with pytest.raises(DataError, match=r"no extra.jsonl in this folder; it holds test.jsonl, train.jsonl, valid.jsonl.gz"):
        read_rows(tmp_path, "extra")


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    one = datasets.Dataset.from_list(rows, features=features)
    one.save_to_disk(str(tmp_path / "one"))
    read = read_rows(tmp_path / "one")
    assert read.rows == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    assert read.place(1).endswith("one, row 2")
    with pytest.raises(DataError, match="has no splits, so no 'test'"):
        read_rows(tmp_path / "one", "test")
    datasets.DatasetDict(train=one, validation=one.select([0])).save_to_disk(str(tmp_path / "both"))
    assert len(read_rows(tmp_path / "both").rows) == 2
    assert len(read_rows(tmp_path / "both", "test").rows) == 1
    with pytest.raises(DataError, match="no split 'extra'; this dataset has train, validation"):
        read_rows(tmp_path / "both", "extra")
    (tmp_path / "both" / "train" / "state.json").write_text("{")
    with pytest.raises(DataError, match="both: a saved dataset that cannot be read"):
        read_rows(tmp_path / "both")


def test_hub_id_offline(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def offline(*arguments, **options):
        asked.append((arguments, options))
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"'owner/name:part' is no local path.*Hub dataset \(split 'test'\).*OfflineModeIsEnabled\)\. Name a"
    ):
        read_rows("owner/name:part", "test")
    assert asked == [(("owner/name", "part"), {"split": "test"})]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    assert read_rows("owner/name").rows == ROWS
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": []}))
    with pytest.raises(DataError, match=r"owner/name \(train\): the dataset holds no row"):
        read_rows("owner/name")
    for path in ("./owner/name", "/owner/name", "owner/name/more", "owner/name.jsonl"):  # paths, never asked of the Hub
        with pytest.raises(DataError, match="no such file or folder"):
            read_rows(path)


# --- shapes ----------------------------------------------------------------------------------------------------------

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "name", "form"),
    [
        ({"messages": ASKED}, "messages", ASKED),
        ({"messages": ASKED, "prompt": "q", "prompt_id": 3}, "messages", ASKED),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", ASKED),
        ({"conversations": ASKED}, "messages", ASKED),
        ({"prompt": "q", "completion": "a"}, "prompt-completion", ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, "prompt-completion", ASKED),
        ({"prompt": ASKED[:1], "completion": "a"}, "prompt-completion", ASKED),
        ({"question": "q", "answer": "a", "id": 1}, "prompt-completion", ASKED),
        ({"query": "q", "response": "a"}, "prompt-completion", ASKED),
        ({"input": "q", "target": "a"}, "prompt-completion", ASKED),
        ({"instruction": "q", "output": "a"}, "alpaca", ASKED),
        ({"instruction": "q", "input": None, "output": "a"}, "alpaca", ASKED),
        ({"instruction": "q", "input": "x", "output": "a", "text": "q x a"}, "alpaca", [{"role": "user", "content": "q\n\nx"}, ASKED[1]]),
        ({"instruction": "q", "context": "x", "response": "a"}, "alpaca", [{"role": "user", "content": "q\n\nx"}, ASKED[1]]),
        ({"text": "all"}, "text", "all"),
    ],
)
def test_shapes(row, name, form):
    shape = recognise(Rows([row], "f", [1]), "causal-lm")
    assert shape.name == name
    assert normalise(row, shape) == form
    assert set(shape.unused) == row.keys() - set(shape.keys.values())
    assert all(key in shape.describe() for key in row)


def test_prompt_messages():
    for row, count in (({"prompt": ASKED, "completion": "a"}, 2), ({"prompt": "q", "completion": "a"}, 1), ({"messages": ASKED}, 0)):
        assert prompt_messages(row, recognise([row], "causal-lm")) == count


def test_label_shapes():
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": 3}, {"text": "c", "label": True}]
    shape = recognise(rows, "classification")
    assert [normalise(row, shape) for row in rows] == [("a", "x"), ("b", 3), ("c", "true")]


def test_alpaca_input_that_the_first_row_lacks():
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "input": "x", "output": "a"}]
    shape = recognise(rows, "causal-lm")
    assert [normalise(row, shape)[0]["content"] for row in rows] == ["q", "q\n\nx"]


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            "causal-lm",
            [{"foo": 1, "bar": 2}],
            r"f, line 3: unknown shape of row: found the keys 'foo', 'bar'. Known shapes: messages.*text$",
        ),
        ("causal-lm", [{}], "found the keys none"),
        ("causal-lm", [{"question": "q", "query": "q", "answer": "a"}], r"several keys could be .*query, question and answer"),
        (
            "causal-lm",
            [{"text": "a"}, {"messages": ASKED}],
            r"line 4: this row has another shape, messages.*are text \(text\); its keys are",
        ),
        ("causal-lm", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "line 4: the key 'completion' is missing"),
        ("causal-lm", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completoin": "b"}], "did you mean 'completoin'"),
        ("causal-lm", [{"text": None}], "line 3: 'text' must be a string, not NoneType"),
        ("causal-lm", [{"messages": []}], "line 3: 'messages' must be a list of at least one message"),
        ("causal-lm", [{"messages": ["hi"]}], "message 1 of 'messages' must be an object with 'role' and 'content'; found str"),
        ("causal-lm", [{"messages": [{"role": "user"}]}], "the content of message 1 of 'messages' must be text, not NoneType"),
        ("causal-lm", [{"messages": [{"role": "usr", "content": "a"}]}], "unknown role 'usr', did you mean 'user'"),
        ("causal-lm", [{"messages": [{"role": "user", "content": [{"image": 1}]}]}], "must be text, not list"),
        ("causal-lm", [{"conversations": [{"from": "humam", "value": "a"}]}], "unknown role 'humam'.*'human'"),
        ("classification", [{"text": "a", "labels": "b"}], "missing 'label', found 'text', 'labels'.*'labels'"),
        ("classification", [{"text": "a", "label": 1.5}], "'label' must be a string or a whole number, not float"),
        ("classification", [{"text": "a", "label": "b"}, {"text": "a"}], "line 4: the key 'label' is missing"),
        ("causal-lm", [], "f: no rows"),
    ],
)
def test_rows_of_no_use(task, rows, message):
    with pytest.raises(DataError, match=message.replace(", did", ".*did")):
        recognise(Rows(rows, "f", list(range(3, 3 + len(rows)))), task)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "label"]),
            st.recursive(
                st.none() | st.integers() | st.text(max_size=3),
                lambda inner: (
                    st.lists(inner, max_size=2)
                    | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text"]), inner, max_size=2)
                ),
                max_leaves=6,
            ),
            max_size=4,
        ),
        max_size=3,
    ),
    task=st.sampled_from(["causal-lm", "classification"]),
)
def test_any_rows_have_a_shape_or_a_data_error(rows, task):
    try:
        shape = recognise(rows, task)
    except DataError:
        return
    for row in rows:
        form = normalise(row, shape)
        assert isinstance(form, str | tuple) or all(isinstance(message["content"], str) for message in form)
