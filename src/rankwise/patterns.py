"""Regular expressions that come from files and recipes, matched within a bound on time and memory.

Python's own engine can be kept busy for ever by a short expression, and cannot be interrupted. So an expression is read by Python's rules
(`re._parser`), and matched by the package `regex`, which stops at a timeout. What the two would understand differently is refused.
"""

import functools
import re
import time
import warnings
from dataclasses import dataclass
from typing import Any

from rankwise.errors import RankwiseError

SECONDS = 1.0  # for all matches of one expression that take longer than MOMENT
MOMENT = 0.001
LONGEST, MOST_COPIES = 20_000, 10_000  # characters of an expression; the product of its counted repeats, which are written out in memory
_COUNTS = re.compile(r"(?<!\\)((?:\\\\)*)\{(?:(\d{1,6})(?:,(\d{0,6}))?\})?")


class PatternError(RankwiseError, ValueError):
    """An expression that is not valid, or takes too long; the message names it and the remedy."""


@dataclass
class Expression:
    """One compiled expression, and the seconds that its slow matches have taken."""

    text: str
    compiled: Any
    spent: float = 0.0

    def _bounded(self, method: str, name: str) -> Any:
        began = time.perf_counter()
        try:
            # once an expression is known to be slow, its next match gets what is left of its time
            return getattr(self.compiled, method)(name, timeout=max(SECONDS - self.spent, MOMENT))
        except TimeoutError:
            self.spent = SECONDS
            raise PatternError(
                f"the expression {self.text[:200]!r} takes more than {SECONDS:g} s to match names such as {name[:80]!r}; write it without "
                "repeats of what repeats itself, or list the names"
            ) from None
        finally:
            took = time.perf_counter() - began
            self.spent += took if took > MOMENT else 0.0

    def match(self, name: str) -> Any:
        """As `re.match`. Raises PatternError where it takes too long."""
        return self._bounded("match", name)

    def fullmatch(self, name: str) -> Any:
        """As `re.fullmatch`. Raises PatternError where it takes too long."""
        return self._bounded("fullmatch", name)


def expression(text: str) -> Expression:
    """An expression, read by Python's rules.

    Raises:
        PatternError: it is not valid, too long, or repeats something too often.
    """
    found = _expression(text)
    if found.spent >= SECONDS:  # another file may name it: its time begins anew
        _expression.cache_clear()
        found = _expression(text)
    return found


@functools.lru_cache(maxsize=256)
def _expression(text: str) -> Expression:
    import regex

    if len(text) > LONGEST:
        raise PatternError(f"the expression {text[:80]!r}... has {len(text)} characters, and at most {LONGEST} are read; list the names")
    copies = 1
    for _, low, high in _COUNTS.findall(text):
        if not low and not high:
            raise PatternError(f"the expression {text[:200]!r} has a brace that counts nothing; write {{n,m}}, or \\{{ for the sign")
        copies *= max(1, int(low or 0), int(high or 0))
    if copies > MOST_COPIES:
        raise PatternError(f"the expression {text[:200]!r} repeats something {copies} times; at most {MOST_COPIES} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re._parser.parse(text)  # type: ignore[attr-defined]
            return Expression(text, regex.compile(text, regex.V0))
    except (re.error, regex.error, OverflowError, RecursionError, ValueError, MemoryError) as error:
        if isinstance(error, PatternError):
            raise
        raise PatternError(f"{text[:200]!r} is not a valid regular expression: {error}") from None
