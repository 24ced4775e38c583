"""The shapes a row of training data may have, and the one form they are brought to.

A causal language model is trained on a list of messages (one exchange or many) or on plain text, a classifier on a text and its label.
The first row decides the shape, every other row must have it: a file of two shapes is two data sets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rankwise.errors import DataError, nearest
from rankwise.training.rows import Rows

Message = dict[str, Any]

PROMPT_KEYS = ("prompt", "query", "question", "input", "instruction")
COMPLETION_KEYS = ("completion", "response", "answer", "output", "target")
ALPACA_INPUT = ("input", "context")
ALPACA_OUTPUT = ("output", "response")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}

KNOWN = {
    "messages": "messages: [{role, content}, ...]",
    "sharegpt": "conversations: [{from, value}, ...]",
    "alpaca": "instruction, input (may be missing), output",
    "prompt-completion": f"one of {', '.join(PROMPT_KEYS)} with one of {', '.join(COMPLETION_KEYS)} (strings, or lists of messages)",
    "text": "text",
    "text-label": "text, label",
}


@dataclass(frozen=True)
class Shape:
    """How the rows are written.

    name: one of KNOWN. keys: what each part is called in these rows, {'prompt': 'question', ...}. unused: keys of the rows that nothing
    reads, to be shown to the user.
    """

    name: str
    keys: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def describe(self) -> str:
        """'prompt-completion (question, answer)'."""
        keys = ", ".join(self.keys.values())
        return f"{self.name} ({keys})" + (f"; not used: {', '.join(self.unused)}" if self.unused else "")


def recognise(rows: Rows | Sequence[Mapping[str, Any]], task: str) -> Shape:
    """The shape of `rows`, after looking at every one of them.

    task: 'classification' (or any name that says so) wants text and label; every other task is a causal language model's.
    Raises DataError for an unknown shape or for rows of several shapes, with the keys found, the shapes known and the first odd row.
    """
    data = rows if isinstance(rows, Rows) else Rows([dict(row) for row in rows], "rows", list(range(1, len(rows) + 1)), unit="row")
    if not data.rows:
        raise DataError(f"{data.source}: no rows")
    shape = _shape_of(data.rows[0], task)
    if shape is None:
        raise DataError(f"{data.place(0)}: {_unknown(data.rows[0], task)}")
    if shape.name == "alpaca" and "input" not in shape.keys:  # it may be missing in the first row alone
        extra = next((key for row in data.rows for key in ALPACA_INPUT if key in row), None)
        shape = replace(shape, keys={**shape.keys, **({"input": extra} if extra else {})})
    read = set(shape.keys.values())
    shape = replace(shape, unused=tuple(dict.fromkeys(key for row in data.rows for key in row if key not in read)))
    for index, row in enumerate(data.rows):
        try:
            normalise(row, shape)
        except DataError as error:
            other = _shape_of(row, task)
            mixed = other is not None and (other.name, dict(other.keys)) != (shape.name, dict(shape.keys))
            first = f"the rows before it are {shape.name} ({', '.join(shape.keys.values())})"
            reason = (
                f"this row has another shape, {other.name} ({', '.join(other.keys.values())}): {first}" if mixed and other else str(error)
            )
            raise DataError(f"{data.place(index)}: {reason}; its keys are {_listed(row)}") from error
    return shape


def _classifies(task: str) -> bool:
    return "class" in task.lower()


def _shape_of(row: Mapping[str, Any], task: str) -> Shape | None:
    """The first shape that fits the keys of one row. Conversations come before text: many sets carry a rendered copy as text."""
    if _classifies(task):
        return _made("text-label", text="text", label="label") if {"text", "label"} <= row.keys() else None
    if isinstance(row.get("messages"), list):
        return _made("messages", messages="messages")
    if isinstance(row.get("conversations"), list):
        turns = row["conversations"]
        named = bool(turns) and isinstance(turns[0], Mapping) and "role" in turns[0]
        return _made("messages" if named else "sharegpt", messages="conversations")
    output = next((key for key in ALPACA_OUTPUT if key in row), None)
    if "instruction" in row and output:
        extra = next((key for key in ALPACA_INPUT if key in row), None)
        return _made("alpaca", instruction="instruction", **({"input": extra} if extra else {}), output=output)
    if {"prompt", "completion"} <= row.keys():
        return _made("prompt-completion", prompt="prompt", completion="completion")
    prompts = [key for key in PROMPT_KEYS if key in row]
    completions = [key for key in COMPLETION_KEYS if key in row]
    if len(prompts) == len(completions) == 1:
        return _made("prompt-completion", prompt=prompts[0], completion=completions[0])
    if "text" in row and not (prompts and completions):
        return _made("text", text="text")
    return None


def _made(name: str, **keys: str) -> Shape:
    return Shape(name, keys)


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _unknown(row: Mapping[str, Any], task: str) -> str:
    if _classifies(task):
        missing = [key for key in ("text", "label") if key not in row]
        near = "".join(nearest(key, list(row)).replace("did you mean", f"is {key} written") for key in missing)
        return f"classification needs the keys 'text' and 'label'; missing {', '.join(map(repr, missing))}, found {_listed(row)}{near}"
    shapes = "; ".join(text for name, text in KNOWN.items() if name != "text-label")
    prompts = [key for key in PROMPT_KEYS if key in row]
    completions = [key for key in COMPLETION_KEYS if key in row]
    clash = ""
    if prompts and completions:
        clash = (
            f" (several keys could be the prompt or the completion: {', '.join(prompts)} and {', '.join(completions)}; rename or drop some)"
        )
    return f"unknown shape of row{clash}: found the keys {_listed(row)}. Known shapes: {shapes}"


# --- one form --------------------------------------------------------------------------------------------------------


def normalise(row: Mapping[str, Any], shape: Shape) -> list[Message] | str | tuple[str, str | int]:
    """A row in the one internal form: a list of messages {'role', 'content', ...}, or a plain text, or (text, label).

    Prompt and completion become a user's and an assistant's message; alpaca's input follows its instruction after a blank line.
    Raises DataError when a key is missing or a value has the wrong type (without the place of the row, which the caller knows).
    """
    keys = shape.keys
    part = {name: _get(row, key) for name, key in keys.items() if (shape.name, name) != ("alpaca", "input")}  # which may be missing
    if shape.name == "text-label":
        return _string(part["text"], keys["text"]), _label(part["label"], keys["label"])
    if shape.name == "text":
        return _string(part["text"], keys["text"])
    if shape.name == "alpaca":
        instruction = _string(part["instruction"], keys["instruction"])
        given = row.get(keys["input"]) if "input" in keys else None
        extra = "" if given is None else _string(given, keys["input"])
        asked = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        return [_message("user", asked), _message("assistant", _string(part["output"], keys["output"]))]
    if shape.name == "prompt-completion":
        return [*_side(part["prompt"], keys["prompt"], "user"), *_side(part["completion"], keys["completion"], "assistant")]
    return _messages(part["messages"], keys["messages"], sharegpt=shape.name == "sharegpt")


def prompt_messages(row: Mapping[str, Any], shape: Shape) -> int:
    """How many messages of `normalise(row, shape)` are the prompt of a prompt-completion row; 0 where any assistant turn is an answer."""
    if shape.name != "prompt-completion":
        return 0
    prompt = row[shape.keys["prompt"]]
    return len(prompt) if isinstance(prompt, list) else 1


def _get(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise DataError(f"the key {key!r} is missing{nearest(key, list(row))}")
    return row[key]


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be a string, not {type(value).__name__} {str(value)[:40]!r}")
    return value


def _label(value: Any, key: str) -> str | int:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int):
        raise DataError(f"{key!r} must be a string or a whole number, not {type(value).__name__} {str(value)[:40]!r}")
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _side(value: Any, key: str, role: str) -> list[Message]:
    return _messages(value, key) if isinstance(value, list) else [_message(role, _string(value, key))]


def _messages(value: Any, key: str, sharegpt: bool = False) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{key!r} must be a list of at least one message, not {str(value)[:40]!r}")
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    messages = []
    for number, turn in enumerate(value, 1):
        where = f"message {number} of {key!r}"
        if not isinstance(turn, Mapping) or role_key not in turn:
            found = _listed(turn) if isinstance(turn, Mapping) else type(turn).__name__
            raise DataError(f"{where} must be an object with {role_key!r} and {content_key!r}; found {found}")
        role = turn[role_key]
        role = SHAREGPT_ROLES.get(role, role) if sharegpt and isinstance(role, str) else role
        if role not in ROLES:
            known = (*ROLES, *SHAREGPT_ROLES) if sharegpt else ROLES
            raise DataError(f"{where} has the unknown role {role!r}{nearest(str(role), known)}; known are {', '.join(known)}")
        rest = {k: v for k, v in turn.items() if k not in (role_key, content_key) and v is not None}
        messages.append({"role": role, "content": _content(turn.get(content_key), f"the {content_key} of {where}", rest), **rest})
    return messages


def _content(value: Any, where: str, rest: Mapping[str, Any]) -> str:
    """Content as one string; lists of text parts are joined, and a message that only calls a tool has none."""
    if isinstance(value, str):
        return value
    if value is None and rest.get("tool_calls"):
        return ""
    if isinstance(value, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    raise DataError(f"{where} must be text, not {type(value).__name__} {str(value)[:40]!r}")
