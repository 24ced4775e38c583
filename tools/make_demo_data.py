"""Write the data sample that ships with rankwise (`src/rankwise/demo/data/`), from Debian's package descriptions.

    python tools/make_demo_data.py --descriptions ../shared/data/debian-descriptions.jsonl.gz
    python tools/make_demo_data.py --descriptions ... --sections-out build/sections     # uncut texts, too large to ship

The files are a pure function of the descriptions and the seed. No training row repeats a test row's description: the
splits are by source package, but a few packages share their text word for word.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import textwrap
from itertools import accumulate
from pathlib import Path

Row = dict[str, str]

UNSEEN_SECTIONS = ("games", "science")  # left out of the base model's training: the domain that the demo adapts to
CLASSES = (
    *("admin", "database", "editors", "electronics", "fonts", "games", "graphics", "hamradio", "mail", "math", "net"),
    *("science", "sound", "text", "vcs", "video", "web", "x11"),
)
LONGEST_COMPLETION = 1250  # characters: a longer answer would not fit the base's 512 positions beside its prompt
SIZE_LIMIT = 2_000_000  # bytes, all shipped files together; train.jsonl takes what the others leave
README_SIZE = 4_000  # bytes set aside for it


def read_rows(path: Path) -> list[Row]:
    """All rows of the descriptions file: package, section, short, long, split (train or test); text ends stripped."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [{key: value.strip() for key, value in json.loads(line).items()} for line in lines]


def prompt_text(row: Row) -> str:
    """A user's message; the base model was trained on this wording, with the plain description as the answer."""
    return f"Describe the Debian package `{row['package']}` (section {row['section']}): {row['short']}"


def control_prompt(row: Row) -> str:
    """The user's message of the completion task."""
    return f"Write the control file's description of the Debian package `{row['package']}` (section {row['section']}): {row['short']}"


def control_text(row: Row) -> str:
    """The long description as a Debian control file has it: lines of at most 72 characters that begin with a space.

    The base model has never seen this form (nor these sections), so that fine-tuning teaches something that one sees at a glance.
    """
    paragraphs = [paragraph for paragraph in row["long"].split("\n\n") if paragraph.strip()]
    wrapped = [
        "\n".join(
            textwrap.fill(line, 72, initial_indent=" ", subsequent_indent=" ", break_long_words=False, break_on_hyphens=False)
            for line in paragraph.splitlines()
        )
        for paragraph in paragraphs
    ]
    return "\n .\n".join(wrapped)


def plain_text(row: Row) -> str:
    """The description as running text: short line, full stop, long description."""
    return f"{row['short'].rstrip('.')}. {row['long']}"


def pick(rows: list[Row], count: int, seed: int) -> list[Row]:
    """At most `count` of the rows, at random, in random order: a prefix of the file is a fair sample too."""
    rows = sorted(rows, key=lambda row: (row["package"], row["section"]))
    random.Random(seed).shuffle(rows)
    return rows[:count]


def in_split(rows: list[Row], split: str, sections: tuple[str, ...]) -> list[Row]:
    """Rows of one split and these sections; training rows whose description stands in any test row are dropped."""
    tested = {row["long"] for row in rows if row["split"] == "test"} if split == "train" else set()
    return [row for row in rows if row["split"] == split and row["section"] in sections and row["long"] not in tested]


def completion_rows(rows: list[Row], split: str, count: int, seed: int) -> list[Row]:
    fitting = [row for row in in_split(rows, split, UNSEEN_SECTIONS) if len(row["long"]) <= LONGEST_COMPLETION]
    chosen = pick(fitting, count, seed)
    return [{"prompt": control_prompt(row), "completion": control_text(row)} for row in chosen]


def section_rows(rows: list[Row], split: str, per_class: int, characters: int | None, seed: int) -> list[Row]:
    chosen = [row for label in CLASSES for row in pick(in_split(rows, split, (label,)), per_class, seed)]
    chosen = pick(chosen, len(chosen), seed)
    return [{"text": plain_text(row)[:characters].rstrip(), "label": row["section"]} for row in chosen]


def line(row: Row) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def fitting(rows: list[Row], size: int) -> list[Row]:
    """The longest prefix of the rows that takes at most `size` bytes."""
    ends = accumulate(len(line(row)) for row in rows)
    return rows[: sum(end <= size for end in ends)]


def write(folder: Path, files: dict[str, list[Row]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        content = b"".join(map(line, rows))
        (folder / name).write_bytes(content)
        print(f"{folder / name}: {len(rows):,} rows, {len(content):,} bytes")


README = """\
# Demo data of rankwise

English descriptions of Debian packages, a sample of the package index of Debian bookworm main (package name, section,
short line, long description). They originate from the Debian project and its package maintainers, and each description
is under the licence of its package, which the package states in /usr/share/doc/PACKAGE/copyright. Training and test
rows come from different source packages; training rows that repeat the description of a test row word for word are
left out. Made by `tools/make_demo_data.py`.

- `train.jsonl` ({train:,} rows) and `test.jsonl` ({test:,} rows), `prompt` and `completion`: write the long description
  of a package as a Debian control file has it (lines of at most 72 characters that begin with a space, a full stop
  between paragraphs), for the sections {unseen}. The demo base model has seen neither this form nor these sections. Descriptions of over
  {longest:,} characters are left out: with their prompt they would not fit the model's 512 positions.
- `general.jsonl` ({general:,} rows), `text`: plain descriptions from the test split of all other sections, to measure
  what fine-tuning forgets.
- `sections-train.jsonl` ({sections_train:,} rows) and `sections-test.jsonl` ({sections_test:,} rows), `text` and
  `label`: name the section, one of {classes}.
  At most {per_train} training and {per_test} test rows of a section; texts cut after {characters} characters.

A prompt reads:

    {prompt}

`python tools/make_demo_data.py --descriptions FILE --sections-out FOLDER` writes the classification rows uncut.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parent.parent
    add = parser.add_argument
    add("--descriptions", type=Path, required=True, help="debian-descriptions.jsonl.gz")
    add("--out", type=Path, default=root / "src/rankwise/demo/data", help="the folder to write")
    add("--sections-out", type=Path, help="write only the classification rows, uncut, to this folder")
    add("--train-rows", type=int, default=1200, help="most rows of train.jsonl; fewer if the size asks")
    add("--general-rows", type=int, default=150)
    add("--section-train-rows", type=int, default=250, help="most training rows of one section")
    add("--section-test-rows", type=int, default=40, help="most test rows of one section")
    add("--characters", type=int, default=360, help="longest shipped classification text (64 word pieces need less)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = read_rows(args.descriptions)
    cut = None if args.sections_out else args.characters
    files = {
        "sections-train.jsonl": section_rows(rows, "train", args.section_train_rows, cut, args.seed),
        "sections-test.jsonl": section_rows(rows, "test", args.section_test_rows, cut, args.seed),
    }
    if args.sections_out:
        write(args.sections_out, files)
        return

    seen = tuple({row["section"] for row in rows} - set(UNSEEN_SECTIONS))
    general = pick(in_split(rows, "test", seen), args.general_rows, args.seed)
    files["general.jsonl"] = [{"text": plain_text(row)} for row in general]
    files["test.jsonl"] = completion_rows(rows, "test", len(rows), args.seed)
    left = SIZE_LIMIT - README_SIZE - sum(len(line(row)) for content in files.values() for row in content)
    files["train.jsonl"] = fitting(completion_rows(rows, "train", args.train_rows, args.seed), left)
    if not files["train.jsonl"]:
        raise SystemExit(f"no room for train.jsonl within {SIZE_LIMIT:,} bytes: lower --characters")
    card = README.format(
        **{name.removesuffix(".jsonl").replace("-", "_"): len(content) for name, content in files.items()},
        unseen=" and ".join(UNSEEN_SECTIONS),
        classes=", ".join(CLASSES),
        longest=LONGEST_COMPLETION,
        per_train=args.section_train_rows,
        per_test=args.section_test_rows,
        characters=args.characters,
        prompt=files["test.jsonl"][0]["prompt"],
    )
    write(args.out, files)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(f"{sum(path.stat().st_size for path in args.out.iterdir()):,} bytes in all")


if __name__ == "__main__":
    main()
