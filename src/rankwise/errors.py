"""The errors that rankwise raises on purpose: each names the argument, the value and the remedy."""

import difflib
from collections.abc import Iterable


class RankwiseError(Exception):
    """Base of every error raised on purpose. The command line prints it as one line, without a traceback."""


class RecipeError(RankwiseError, ValueError):
    """A recipe that cannot be built: an illegal pair of axis values, an unknown option, a bad rank."""


class TargetError(RankwiseError, ValueError):
    """A target pattern that matches nothing, or a module that cannot be adapted."""


class CheckpointError(RankwiseError, ValueError):
    """An adapter that does not fit: missing or unexpected keys, wrong shapes, another base, a half-written folder."""


class ConfigError(RankwiseError, ValueError):
    """A configuration file with an unknown key, a wrong type or a missing value."""


class DataError(RankwiseError, ValueError):
    """A data file that cannot be used: a broken line, no supervised token, an unknown label."""


class CalibrationError(RankwiseError, ValueError):
    """Calibration data that is missing, too small, or gives statistics that are no numbers."""


class TrainingError(RankwiseError, RuntimeError):
    """A run that had to stop: a loss that is not a number, an adapter that never received a gradient."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """A ', did you mean ...?' clause for an unknown word, or an empty string when nothing known is close."""
    matches = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    matches.sort(key=lambda match: sorted(match) != sorted(word))  # letters that changed places are the likeliest slip
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
