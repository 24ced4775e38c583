"""Token ids and labels, made here once, so that no trainer masks anything on its own.

The pieces of a row (see conversation.py) are tokenized one by one, each as the continuation of the one before it, and their ids joined.
So a prompt's ids in training are the ids of the prompt alone, which is what the model is given later, and no token can lie over the border
between prompt and answer. (An answer in the history keeps this border too, as it does in a cache that goes on from the model's own tokens.)
`labels` are the ids where the loss is, -100 elsewhere. A trainer shifts them by one itself.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

from rankwise.errors import DataError, nearest
from rankwise.training.conversation import ChatFormat, Piece, chat_format, control_tokens, conversation_pieces, special_tokens
from rankwise.training.encoded import IGNORED, Encoded, Report, report_of
from rankwise.training.rows import Rows
from rankwise.training.shapes import Message, Shape, normalise, prompt_messages

LossOn = Literal["completion", "assistant", "last", "all"]
LOSS_ON = {
    "completion": "the completion tokens (of a conversation, every assistant turn)",
    "assistant": "every assistant turn, those inside a prompt too",
    "last": "the last assistant turn of each row",
    "all": "all tokens",
}
# Left neighbours to try when the true one would merge with the text: one of them does not, whatever the pre-tokenizer is.
ANCHORS = ("\n", "a", ".", "0", " a")
CHUNK = 256  # sequences tokenized in one call


class Part(NamedTuple):
    """A run of text, whether it has the loss, and whether an end token is due behind it."""

    text: str
    loss: bool
    answer: bool


def encode_rows(
    rows: Rows,
    shape: Shape,
    tokenizer: Any,
    max_length: int | None,
    loss_on: LossOn = "completion",
    *,
    template: Literal["auto", "chat", "none"] = "auto",
    template_options: dict[str, Any] | None = None,
    train: Encoded | None = None,
    types: Sequence[int] | None = None,
) -> Encoded:
    """Token ids and labels of every row.

    tokenizer: a transformers tokenizer. max_length: tokens kept of each sequence, None for all; longer ones are cut on the right.
    loss_on: 'completion', 'assistant', 'last' or 'all', as in LOSS_ON; plain text always has the loss on all tokens.
    template: 'auto' writes every conversation (prompt and completion strings too) with the tokenizer's chat template if it has one; 'none'
        takes prompt and completion verbatim and puts the tokenizer's end token behind; 'chat' insists on a template.
    template_options: passed to the chat template. train: the encoded training rows, when these are for evaluation, to count rows in both.
    types: the kind of each row, kept beside its sequences.

    A conversation whose template rewrites earlier turns gives several sequences; `Encoded.lines` says which row each comes from.
    Raises DataError, with the place of the row, if a row has the wrong shape or cannot be masked rightly. Empty supervision, cut answers
    and missing end tokens are counted only: `check_encoded` refuses them.
    """
    if loss_on not in get_args(LossOn):
        raise DataError(f"loss_on is {loss_on!r}{nearest(loss_on, LOSS_ON)}; known are {', '.join(LOSS_ON)}")
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length is {max_length}: a sequence needs at least 2 tokens")
    chat = _chat(tokenizer, shape, template, template_options or {})
    notes: list[str] = []
    sequences: list[list[Part]] = []
    owners: list[int] = []
    markup = rewritten = 0
    control = sorted(control_tokens(tokenizer))
    any_control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
    for index, row in enumerate(rows.rows):
        try:
            content = normalise(row, shape)
            if isinstance(content, tuple):
                raise DataError("text and label are rows for classification, not for a language model")
            texts = [content] if isinstance(content, str) else [message["content"] for message in content]
            markup += any(any_control.search(text) for text in texts)
            made = _supervised(content, prompt_messages(row, shape), chat, loss_on, shape)
        except DataError as error:
            raise DataError(f"{rows.place(index)}: {error}") from error
        rewritten += len(made) > 1
        sequences += made
        owners += [index] * len(made)
    if markup:
        notes.append(
            f"{markup} rows hold a special token of the tokenizer as text ({', '.join(control[:3])}, ...); it is read as that token. "
            "If the rows already hold the chat markup, encode them with template 'none'"
        )
    if rewritten:
        notes.append(
            f"the chat template rewrites earlier turns: {rewritten} rows became several sequences, one for each context of an answer"
        )
    if chat and chat.header.strip():
        notes.append(f"the chat template puts {chat.header!r} before an answer; the model learns to write it")
    end = chat.end_token if chat else tokenizer.eos_token
    if chat and end and tokenizer.eos_token and end != tokenizer.eos_token:
        notes.append(f"answers end in {end!r}, the tokenizer's end of text is {tokenizer.eos_token!r}: generation has to stop at the first")
    ends = {tokenizer.eos_token_id} | ({tokenizer.convert_tokens_to_ids(end)} if end else set())
    ids, labels, stops = _tokenized(sequences, tokenizer, raw=chat is None)
    lines = [rows.lines[owner] for owner in owners]
    effective = "all" if shape.name == "text" else loss_on
    about = f"{LOSS_ON[effective]}; " + (f"chat template, answers end in {end!r}" if chat else f"no chat template, rows end in {end!r}")
    report = report_of(ids, labels, stops, owners, rows.lines, max_length, frozenset(ends - {None}), tuple(notes))
    if max_length is not None:
        ids = [row[:max_length] for row in ids]
        labels = [row[:max_length] for row in labels]
    kinds = None if types is None else [types[owner] for owner in owners]
    encoded = Encoded(ids, labels, lines, rows.source, about, report, max_length, kinds)
    return encoded if train is None else replace(encoded, report=_with_duplicates(encoded, train))


def _chat(tokenizer: Any, shape: Shape, template: str, options: dict[str, Any]) -> ChatFormat | None:
    if template not in ("auto", "chat", "none"):
        raise DataError(f"template is {template!r}; known are auto, chat, none")
    if shape.name == "text" or template == "none":
        return None
    if getattr(tokenizer, "chat_template", None):
        return chat_format(tokenizer, **options)
    if template == "chat":
        raise DataError("template is 'chat', but the tokenizer has no chat template: set tokenizer.chat_template or use template 'none'")
    return None


def _supervised(content: str | Sequence[Message], asked: int, chat: ChatFormat | None, loss_on: str, shape: Shape) -> list[list[Part]]:
    """The sequences of one row. asked: how many messages are the prompt."""
    if isinstance(content, str):
        return [[Part(content, True, True)]]
    if chat is None:
        return [_verbatim(content, loss_on, shape)]
    answers = [index for index, message in enumerate(content) if message["role"] == "assistant"]
    if loss_on == "completion":
        answers = [index for index in answers if index >= asked]
    elif loss_on == "last":
        answers = answers[-1:]
    sequences = conversation_pieces(content, chat)
    if loss_on == "all":  # the conversation as it stands at its end
        return [[Part(piece.text, True, piece.answer is not None) for piece in sequences[-1]]]
    wanted = [pieces for pieces in sequences if any(piece.answer in answers for piece in pieces if piece.answer is not None)]
    return [_marked(pieces, answers) for pieces in wanted or sequences[-1:]]


def _marked(pieces: Sequence[Piece], answers: Sequence[int]) -> list[Part]:
    return [Part(piece.text, piece.answer in answers, piece.answer in answers) for piece in pieces]


def _verbatim(messages: Sequence[Message], loss_on: str, shape: Shape) -> list[Part]:
    """Prompt and completion as they are written. An alpaca row has no say in what stands between, so a blank line does."""
    if [message["role"] for message in messages] != ["user", "assistant"] or shape.name not in ("prompt-completion", "alpaca"):
        raise DataError(
            "a conversation needs a chat template and the tokenizer has none (or template is 'none'): set tokenizer.chat_template, take an "
            "instruction-tuned model's tokenizer, or write the rows as prompt and completion strings"
        )
    prompt, completion = (message["content"] for message in messages)
    return [Part(prompt + ("\n\n" if shape.name == "alpaca" else ""), loss_on == "all", False), Part(completion, True, True)]


# --- ids -------------------------------------------------------------------------------------------------------------


def _tokenized(sequences: list[list[Part]], tokenizer: Any, raw: bool) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """ids, labels, and where answers stop (exclusive), of every sequence.

    raw: no template wrote the special tokens, so the tokenizer's own go around the text.
    """
    starts = _opening(tokenizer) if raw else []
    end = tokenizer.eos_token_id if raw else None
    specials = tuple(special_tokens(tokenizer))
    all_ids: list[list[int]] = []
    all_labels: list[list[int]] = []
    all_stops: list[list[int]] = []
    for first in range(0, len(sequences), CHUNK):
        chunk = [[part for part in pieces if part.text] for pieces in sequences[first : first + CHUNK]]
        known = _ids_of({text for pieces in chunk for text in _texts(pieces, specials)}, tokenizer)
        for pieces in chunk:
            ids, labels, before = list(starts), [IGNORED] * len(starts), ""
            stops = []
            for text, loss, answer in pieces:
                new = _continued(text, before, known, tokenizer, specials)
                ids += new
                labels += new if loss else [IGNORED] * len(new)
                stops += [len(ids)] if answer and not raw else []
                before = text
            if end is not None and (not ids or ids[-1] != end):
                ids.append(end)
                labels.append(end)
            stops += [len(ids)] if raw and ids else []
            all_stops.append(stops)
            all_ids.append(ids)
            all_labels.append(labels)
    return all_ids, all_labels, all_stops


def _texts(pieces: Iterable[Part], specials: tuple[str, ...]) -> Iterable[str]:
    """Every text that `_continued` will ask for, its rare fallback aside."""
    before = ""
    for text, _, _ in pieces:
        if not before or text.startswith(specials):
            yield text
        else:
            yield before
            yield before + text
        before = text


def _continued(text: str, before: str, known: dict[str, list[int]], tokenizer: Any, specials: tuple[str, ...]) -> list[int]:
    """The ids of `text` behind `before`, with a token border between the two.

    Alone, a text may get a blank in front that is not there (SentencePiece), so the ids are those that follow the ids of its left
    neighbour. If these two would merge over the border, another neighbour stands in that does not merge with it.
    """
    if not before or text.startswith(specials):
        return known[text]
    left, both = known[before], known[before + text]
    if both[: len(left)] == left:
        return both[len(left) :]
    tried = _ids_of([*ANCHORS, *(anchor + text for anchor in ANCHORS)], tokenizer)
    for anchor in ANCHORS:
        if tried[anchor + text][: len(tried[anchor])] == tried[anchor]:
            return tried[anchor + text][len(tried[anchor]) :]
    raise DataError(f"the tokenizer merges {text[:40]!r} with whatever stands before it, so prompt and answer cannot be told apart")


def _ids_of(texts: Iterable[str], tokenizer: Any) -> dict[str, list[int]]:
    ordered = list(texts)
    if not ordered:
        return {}
    ids = tokenizer(ordered, add_special_tokens=False, return_attention_mask=False, truncation=False, verbose=False)["input_ids"]
    return dict(zip(ordered, ids, strict=True))


def _opening(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text by itself (a beginning-of-text token), from how it wraps a letter."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    wrapped = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    for start in range(len(wrapped) - len(bare) + 1):
        if wrapped[start : start + len(bare)] == bare:
            return wrapped[:start]
    return []


def _with_duplicates(encoded: Encoded, train: Encoded) -> Report:
    seen = {tuple(ids) for ids in train.input_ids}
    twice = [line for ids, line in zip(encoded.input_ids, encoded.lines, strict=True) if tuple(ids) in seen]
    lines = tuple(dict.fromkeys(twice))
    return replace(encoded.report, duplicates=len(lines), lines={**encoded.report.lines, "duplicates": lines[:5]})
