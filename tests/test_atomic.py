"""Folders and files are wholly there or not at all: exceptions, a full disk, and a process killed at any moment."""

import contextlib
import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import FILES, base, logits, refused, train, trained

import rankwise as rw
from rankwise.checkpoint import atomic, saving, write_file, write_folder
from rankwise.errors import CheckpointError


def test_files_beside_an_adapter_stay(tmp_path: Path) -> None:
    model = trained("lora")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/tokenizer.json").write_text("mine")
    rw.save(model, tmp_path / "a")
    rw.save(model, tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES | {"tokenizer.json"}
    assert (tmp_path / "a/tokenizer.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_holds_folders_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "runs/one").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds other folders \(one\)"):
        rw.save(trained("lora"), tmp_path / "runs")
    assert (tmp_path / "runs/one").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is a file, and a folder is to be written"):
        rw.save(trained("lora"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with write_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/x").read_text() == "1"


def test_an_adapter_inside_a_folder_that_is_being_written(tmp_path: Path) -> None:
    model = trained("lora")
    for _ in range(2):
        with write_folder(tmp_path / "a") as folder:
            rw.save(model, folder)
            (folder / "training.json").write_text("{}")
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES | {"training.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert torch.equal(logits(rw.load(base(), tmp_path / "a")), logits(model))


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    with write_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("old")

    def fail() -> None:
        with write_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "a/x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_an_error_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("lora")
    rw.save(model, tmp_path / "a")
    wanted = logits(model)
    train(model)

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(CheckpointError, match=r"could not be written to .*, which is as it was before: .*No space left"):
        rw.save(model, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert torch.equal(logits(rw.load(base(), tmp_path / "a")), wanted)


def in_a_child(work: Callable[[], Any]) -> int:
    """Runs in a forked process; 0, its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_the_operating_system_refuses_to_write_more(tmp_path: Path) -> None:
    """A real write error in the middle of the weights file: the process may write files of 8 KiB at most."""
    import resource

    model = trained("lora")
    rw.save(model, tmp_path / "a")
    wanted = logits(model)
    train(model)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        with pytest.raises(CheckpointError, match="could not be written"):
            rw.save(model, tmp_path / "a")

    assert in_a_child(work) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert torch.equal(logits(rw.load(base(), tmp_path / "a")), wanted)


@needs_fork
@pytest.mark.parametrize("first", [True, False])
def test_killed_at_every_single_step(first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before each operation on the file system in turn: the folder is the old one or the new one, always whole."""
    model = trained("lora")
    old = logits(model)
    if not first:
        rw.save(model, tmp_path / "a")
    origin = tmp_path / "origin"
    if not first:
        shutil.copytree(tmp_path / "a", origin)
    train(model)
    new = logits(model)
    step, states = 0, []
    while True:
        step += 1
        for entry in tmp_path.iterdir():
            if entry != origin:
                shutil.rmtree(entry)
        if not first:
            shutil.copytree(origin, tmp_path / "a")

        def work(kill_at: int = step) -> None:
            done = 0

            def counted(function: Any) -> Any:
                def wrapper(*args: Any, **options: Any) -> Any:
                    nonlocal done
                    done += 1
                    if done == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **options)

                return wrapper

            for owner, name in ((os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "rmdir"), (os, "unlink"), (saving, "save_file")):
                monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
            for name in ("mkdir", "rename", "write_text"):
                monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
            monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            rw.save(model, tmp_path / "a")

        status = in_a_child(work)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert step < 60
        if first and not (tmp_path / "a").exists() and not (tmp_path / ".a.new").exists():
            refused(tmp_path / "a", "does not exist")
            states.append("nothing")
        else:
            found = logits(rw.load(base(), tmp_path / "a"))
            states.append("new" if torch.equal(found, new) else "old")
            assert torch.equal(found, new) or (not first and torch.equal(found, old))
        # and the next save works over whatever is left
        if step % 4 == 0:
            rw.save(model, tmp_path / "a")
            assert torch.equal(logits(rw.load(base(), tmp_path / "a")), new)
            assert {entry.name for entry in tmp_path.iterdir()} <= {"a", "origin"}
    assert set(states) == ({"nothing", "new"} if first else {"old", "new"})


@needs_fork
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL from outside while two adapters are saved in turn."""
    models = [train(rw.adapt(base(), rw.recipes.dora(rank=4, seed=seed))) for seed in (0, 1)]
    wanted = [logits(model) for model in models]
    rw.save(models[0], tmp_path / "a")
    for round_ in range(8):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                while True:
                    for model in models:
                        rw.save(model, tmp_path / "a")
            os._exit(1)
        time.sleep(0.03 + 0.017 * round_)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        found = logits(rw.load(base(), tmp_path / "a"))
        assert any(torch.equal(found, values) for values in wanted)


def test_a_killed_first_save_is_named(tmp_path: Path) -> None:
    (tmp_path / ".a.writing").mkdir()
    refused(tmp_path / "a", r"a does not exist; a save that was killed before its end left .*\.a\.writing")


def test_a_swap_that_was_cut_short_is_finished_with_what_is_new(tmp_path: Path) -> None:
    for stage in ("new", "old"):
        (tmp_path / f".a.{stage}").mkdir()
        (tmp_path / f".a.{stage}" / "content").write_text(stage)
    assert atomic.recover(tmp_path / "a")
    assert (tmp_path / "a" / "content").read_text() == "new"


def test_a_swap_that_cannot_be_finished_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rw.save(trained("lora"), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / ".a.new")
    (tmp_path / ".a.old").mkdir()

    def read_only(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", read_only)
        refused(tmp_path / "a", r"cut short; its complete content is .*\.a\.new: rename it")
    rw.load(base(), tmp_path / "a")
    assert (tmp_path / "a/rankwise.json").exists()


def test_write_file_replaces_or_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(tmp_path / "deep/state.json", "one")
    assert path.read_text() == "one"
    write_file(path, b"two")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, "three")
    assert path.read_text() == "two"
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]
