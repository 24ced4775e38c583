"""Conversations through a chat template, cut into the pieces that the loss is on and the pieces it is not on.

Stock templates do not mark what the assistant says, so it is found by rendering prefixes of the conversation. For an assistant turn j

    before  = template(messages[:j], add_generation_prompt=True)       exactly what the model is given when it has to answer
    through = template(messages[:j + 1])                               the same with the answer behind it
    answer  = through - before                                         what the model should have written, its end token included

`before` must be a prefix of `through`, or there is no answer to teach and the row is refused. Several turns share one sequence as long as
each `before` continues the sequence so far. Where a template rewrites earlier turns (drops their thinking, moves the system prompt to the
last question), a new sequence begins, so that every answer is learnt behind the text it will really stand behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rankwise.errors import DataError
from rankwise.training.shapes import Message

PROBE = "rankwise0probe"  # an answer that no template alters, to see what a template puts around answers


@dataclass(frozen=True)
class Piece:
    """A run of text with one fate. answer: index of the assistant's message it comes from, or None for context."""

    text: str
    answer: int | None = None


@dataclass(frozen=True)
class ChatFormat:
    """What the template of a tokenizer puts around an answer.

    header: text between the generation prompt and the answer, which the model has to write ('' mostly).
    end: text behind the answer up to and including the end token, '<|im_end|>'; '' if there is no end token.
    end_token: that token alone; None if the template writes none.
    tail: text behind the end token, '\\n' in ChatML; the model need not write it.
    """

    tokenizer: Any
    options: dict[str, Any] = field(default_factory=dict)
    header: str = ""
    end: str = ""
    end_token: str | None = None
    tail: str = ""

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The template's text for `messages`, ready for an answer if `prompt`. Raises DataError with the template's own words."""
        try:
            # as a batch of one, since an empty conversation alone is not accepted
            texts = self.tokenizer.apply_chat_template([list(messages)], tokenize=False, add_generation_prompt=prompt, **self.options)
        except Exception as error:  # templates raise on purpose (roles, order), and jinja raises its own
            roles = ", ".join(message["role"] for message in messages) or "nothing before its first assistant message"
            raise DataError(
                f"the tokenizer's chat template refuses a conversation of {roles}: {error}. Change the roles or their order in the data "
                "(a conversation begins with system or user), or give the tokenizer another chat template"
            ) from error
        return texts[0]


def special_tokens(tokenizer: Any) -> list[str]:
    """Every token that text is split at before anything else, longest first; runs of blanks are left out."""
    return sorted((token for token in control_tokens(tokenizer) | set(tokenizer.get_added_vocab()) if token.strip()), key=_longest_first)


def control_tokens(tokenizer: Any) -> set[str]:
    """The tokens that mark turns and ends; of the added tokens those called special, so not '<think>' and its like."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {token for token in added | set(tokenizer.all_special_tokens) if token.strip()}


def _longest_first(token: str) -> tuple[int, str]:
    return -len(token), token


def chat_format(tokenizer: Any, **options: Any) -> ChatFormat:
    """Look at how the tokenizer's template writes one exchange; `options` go to the template (enable_thinking, ...).

    Raises DataError if the template loses the answer, alters what is before it, or leaves the assistant's header to the model.
    """
    plain = ChatFormat(tokenizer, dict(options))
    question: list[Message] = [{"role": "user", "content": "Hello"}]
    before = plain.render(question, prompt=True)
    through = plain.render([*question, {"role": "assistant", "content": PROBE}])
    answer = _answer(before, through)
    if PROBE not in answer:
        raise DataError("the tokenizer's chat template does not write the assistant's content: give the tokenizer another chat template")
    header, _, suffix = answer.partition(PROBE)
    if header.strip() and before == plain.render(question):
        raise DataError(
            f"the tokenizer's chat template ignores add_generation_prompt but writes {header!r} before each answer, so a model asked to "
            f"answer would have to write {header!r} itself: let the template add {header!r} at its end if add_generation_prompt is true"
        )
    # an added token like '</answer>' may stand before the true end, so those called special come first
    control = [token for token in control_tokens(tokenizer) if token in suffix]
    found = control or [token for token in special_tokens(tokenizer) if token in suffix]
    if not found:
        return ChatFormat(tokenizer, plain.options, header, "", None, suffix)
    at, _, token = min((suffix.find(token), -len(token), token) for token in found)
    cut = at + len(token)
    return ChatFormat(tokenizer, plain.options, header, suffix[:cut], token, suffix[cut:])


def _answer(before: str, through: str) -> str:
    if not through.startswith(before):
        same = next((i for i, (a, b) in enumerate(zip(before, through, strict=False)) if a != b), min(len(before), len(through)))
        raise DataError(
            "the tokenizer's chat template writes a conversation differently once it is answered, so no mask would be right: asked to "
            f"answer, it has {before[max(0, same - 20) :][:80]!r}, answered, it has {through[max(0, same - 20) :][:60]!r} there. Give the "
            "tokenizer a template whose generation prompt is how the assistant's turn begins (a thinking model's template often has an "
            "option for it), or write the rows as prompt and completion strings that hold the markup themselves"
        )
    return through[len(before) :]


def conversation_pieces(messages: Sequence[Message], chat: ChatFormat) -> list[list[Piece]]:
    """The sequences of one conversation, each a list of pieces that joined are the rendered text.

    One sequence where the template only appends, several where it rewrites earlier turns (see the head of this file). What stands behind
    the last answer is the last piece. Raises DataError if the template refuses a prefix or an answer cannot be told from its prompt.
    """
    sequences: list[list[Piece]] = []
    so_far = whole = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat.render(messages[:index], prompt=True)
        whole = chat.render(messages[: index + 1])
        answer = _without_tail(_answer(before, whole), chat)
        if message["content"].strip() and not _visible(answer, chat).strip():
            raise DataError(f"the chat template writes nothing of message {index + 1} (assistant): {message['content'][:40]!r}")
        if not sequences or not before.startswith(so_far):
            sequences.append([])
            so_far = ""
        sequences[-1] += [Piece(before[len(so_far) :]), Piece(answer, index)]
        so_far = before + answer
    if messages[-1]["role"] != "assistant":
        whole = chat.render(messages)
    if not sequences:
        return [[Piece(whole)]]
    if whole.startswith(so_far):
        sequences[-1].append(Piece(whole[len(so_far) :]))
    return [[piece for piece in pieces if piece.text] for pieces in sequences]


def _without_tail(answer: str, chat: ChatFormat) -> str:
    """The answer up to its end token: what the template writes behind it is not the model's to write."""
    if chat.tail and answer.endswith(chat.end + chat.tail):
        return answer[: len(answer) - len(chat.tail)]
    if chat.end_token is not None and not answer.endswith(chat.end_token):
        kept, token, rest = answer.rpartition(chat.end_token)
        if token and not rest.strip():
            return kept + token
    return answer


def _visible(answer: str, chat: ChatFormat) -> str:
    """The answer without the end token and the header."""
    return answer.removesuffix(chat.end).removeprefix(chat.header)
