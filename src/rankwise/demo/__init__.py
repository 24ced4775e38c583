"""Where the bundled demo files are: a tiny base model and a sample of data, both described in their README.md."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def base_folder() -> Path:
    """The folder of the demo base model, for `from_pretrained`.

    Raises FileNotFoundError if the installation lacks it.
    """
    folder = _HERE / "base"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the demo base model is missing from {folder}: reinstall rankwise")
    return folder


def data_file(name: str) -> Path:
    """The path of one demo data file, such as `train.jsonl`.

    Raises FileNotFoundError, naming the files that exist, if there is none of this name.
    """
    folder = _HERE / "data"
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    if name not in names:
        there = f"use one of {', '.join(names)}" if names else f"{folder} is empty or missing: reinstall rankwise"
        raise FileNotFoundError(f"no demo data file {name!r}; {there}")
    return folder / name
