"""A look at the rows as the model gets them, with the tokens that have the loss marked.

Supervised text stands between [[ and ]] and in green, the rest is dim: brackets for logs and eyes without colour. Special tokens are shown,
and a long row is shortened inside its runs, so that every border between prompt and answer stays in sight.
"""

import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rankwise.training.classification import EncodedClassification
from rankwise.training.encoded import IGNORED, Encoded

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

OPEN, CLOSE = "[[", "]]"
HEAD, TAIL = 120, 200  # characters kept of a long run: its beginning, and its end, where the border is


def preview(encoded: Encoded | EncodedClassification, tokenizer: Any, count: int = 3) -> "RenderableType":
    """The first `count` rows for rich's console: line number, tokens, the decoded text with the supervised runs marked."""
    from rich.console import Group
    from rich.text import Text

    shown = min(count, len(encoded))
    if isinstance(encoded, EncodedClassification):
        title = f"{shown} of {len(encoded):,} rows; {len(encoded.names)} classes, the loss is on the class"
        row = _class_row
    else:
        title = f"{shown} of {len(encoded):,} rows; the loss is on {encoded.loss_on}: marked {OPEN}so{CLOSE}"
        row = _row
    return Group(Text(title, style="bold"), *(row(encoded, tokenizer, index) for index in range(shown)))  # type: ignore[arg-type]


def preview_text(encoded: Encoded | EncodedClassification, tokenizer: Any, count: int = 3, width: int = 100) -> str:
    """The same as plain text, for logs and pipes."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    console.print(preview(encoded, tokenizer, count), soft_wrap=True)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


def runs(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """(decoded text, has the loss) of each run of tokens with one fate, special tokens included."""
    pairs = zip(ids, labels, strict=True)
    for supervised, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        yield tokenizer.decode([token for token, _ in group], skip_special_tokens=False, clean_up_tokenization_spaces=False), supervised


def _row(encoded: Encoded, tokenizer: Any, index: int) -> "Text":
    from rich.text import Text

    ids, labels = encoded.input_ids[index], encoded.labels[index]
    trained = sum(label != IGNORED for label in labels)
    text = _heading(encoded.lines[index], f"{len(ids)} tokens, {trained} with the loss")
    for run, supervised in runs(ids, labels, tokenizer):
        # a row without a prompt is all one run: its beginning says more than its end
        shown = _shortened(run)
        text.append(Text(f"{OPEN}{shown}{CLOSE}", style="bold green") if supervised else Text(shown, style="dim"))
    if not trained:
        text.append("  <- no token has the loss", style="bold red")
    if encoded.max_length is not None and len(ids) == encoded.max_length:
        text.append(f"  <- ends at max_length {encoded.max_length}", style="yellow")
    return text.append("\n")


def _class_row(encoded: EncodedClassification, tokenizer: Any, index: int) -> "Text":
    ids = encoded.input_ids[index]
    text = _heading(encoded.lines[index], f"{len(ids)} tokens")
    text.append(_shortened(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)), style="dim")
    return text.append(f"  {OPEN}{encoded.names[encoded.labels[index]]}{CLOSE}\n", style="bold green")


def _heading(line: int, words: str) -> "Text":
    from rich.text import Text

    return Text(f"line {line} ({words})\n", style="cyan")


def _shortened(text: str) -> str:
    if len(text) > HEAD + TAIL + 40:
        text = f"{text[:HEAD]} ... {len(text) - HEAD - TAIL:,} characters ... {text[-TAIL:]}"
    # a terminal would obey control characters in the data
    return "".join(char if char in "\n\t" or char.isprintable() else f"\\x{ord(char):02x}" for char in text)
