"""UserError: what a user can mend, one line and exit code 2 on the command line. BadSample: what a reader skips."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: what, where, what was expected, how to mend it.

    near: the value got and the valid ones; the closest valid ones are offered as "did you mean".
    """

    def __init__(self, message: str, near: tuple[str, Iterable[str]] | None = None):
        super().__init__(message + (did_you_mean(*near) if near else ""))


class Diverged(UserError):
    """A training whose gradient is no number any more."""


class BadSample(Exception):
    """Why a sample cannot be used."""


def did_you_mean(got: str, valid: Iterable[str]) -> str:
    """'; did you mean x or y?', or the list of valid names where none is close and the list is short."""
    valid = list(valid)
    close = difflib.get_close_matches(str(got), valid, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(close) + "?"
    return "; valid are " + ", ".join(valid) if 0 < len(valid) <= 20 else ""
