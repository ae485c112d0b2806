"""The one exception for mistakes a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input. Its message is one line: what is wrong, where, and what to do.

    Commands print the message and exit with `status`; from Python it is an ordinary `ValueError`.
    """

    status = 2


class TryAgain(UsageError):
    """Nothing is wrong with the input: the same command may well succeed later, and jobs are requeued."""

    status = 75  # sysexits' "try again"


def one_line(text: str) -> str:
    """The text on one line that any terminal or UTF-8 file takes: what cannot be printed, as a file's name may hold it,
    becomes an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """A hint such as `" (did you mean 'a', 'b'?)"` naming the known words nearest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=n, cutoff=0.5)
    return f" (did you mean {', '.join(repr(c) for c in close)}?)" if close else ""
