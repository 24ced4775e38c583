"""Files that somebody else wrote, or that were broken on the way: loaded or refused, never anything else (tests/hostile.py says what)."""

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
from hostile import Broken, Fuzz, attempt, bounded_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise.errors import CheckpointError, ConfigError, DataError, RankwiseError
from rankwise.training.config import load_config
from rankwise.training.models import check_weights
from rankwise.training.rows import read_rows, types_of
from rankwise.training.use import about_adapter

TARGETS = ("adapter_config.json", "rankwise.json", "adapter_model.safetensors", "config.yaml", "rows.jsonl", "adapter.gguf")


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    return Fuzz(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    with bounded_memory():
        yield


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_a_file_says_it_is_loaded_or_refused(fuzz: Fuzz, target: str) -> None:
    trial = fuzz.trials()[target]

    @settings(max_examples=30, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        trial(lambda n: data.draw(st.integers(0, n - 1)))

    run()


def refused(fuzz: Fuzz, adapter: str, file: str, content: bytes, message: str) -> None:
    refusal = fuzz._load(adapter, {file: content})
    assert isinstance(refusal, CheckpointError)
    assert message in str(refusal)


def changed(fuzz: Fuzz, adapter: str, file: str, change: Callable[[dict[str, Any]], Any]) -> bytes:
    plain = json.loads(fuzz.adapters[adapter][file])
    change(plain)
    return json.dumps(plain).encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"peft_type": "LORA", "peft_type": "VERA"}', "the key 'peft_type' stands there twice"),
        (b'{"lora_alpha": NaN}', "NaN is no number"),
        (b'{"lora_alpha": -Infinity}', "-Infinity is no number"),
        (b'{"lora_alpha": 1e999}', "1e999 is too large"),
        (b'{"r": ' + b"9" * 5000 + b"}", "is not readable JSON"),
        (b'{"peft_type": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
        ('{"peft_type": "LORA"}'.encode("utf-16"), "'utf-8' codec can't decode byte 0xff"),
    ],
)
@pytest.mark.parametrize("file", ["adapter_config.json", "rankwise.json"])
def test_json_that_is_no_plain_object(fuzz: Fuzz, file: str, text: bytes, message: str) -> None:
    refused(fuzz, "lora", file, text, message)


@pytest.mark.parametrize("value", [None, True, -1, 10**12, "x", [["q_proj"]], {"(": 2}], ids=repr)
def test_a_wrong_value_at_every_key(fuzz: Fuzz, value: Any) -> None:
    # every key of both files, of PEFT's fields those that are missing too
    for adapter, file in (("lora", "rankwise.json"), ("lora of PEFT", "adapter_config.json"), ("vera of PEFT", "adapter_config.json")):
        plain = json.loads(fuzz.adapters[adapter][file])
        for path in hostile.paths_of(plain)[1:]:
            if len(path) > 2 and path[0] == "sites" and path[1] != next(iter(plain["sites"])):
                continue  # all sites alike
            content = changed(
                fuzz, adapter, file, lambda made, path=path: hostile._changed(made, path, lambda at, key: at.__setitem__(key, value))
            )
            fuzz._load(adapter, {file: content})


@pytest.mark.parametrize("length", [0, 100_000_000, 100_000_001, 2**32, 2**62, 2**64 - 1])
def test_a_forged_length_of_the_header_takes_no_memory(fuzz: Fuzz, length: int) -> None:
    content = struct.pack("<Q", length) + fuzz.adapters["lora"]["adapter_model.safetensors"][8:]
    refused(fuzz, "lora", "adapter_model.safetensors", content, "is truncated or no safetensors file")


@pytest.mark.parametrize(
    "about",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [2**63, 2**63 + 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "object", "shape": [2], "data_offsets": [0, 8]},
    ],
)
def test_forged_shapes_and_offsets_take_no_memory(fuzz: Fuzz, about: dict[str, Any]) -> None:
    text = json.dumps({"x": about}).encode()
    content = struct.pack("<Q", len(text)) + text + b"\x00" * 8
    refused(fuzz, "lora", "adapter_model.safetensors", content, "is truncated or no safetensors file")


def test_a_rank_that_only_the_text_claims_takes_no_memory(fuzz: Fuzz) -> None:
    # VeRA's pool is drawn at the rank of the recipe: 2^20 ranks of this tiny base are 400 MB
    peft = changed(fuzz, "vera of PEFT", "adapter_config.json", lambda plain: plain.update(r=1 << 20))
    before = _peak()
    refused(fuzz, "vera of PEFT", "adapter_config.json", peft, "has shape (4,), and this base needs (1048576,)")
    assert _peak() - before < 50_000
    huge = changed(fuzz, "vera of PEFT", "adapter_config.json", lambda plain: plain.update(r=10**12))
    refused(fuzz, "vera of PEFT", "adapter_config.json", huge, "rank=1000000000000 is above 1048576; lower it")


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes


def test_experts_that_only_the_text_claims_take_no_memory(fuzz: Fuzz) -> None:
    def grow(plain: dict[str, Any]) -> None:
        for site in plain["sites"].values():
            site["experts"] = 10**9

    refused(fuzz, "am-lora", "rankwise.json", changed(fuzz, "am-lora", "rankwise.json", grow), "experts=1000000000 in the adapter")


def test_a_range_of_layers_takes_no_memory(fuzz: Fuzz) -> None:
    content = changed(fuzz, "moslora", "rankwise.json", lambda plain: plain["recipe"]["targets"].update(layers="0-99999999999"))
    refused(fuzz, "moslora", "rankwise.json", content, "'0-99999999999' is no layer or range")


@pytest.mark.parametrize(("dtype", "size"), [("I32", 4), ("C64", 8), ("BOOL", 1), ("F8_E4M3", 1), ("U8", 1)])
def test_tensors_of_other_kinds_are_refused(fuzz: Fuzz, dtype: str, size: int) -> None:
    content = fuzz.adapters["lora"]["adapter_model.safetensors"]
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = next(key for key in header if key.endswith("lora_A.weight"))
    begin, end = header[name]["data_offsets"]
    forged = hostile._retyped(header, content[8 + length :], name, dtype, (end - begin) // 4 * size)
    refused(fuzz, "lora", "adapter_model.safetensors", forged, "must be a float of 16, 32 or 64 bits")


class _Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


def test_a_pickle_is_never_opened(fuzz: Fuzz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(_Trap())
    for adapter in ("lora", "lora of PEFT"):
        refused(fuzz, adapter, "adapter_model.safetensors", pickled, "is truncated or no safetensors file")
        assert fuzz._load(adapter, {"adapter_model.bin": pickled}) is None  # beside good weights it is not looked at
    assert not list(tmp_path.iterdir())


def test_names_in_the_files_open_nothing(fuzz: Fuzz) -> None:
    # the watch on opened files is part of every load here; it does see what it must see
    for adapter in ("lora", "lora of PEFT"):
        content = changed(fuzz, adapter, "adapter_config.json", lambda plain: plain.update(base_model_name_or_path=hostile.TRAP))
        assert fuzz._load(adapter, {"adapter_config.json": content}) is None
    with pytest.raises(Broken, match="open /etc/passwd to read"):
        attempt(fuzz.folder, lambda: Path(hostile.TRAP).read_text())
    with pytest.raises(Broken, match="to write"):
        attempt(fuzz.folder, lambda: (fuzz.folder / "new").write_text("x"))
    with pytest.raises(Broken, match=r"pickle\.find_class"):
        attempt(fuzz.folder, lambda: pickle.loads(pickle.dumps(Path("x"))))
    with pytest.raises(Broken, match="KeyError"):
        attempt(fuzz.folder, lambda: {}["x"])


def test_a_pipe_in_place_of_a_file_is_not_waited_for(fuzz: Fuzz) -> None:
    assert fuzz._load("lora of PEFT", {}) is None
    os.mkfifo(fuzz.folder / "rankwise.json")
    refusal = fuzz.base.load(fuzz.folder)
    assert refusal is not None
    assert "rankwise.json is no file" in str(refusal)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..", "a/b.safetensors", 3, None, ["x"]])
def test_an_index_of_shards_that_names_other_folders_is_refused(tmp_path: Path, name: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    refusal = attempt(tmp_path, lambda: check_weights(tmp_path))
    assert isinstance(refusal, ConfigError)
    assert "lies in another folder" in str(refusal) or "is broken" in str(refusal)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: &a [x, x]\n"
            + "".join(f"a{n}: &a{n} [{'*a' + str(n - 1) if n else '*a'}, {'*a' + str(n - 1) if n else '*a'}]\n" for n in range(60)),
            "aliases",
        ),
        ("method: &a {name: *a}", "stands inside the value that it repeats"),
        ("x: " + "[" * 100_000, "nested too deeply"),
        ("? [a]\n: b\n", "a key must be a plain word"),
        ("rank: !!int x", "not valid YAML"),
        ("seed: 2001-99-99", "not valid YAML"),
        ("rank: !!python/object/apply:os.mkdir ['trapped']", "could not determine a constructor"),
        ("rank: 1\nrank: 2", "stands there twice"),
        ("x: " + "1" * 900_000 + "x", "key 'model' is missing"),  # a pattern for numbers that tried every split took hours here
        ("x: 1\n" * 400_000, "has 2000000 characters"),
        ("model: demo\ndata: x\nmethod: {name: [x]}", "is unknown"),
        ("model: demo\ndata: x\ntargets: 1.5", "must be a pattern or a list of patterns"),
    ],
    ids=lambda value: value[:12],
)
def test_yaml_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    refusal = attempt(tmp_path, lambda: load_config(path))
    assert isinstance(refusal, RankwiseError)
    assert message in str(refusal)


def test_a_configuration_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match=r"not UTF-8 \(invalid start byte, byte 7\)"):
        load_config(path)


def test_anchors_of_ordinary_size_still_work(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: demo\ndata: {train: &rows a.jsonl, eval: *rows}\n")
    assert load_config(path).data.eval == "a.jsonl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"text": "a", "text": "b"}', "line 1: broken JSON: the key 'text' stands twice in one object"),
        (b'[{"text": "a"},\n{"text": "a", "text": "b"}]', "line 2: broken JSON: the key 'text' stands twice in one object"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 1: broken JSON"),
        (b'{"text": "\xff"}', "line 1: not UTF-8"),
    ],
)
def test_rows_that_are_no_rows(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / ("rows.json" if text[:1] == b"[" else "rows.jsonl")
    path.write_bytes(text)
    refusal = attempt(tmp_path, lambda: read_rows(path))
    assert isinstance(refusal, DataError)
    assert message in str(refusal)


@pytest.mark.parametrize("value", ["²", "--5", "-", "٣", "9" * 5000, 1.5, None, [], float("nan")])
def test_a_kind_that_is_no_whole_number(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a", "kind": value}))
    with pytest.raises(DataError, match="every row needs a whole number there"):
        types_of(read_rows(path), "kind")


def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.training.rows.ALWAYS_UNPACKED", 1 << 20)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * (8 << 20) + b'"}'))
    before = _peak()
    with pytest.raises(DataError, match="unpack to more than"):
        read_rows(path)
    assert _peak() - before < 50_000
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000))
    assert len(read_rows(path)) == 1000


# --- what the commands read beside an adapter -------------------------------------------------------------------------------------------


def beside(tmp_path: Path, name: str, content: bytes) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "key", "mine", "kind"),
    [
        ("adapter_config.json", "base_model_name_or_path", "model", "str"),
        ("training.json", "model", "model", "str"),
        ("training.json", "task", "task", "str"),
        ("training.json", "labels", "labels", "list"),
        ("training.json", "seed", "seed", "int"),
    ],
)
@pytest.mark.parametrize("value", [1.5, {"a": 1}, ["x"], 7, "text", True])
def test_a_wrong_type_beside_an_adapter_is_refused(file: str, key: str, mine: str, kind: str, value: Any, tmp_path: Path) -> None:
    folder = beside(tmp_path, file, json.dumps({key: value}).encode())
    if type(value).__name__ == kind:
        assert about_adapter(folder)[mine] == value
        return
    with pytest.raises(CheckpointError) as caught:
        about_adapter(folder)
    assert f"has {mine}={value!r}, which is no {kind}; give the base with --model" in str(caught.value)


@pytest.mark.parametrize("labels", [[1, 2], [["a"]], [None]])
def test_labels_that_are_no_names_are_refused(labels: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="which are no names of classes"):
        about_adapter(beside(tmp_path, "training.json", json.dumps({"labels": labels}).encode()))


@pytest.mark.parametrize("content", [b"[]", b"3", b"{", b"\xff\xfe", b'{"task": "text", "task": "chat"}', b'{"seed": NaN}', b"[" * 9999])
def test_a_broken_training_json_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"training\.json"):
        about_adapter(beside(tmp_path, "training.json", content))


@pytest.mark.parametrize("value", [None, "", [], 0, False])
def test_what_is_empty_beside_an_adapter_says_nothing(value: Any, tmp_path: Path) -> None:
    folder = beside(tmp_path, "training.json", json.dumps(dict.fromkeys(("model", "task", "labels", "seed"), value)).encode())
    assert about_adapter(folder) == {"model": None, "task": "text", "labels": None, "from_scratch": None, "seed": None}


@pytest.mark.parametrize("at", [8, 16, 24, 32])  # counts of tensors and of fields, lengths of the first name
@pytest.mark.parametrize("number", [2**31, 2**40, 2**62, 2**64 - 1])
def test_forged_numbers_in_a_gguf_take_no_time(fuzz: Fuzz, at: int, number: int) -> None:
    from rankwise.checkpoint.gguf_lora import read_gguf

    path = fuzz.place / "gguf" / "forged.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(fuzz.gguf[:at] + struct.pack("<Q", number) + fuzz.gguf[at + 8 :])
    assert isinstance(attempt(path.parent, lambda: read_gguf(path, fuzz.base.original, fuzz.pairs)), CheckpointError)


def test_an_endless_array_in_a_gguf_takes_no_time(fuzz: Fuzz) -> None:
    """A field that announces 2^40 texts: the package reads past the end of the file for each."""
    from rankwise.checkpoint.gguf_lora import read_gguf

    path = fuzz.place / "gguf" / "endless.gguf"
    path.parent.mkdir(exist_ok=True)
    field = struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 8, 2**40)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    refusal = attempt(path.parent, lambda: read_gguf(path, fuzz.base.original, fuzz.pairs))
    assert isinstance(refusal, CheckpointError)
    assert "ends before what it announces" in str(refusal)


def test_depth_of_yaml_is_refused_at_once(tmp_path: Path) -> None:
    for deep in ("[" * 200_000, "x: " + "{a: " * 100_000, "- " * 200_000, "? " * 200_000):
        path = tmp_path / "config.yaml"
        path.write_text(deep)
        assert "nested too deeply" in str(attempt(tmp_path, lambda path=path: load_config(path)))
