"""Hostile files: mutations of valid ones, and what must hold whatever a file says.

The same mutations are drawn by hypothesis (tests/test_hostile_files.py), by atheris and by a seeded generator (benchmarks/fuzz_loaders.py).
What holds for each input: it is loaded, or refused with a RankwiseError, within the time and the memory allowed; a refused load leaves the
base as it was, to the bit; no file outside the given folder is opened, nothing is written, unpickled, started or asked over the network.
"""

import copy
import functools
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings

# ruff: noqa: E501 (lists of odd values)
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import llama
from torch import nn

import rankwise as rw
from rankwise.errors import RankwiseError
from rankwise.sites import adapted_sites, trained_modules

SECONDS = 10.0  # for one input
ADDRESS_SPACE = 2 << 30  # bytes above what the process has when it begins

Below = Callable[[int], int]  # n -> a number of 0 to n - 1; every choice below is made by one of these


class Broken(AssertionError):
    """An input that broke one of the promises."""


# --- what must not happen ---------------------------------------------------------------------------------------------------------------

_allowed: list[Path] = []
_seen: list[str] = []
_FORBIDDEN = ("pickle.find_class", "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen")
_WRITING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.")
_PYTHON = tuple({os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *sys.path) if path and os.path.isdir(path)})


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _allowed:
        return
    if event.startswith((*_FORBIDDEN, *_WRITING)):
        _seen.append(f"{event} {arguments!r}"[:200])
    elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[2] or 0
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        code = path.endswith((".py", ".pyc", ".so")) and path.startswith(_PYTHON)  # a module imported late
        if writes or not (code or path.startswith("/proc/self") or any(path.startswith(f"{place}{os.sep}") for place in _allowed)):
            _seen.append(f"open {path} {'to write' if writes else 'to read'}")


@functools.cache
def _install() -> None:
    sys.addaudithook(_watch)  # for the life of the process; idle outside of `watched`


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Raises Broken for what is opened outside of the folder, for writing, unpickling, processes, sockets, and for an input that takes too
    long."""

    def late(*_: Any) -> None:
        raise Broken(f"more than {SECONDS} seconds")

    _install()
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _seen.clear()
    _allowed.append(Path(os.path.realpath(folder)))
    try:
        yield
    finally:
        _allowed.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if _seen:
        raise Broken("; ".join(_seen[:5]))


@contextmanager
def bounded_memory() -> Iterator[None]:
    """An allocation of more than ADDRESS_SPACE fails inside, and so shows up as an error that is none of ours."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + ADDRESS_SPACE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(folder: Path, action: Callable[[], Any]) -> RankwiseError | None:
    """The refusal of an action that reads files in the folder, or None where it went through; anything else raises Broken."""
    try:
        with watched(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except RankwiseError as error:
        if not str(error).strip():
            raise Broken("a refusal without a word") from error
        if _seen:
            raise Broken("; ".join(_seen[:5])) from error
        return error
    except Broken:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Broken(f"{type(error).__name__}: {str(error)[:300]}") from error
    return None


# --- the base that must stay as it was --------------------------------------------------------------------------------------------------


class Base:
    """A tiny model, and whether it is still what it was."""

    def __init__(self) -> None:
        self.original = llama(num_hidden_layers=1)
        self.model: nn.Module = copy.deepcopy(self.original)
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.modules = {name: type(module) for name, module in self.model.named_modules()}

    def load(self, folder: Path) -> RankwiseError | None:
        """Loads an adapter; a refusal that has changed the base raises Broken. Leaves a fresh base."""
        refusal = attempt(folder, lambda: rw.load(self.model, folder))
        if refusal is None:
            self.model = copy.deepcopy(self.original)
            return None
        now = self.model.state_dict()
        untouched = (
            not adapted_sites(self.model)
            and not trained_modules(self.model)
            and self.modules == {name: type(module) for name, module in self.model.named_modules()}
            and not self.model._forward_pre_hooks
            and not hasattr(self.model, "rankwise")
            and all(p.requires_grad for p in self.model.parameters())
            and list(now) == list(self.state)
            and all(torch.equal(tensor, self.state[name]) for name, tensor in now.items())
        )
        if not untouched:
            self.model = copy.deepcopy(self.original)
            raise Broken(f"a refused load has changed the base: {refusal}")
        return refusal


# --- valid adapters to begin with -------------------------------------------------------------------------------------------------------

RECIPES: dict[str, Callable[[], rw.Recipe]] = {
    "lora": lambda: rw.recipes.lora(rank=2, rank_pattern={"q_proj": 3}, modules_to_save=["norm"]),
    "dora on pissa": lambda: rw.recipes.pissa(rank=2, gain="dora"),
    "vera": lambda: rw.recipes.vera(rank=4),
    "adalora": lambda: rw.recipes.adalora(rank=2),
    "moslora": lambda: rw.recipes.moslora(rank=2, targets={"include": ["q_proj", "v_proj"], "layers": "0"}),
    "rosa": lambda: rw.recipes.rosa(rank=2),
    "am-lora": lambda: rw.recipes.am_lora(rank=2),
    "milora-mixture": lambda: rw.recipes.milora_mixture(rank=2),
    "loramoe": lambda: rw.recipes.loramoe(rank=2, experts=2),
    "qlora": lambda: rw.recipes.qlora(rank=2),
}
PEFT_READABLE = ("lora", "vera", "adalora")


def valid_adapters(place: Path) -> dict[str, dict[str, bytes]]:
    """Name -> file name -> content of adapters that load, ours and (without rankwise.json) as PEFT's."""
    base, found = Base(), {}
    for name, recipe in RECIPES.items():
        model = rw.adapt(copy.deepcopy(base.original), recipe())
        folder = rw.save(model, place / name)
        found[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        if name in PEFT_READABLE:
            found[f"{name} of PEFT"] = {key: content for key, content in found[name].items() if key != "rankwise.json"}
            if name == "vera":  # without our file its pair must stand in the weights
                folder = rw.save(model, place / "vera with its pair", save_projection=True)
                found["vera of PEFT"] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "rankwise.json"}
    return found


# --- mutations --------------------------------------------------------------------------------------------------------------------------

TRAP = "/etc/passwd"
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, -1, 7, 10**6, 10**9, 10**12, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, float("nan"), float("inf"),
    -float("inf"), "", " ", "0", "1e400", "all-linear", "q_proj", "re:(", "re:.*", "re:", "(", "*", ".*", "q_proj|(", "\\", "0-3", "0-99999999999", "9-0", "-",
    "../../../etc/passwd", TRAP, "~/.ssh/id_rsa", "file:///etc/passwd", "http://127.0.0.1:9/", "a/b", "none", "lora", "vera", "dora", "fold", "nf4", "pissa",
    "olora", "own", "bool", "\x00", "\ud800", "é" * 40, "x" * 5000, "__class__", "__init__", "${HOME}", "!!python/object/apply:os.system", [], [[]], [None],
    [0], [-1], [10**12], [1, 2], [True], ["q_proj"], ["q_proj", "q_proj"], ["norm"], ["lm_head"], ["model"], [""], [["q_proj"]], [{}], {}, {"": None},
    {"name": "lora"}, {"name": None}, {"name": ["x"]}, {"q_proj": 1}, {"q_proj": -1}, {"q_proj": "x"}, {"q_proj": None}, {"q_proj": [True]}, {"(": 2},
    {"a": {"a": {"a": {}}}}, {"name": "lora", "bias": True}, {"include": 5}, {"include": [5]}, {"include": ["re:(x"]}, {"layers": "0-99999999999"},
)  # fmt: skip


def any_of(below: Below, items: Any) -> Any:
    return items[below(len(items))]


def paths_of(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value inside a JSON value, the whole of it first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, inner in items for path in paths_of(inner, (*here, key)))]


def _changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> None:
    for key in path[:-1]:
        value = value[key]
    change(value, path[-1])


def mutate_json(below: Below, content: bytes) -> bytes:
    """JSON with one to three values replaced, moved, dropped or doubled; now and then broken as text."""
    value = json.loads(content)
    for _ in range(1 + below(3)):
        path, kind = any_of(below, paths_of(value)), below(8)
        if not path:
            if kind == 0:
                value = copy.deepcopy(any_of(below, VALUES))
            continue
        if kind < 5:
            new = copy.deepcopy(any_of(below, VALUES))
            _changed(value, path, lambda holder, key, new=new: holder.__setitem__(key, new))
        elif kind == 5:
            _changed(value, path, lambda holder, key: holder.__delitem__(key))
        elif kind == 6:
            other = value
            for key in any_of(below, paths_of(value)):
                other = other[key]
            other = copy.deepcopy(other)
            _changed(value, path, lambda holder, key, other=other: holder.__setitem__(key, other))
        else:
            name = any_of(below, [item for item in VALUES if isinstance(item, str)])
            _changed(value, path, lambda holder, key, name=name: holder.update({name: holder[key]}) if isinstance(holder, dict) else None)
    text = json.dumps(value)
    if below(6) == 0:
        text = _broken_json(below, text)
    data = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(below, data) if below(10) == 0 else data


def _broken_json(below: Below, text: str) -> str:
    deep = 200 * 10 ** below(4)
    return any_of(
        below,
        (
            text[: below(len(text) + 1)],
            text.replace("{", '{"peft_type": "LORA", "peft_type": "VERA", ', 1),
            '{"a": ' * deep + "1" + "}" * deep,
            "[" * deep,
            text.replace(": ", ": " + "[" * deep + "]" * deep + ', "x": ', 1),
            text.replace(": ", f': {"9" * 5000}, "x": ', 1),
            text.replace(": ", ': -1e999, "x": ', 1),
            "\ufeff" + text,
            text + text,
            text.replace("{", "{,", 1),
        ),
    )


def mutate_bytes(below: Below, data: bytes) -> bytes:
    """Bytes changed, cut, doubled or inserted."""
    made = bytearray(data)
    for _ in range(1 + below(4)):
        at, kind = below(len(made) + 1), below(5)
        if kind == 0 and at < len(made):
            made[at] = below(256)
        elif kind == 1:
            del made[at : at + 1 + below(16)]
        elif kind == 2:
            made[at:at] = any_of(
                below, (b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\n", b'"', b"{", b"\r", b"\\ud800", b"NaN", b": ", b"\t")
            )
        elif kind == 3:
            made = made[:at]
        else:
            made[at:at] = made[max(0, at - 1 - below(64)) : at]
    return bytes(made)


def mutate_safetensors(below: Below, content: bytes) -> bytes:
    """A weights file with a forged header, forged numbers, or wrong bytes."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = below(12)
    if kind == 0:
        return mutate_bytes(below, content)
    if kind == 1:  # the length of the header alone
        forged = any_of(
            below, (0, 1, length - 1, length + 1, len(content), 100_000_000, 100_000_001, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
        )
        return struct.pack("<Q", forged) + content[8:]
    names = [name for name in header if name != "__metadata__"]
    name = any_of(below, names)
    about = header[name]
    if kind == 2:
        about["shape"] = any_of(
            below,
            ([], [0], [2**40, 2**40], [2**63], [2**64], [-1], [1.5], ["x"], None, [1] * 1000, about["shape"][::-1], [*about["shape"], 1]),
        )
    elif kind == 3:
        begin, end = about["data_offsets"]
        about["data_offsets"] = any_of(
            below,
            (
                [end, begin],
                [begin, end + 4],
                [begin - 4, end],
                [0, 2**64 - 1],
                [2**63, 2**64],
                [-4, 0],
                [begin],
                [],
                None,
                [0, 0],
                [begin, 10**18],
            ),
        )
    elif kind == 4:
        about["dtype"] = any_of(
            below,
            (
                "F64",
                "F16",
                "BF16",
                "I32",
                "U32",
                "F8_E4M3",
                "F8_E5M2",
                "F8_E8M0",
                "F4",
                "F6_E2M3",
                "C64",
                "BOOL",
                "U8",
                "object",
                "",
                None,
                3,
            ),
        )
    elif kind == 5:
        size = about["data_offsets"][1] - about["data_offsets"][0]
        dtype, width = any_of(
            below,
            (
                ("F64", 8),
                ("BF16", 2),
                ("I32", 4),
                ("U32", 4),
                ("I64", 8),
                ("C64", 8),
                ("U8", 1),
                ("BOOL", 1),
                ("F8_E4M3", 1),
                ("F8_E8M0", 1),
                ("U64", 8),
            ),
        )
        return _retyped(header, data, name, dtype, size // 4 * width)
    elif kind == 6:
        header[
            any_of(
                below,
                (name + "x", "../../x", "", "\x00", "base_model.model.", "x" * 5000, name.replace("q_proj", "k_proj"), "__metadata__"),
            )
        ] = header.pop(name)
    elif kind == 7:
        header["__metadata__"] = any_of(below, (None, 3, {"format": 3}, {"format": "tf"}, {"x" * 5000: "y"}, [], "pt"))
    elif kind == 8:
        value = any_of(below, (float("nan"), float("inf"), 3e38, 1e-45, -3e38))
        at = about["data_offsets"][0]
        data = data[:at] + struct.pack("<f", value) + data[at + 4 :]
    elif kind == 9:
        text = mutate_json(below, json.dumps(header).encode())
        return struct.pack("<Q", len(text)) + text + data
    elif kind == 10:
        del header[name]
    else:
        data = any_of(below, (data[:-4], data + b"\x00" * 4, b"", data[::-1]))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _retyped(header: dict[str, Any], data: bytes, name: str, dtype: str, size: int) -> bytes:
    """A file whose tensor `name` has another dtype and `size` bytes of ones, and is valid."""
    chunks, at = [], 0
    for each in sorted((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"]):
        begin, end = header[each]["data_offsets"]
        chunk = b"\x01" * size if each == name else data[begin:end]
        if each == name:
            header[each]["dtype"] = dtype
        header[each]["data_offsets"] = [at, at + len(chunk)]
        at += len(chunk)
        chunks.append(chunk)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(chunks)


YAML = """\
model: demo
task: completion
data: {train: rows.jsonl, eval: held.jsonl, types: kind, filter: {task: [1, 2]}}
method: {name: lora, gain: dora, rank_pattern: {q_proj: 2}}
rank: 4
alpha: 8.0
dropout: 0.1
targets: {include: [q_proj, v_proj], exclude: [lm_head], layers: 0-3}
allow: [cut]
train: {epochs: 2, lr: 1e-3, warmup: 0.1, batch_size: 8, precision: fp32, steps: 3}
output: runs/x
seed: 3
"""
YAML_PIECES = (
    "&a [*a]", "*a", "&a {x: *a}", "<<: *a", "? [a]\n: b\n", "? {a: b}\n: c\n", "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!int x",
    "!!int ''", "!!float x", "!!bool x", "!!timestamp 2001-99-99", "2001-99-99", "!!binary '*'", "!!set {a}", "!!omap [a]", "!!pairs [a: b]", "!!map x", "!!seq x", "!!str {}",
    "!!null x", "!<tag:yaml.org,2002:float> x", "0x", "0b", "0o9", "1:99:99", ".inf", "-.inf", ".nan", "1e999", "1" * 5000, "1" * 20000 + "x", "_", "1__2", "---\n", "...\n", "%YAML 9.9\n---\n",
    "\t", "\x00", "\x07", "\ufeff", "\u2028", "!", "!!", "&", "*", "|", ">", "@", "`", "{", "[", "}", "]", "<<: 3", "<<: [3]", "<<: {rank: 2}", "rank: 2\n", "1: 2\n", "null: 2\n", "[a, b]: 2\n", "=",
)  # fmt: skip


def mutate_yaml(below: Below, content: bytes) -> bytes:
    """A configuration with values replaced, pieces of YAML put in, aliases that multiply, deep nesting, or wrong bytes."""
    import yaml

    kind = below(6)
    if kind <= 1:
        plain = yaml.safe_load(content)
        path = any_of(below, paths_of(plain)[1:])
        if kind == 0 and below(3) == 0:
            name = any_of(
                below, (None, 1, 1.5, True, "name", "update", "init", "schedule", "storage", "x", "tasks", "lr", "", "gain", "routing")
            )
            _changed(plain, path, lambda holder, key: holder.update({name: any_of(below, VALUES)}) if isinstance(holder, dict) else None)
        else:
            new = copy.deepcopy(any_of(below, VALUES))
            _changed(plain, path, lambda holder, key: holder.__setitem__(key, new))
        return yaml.safe_dump(plain, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
    text = content.decode()
    if kind == 2:
        pieces = YAML_PIECES[below(len(YAML_PIECES))]
        at = below(text.count(": ") + 1)
        parts = text.split(": ")
        text = ": ".join([*parts[:at], pieces + (parts[at] if below(2) else ""), *parts[at + 1 :]]) if at < len(parts) else text + pieces
    elif kind == 3:
        levels = 3 + below(40)
        bomb = "a0: &a0 [x, x, x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, levels))
        text = bomb + text if below(2) else text + bomb
    elif kind == 4:
        deep = 50 * 10 ** below(3)
        text += any_of(
            below, (f"x: {'[' * deep}", f"x: {'[' * deep}{']' * deep}\n", f"x: {'{a: ' * deep}1{'}' * deep}\n", "- " * deep, "? " * deep)
        )
    else:
        return mutate_bytes(below, content)
    return text.encode("utf-8", "surrogatepass")


ROWS = b"""\
{"prompt": "a", "completion": "b", "kind": 0}
{"prompt": "c", "completion": "d", "kind": "1"}
{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "kind": 2}
{"text": "z", "label": "l", "kind": 3}
"""


def mutate_rows(below: Below, content: bytes) -> bytes:
    """Rows as lines or as an array, with values replaced, doubled keys, deep nesting, or wrong bytes."""
    lines = content.splitlines()
    if below(3):
        lines = [any_of(below, lines)] * (1 + below(3))
    for _ in range(1 + below(2)):
        at = below(len(lines))
        kind = below(5)
        if kind < 3:
            value = json.loads(content.splitlines()[below(4)])
            path = any_of(below, paths_of(value)[1:])
            new = any_of(below, (*VALUES, "²", "--5", "-", "٣", "1_0", "9" * 5000))
            _changed(value, path, lambda holder, key, new=new: holder.__setitem__(key, new))
            lines[at] = json.dumps(value, ensure_ascii=bool(below(2))).encode("utf-8", "surrogatepass")
        elif kind == 3:
            lines[at] = _broken_json(below, lines[at].decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
        else:
            lines[at] = mutate_bytes(below, lines[at])
    return b"[" + b",\n".join(lines) + b"]" if below(4) == 0 else b"\n".join(lines)


def mutate_gguf(below: Below, content: bytes) -> bytes:
    """A GGUF file with forged numbers (counts, lengths, types, offsets) in its header, or wrong bytes."""
    if below(4) == 0:
        return mutate_bytes(below, content)
    made, wide = bytearray(content), below(2)
    numbers = (0, 1, 2, 7, 8, 9, 10, 12, 13, 200, 2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**62, 2**63, 2**64 - 1)
    for _ in range(1 + below(2)):
        at = below(min(len(made), 3000) // 4) * 4 + below(4) * below(2) if below(3) else 4 + 4 * below(6)
        number = any_of(below, numbers)
        made[at : at + (8 if wide else 4)] = struct.pack("<Q", number) if wide else struct.pack("<I", number % 2**32)
    return bytes(made)


# --- the six loaders --------------------------------------------------------------------------------------------------------------------


@dataclass
class Fuzz:
    """Valid files in a temporary folder, and one trial for each kind of file."""

    place: Path

    def __post_init__(self) -> None:
        self.base = Base()
        self.adapters = valid_adapters(self.place / "valid")
        self.folder = self.place / "input"
        from rankwise.checkpoint.gguf_lora import write_gguf

        self.pairs = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 32), torch.ones(32, 2))}
        write_gguf(self.place / "valid.gguf", self.base.original, self.pairs)
        self.gguf = (self.place / "valid.gguf").read_bytes()
        for name in self.adapters:
            if (refusal := self._load(name, {})) is not None:
                raise Broken(f"the unchanged adapter {name!r} is refused: {refusal}")

    @classmethod
    def temporary(cls) -> "Fuzz":
        return cls(Path(tempfile.mkdtemp(prefix="hostile-")))

    def remove(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)

    def _load(self, name: str, changed: dict[str, bytes]) -> RankwiseError | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.iterdir():
            old.unlink()
        for file, content in (self.adapters[name] | changed).items():
            (self.folder / file).write_bytes(content)
        return self.base.load(self.folder)

    def config(self, below: Below) -> RankwiseError | None:
        name = any_of(below, [name for name in self.adapters if name.endswith("PEFT") or name == "lora"])
        return self._load(name, {"adapter_config.json": mutate_json(below, self.adapters[name]["adapter_config.json"])})

    def native(self, below: Below) -> RankwiseError | None:
        name = any_of(below, list(RECIPES))
        return self._load(name, {"rankwise.json": mutate_json(below, self.adapters[name]["rankwise.json"])})

    def weights(self, below: Below) -> RankwiseError | None:
        name = any_of(below, list(self.adapters))
        return self._load(name, {"adapter_model.safetensors": mutate_safetensors(below, self.adapters[name]["adapter_model.safetensors"])})

    def read_back(self, below: Below) -> RankwiseError | None:
        """What the proof of `--format gguf-lora` reads; no command takes a GGUF file from anybody else."""
        from rankwise.checkpoint.gguf_lora import read_gguf

        path = self.place / "gguf" / "adapter.gguf"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mutate_gguf(below, self.gguf))
        return attempt(path.parent, lambda: read_gguf(path, self.base.original, self.pairs))

    def yaml(self, below: Below) -> RankwiseError | None:
        from rankwise.training.config import load_config, task_configs, to_yaml

        path = self.place / "run" / "config.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mutate_yaml(below, YAML.encode()))

        def read() -> None:
            for each in task_configs(load_config(path)).values():
                to_yaml(each)

        return attempt(path.parent, read)

    def rows(self, below: Below) -> RankwiseError | None:
        from rankwise.training.rows import chosen, read_rows, types_of
        from rankwise.training.shapes import recognise

        name = any_of(below, ("rows.jsonl", "rows.json"))
        path = self.place / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mutate_rows(below, ROWS))
        task = any_of(below, ("completion", "chat", "text", "classification"))
        column = below(2)

        def read() -> None:
            rows = read_rows(path)
            if column:
                types_of(rows, "kind")
            recognise(chosen(rows, None), task)

        return attempt(path.parent, read)

    def trials(self) -> dict[str, Callable[[Below], RankwiseError | None]]:
        """Name of the file -> one trial."""
        return {
            "adapter_config.json": self.config,
            "rankwise.json": self.native,
            "adapter_model.safetensors": self.weights,
            "config.yaml": self.yaml,
            "rows.jsonl": self.rows,
            "adapter.gguf": self.read_back,
        }
