"""The folder of a run: what lies where, which state it is in, its checkpoints, and how metrics files are cut back on resume."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rankwise.checkpoint.atomic import recover, write_file
from rankwise.errors import ConfigError
from rankwise.training.config import Config, load_config, resolve, to_yaml

State = Literal["new", "resume", "finished"]
IMPORTANCE = "importance.json"  # what a schedule measured before training, and what it made of it
OWN_FILES = ("config.yaml", "run.json", "plan.txt", "data.json", "metrics.jsonl", "timing.jsonl", "before.json", "results.json", IMPORTANCE)
OWN_FOLDERS = ("checkpoints", "adapter", "tasks")
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Everything the run needs to be repeated or resumed lies here; the base does not."""

    root: Path

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoint-N folders lie."""
        return self.root / "checkpoints"

    def checkpoint(self) -> tuple[Path, int] | None:
        """The newest whole checkpoint and its step, in a sequence that of its last task; half-written ones are never seen."""
        found = sorted((int(match[1]), path) for path, match in self._numbered() if match and (path / TRAINER_STATE).is_file())
        if found:
            return found[-1][1], found[-1][0]
        return next((newest for part in reversed(self.parts()) if (newest := part.checkpoint())), None)

    def parts(self) -> list["RunFolder"]:
        """The runs of the tasks that a sequence has begun, in their order; each holds its own checkpoints, metrics and results."""
        folder = self.root / "tasks"
        return [RunFolder(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []

    def _numbered(self) -> list[tuple[Path, "re.Match[str] | None"]]:
        if not self.checkpoints.is_dir():
            return []
        for path in self.checkpoints.glob(".checkpoint-*.new"):  # complete, and killed just before the rename
            recover(path.with_name(path.name.removeprefix(".").removesuffix(".new")))
        return [(path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in self.checkpoints.iterdir()]

    def drop_old_checkpoints(self, keep: int = 2) -> None:
        """Removes all but the newest checkpoints. A folder is renamed before it is deleted, so that none is ever half there."""
        numbered = sorted((int(match[1]), path) for path, match in self._numbered() if match)
        for _, path in numbered[:-keep]:
            doomed = path.with_name(f".{path.name}.dropped")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def clear(self) -> None:
        """Removes what a run has written, and nothing else."""
        for name in OWN_FILES:
            (self.root / name).unlink(missing_ok=True)
        for name in OWN_FOLDERS:
            shutil.rmtree(self.root / name, ignore_errors=True)


def identity(config: Config, files: Iterable[str | None]) -> dict[str, Any]:
    """What must be equal for a run to be continued: the resolved configuration without its output, the recipe, the data's contents."""
    plain = config.model_dump(mode="json")
    del plain["output"]
    return {"config": plain, "recipe": resolve(config).to_dict(), "data": {str(name): _digest(name) for name in files if name}}


def _digest(name: str) -> str:
    path = Path(name)
    files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
    digest = hashlib.sha256()
    for each in files:
        digest.update(each.relative_to(path).as_posix().encode())
        with each.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else "not local"


def look(root: Path, mine: Mapping[str, Any], fresh: bool = False) -> tuple[RunFolder, State]:
    """The run folder and its state; nothing is written.

    Args:
        root: the output folder.
        mine: `identity` of this run.
        fresh: start over: an earlier run there counts as nothing.

    Raises:
        ConfigError: another run with something to lose, or something that is no run, is there.
    """
    run = RunFolder(root)
    if root.exists() and not root.is_dir():
        raise ConfigError(f"output={str(root)!r} is a file; choose another output")
    there = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    record = _read_json(run / "run.json")
    if there and record is None and not set(there) <= {*OWN_FILES, *OWN_FOLDERS}:
        stray = next(name for name in there if name not in (*OWN_FILES, *OWN_FOLDERS))
        raise ConfigError(f"output={str(root)!r} holds files that are no run of rankwise, such as {stray}; choose another output")
    finished = (run / "results.json").is_file()
    if fresh or record is None or not (finished or run.checkpoint()):
        return run, "new"  # an earlier start without a checkpoint has nothing to go on from and nothing to lose
    differences = list(_differences(record.get("identity", {}), json.loads(json.dumps(mine)), ""))
    if differences:
        listed = "; ".join(f"{key} was {was!r}, is {now!r}" for key, was, now in differences[:4])
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ConfigError(
            f"output={str(root)!r} holds another run ({listed}{more}); choose another output, or start over with --fresh "
            "(fresh=True), which deletes the earlier run"
        )
    return run, "finished" if finished else "resume"


def begin(run: RunFolder, config: Config, mine: Mapping[str, Any], plan: str, data: Mapping[str, Any]) -> None:
    """Writes what defines a new run: configuration, versions, plan and data report. Removes what an earlier one left."""
    if run.root.is_dir():
        run.clear()
    run.root.mkdir(parents=True, exist_ok=True)
    write_file(run / "config.yaml", to_yaml(config))
    write_file(run / "plan.txt", plan + "\n")
    write_json(run / "data.json", data)
    write_json(run / "run.json", {"identity": mine, "versions": versions()})


def _differences(was: Any, now: Any, key: str) -> Iterable[tuple[str, Any, Any]]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*was, *now]):
            yield from _differences(was.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif was != now:
        yield key.removeprefix("config."), was, now


def run_of(path: Path) -> RunFolder | None:
    """The run that a path names: the run's folder itself, its adapter, or one of its checkpoints; None for a lone adapter."""
    for root in (path, path.parent, path.parent.parent):
        if (root / "run.json").is_file() and (root / "config.yaml").is_file():
            return RunFolder(root)
    return None


def config_of(run: RunFolder) -> Config:
    """The configuration of a run."""
    return load_config(run / "config.yaml")


def cut_back(path: Path, step: int) -> None:
    """Keeps the lines of a metrics file up to a step; later ones, and a half-written last one, belong to the part that is repeated."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    write_file(path, "".join(kept))


def write_json(path: Path, value: Any) -> None:
    """JSON through a temporary file and a rename: the file is whole or not there."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def versions() -> dict[str, str]:
    """Versions that decide the numbers of a run, and the platform in general terms."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from rankwise import __version__

    found = {"python": platform.python_version(), "rankwise": __version__, "torch": torch.__version__}
    for name in ("transformers", "trl", "accelerate", "datasets", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found
