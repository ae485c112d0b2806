"""A table of parameter names, read in both directions."""

from __future__ import annotations

import re


class Names:
    """Key templates of this toolkit and of another layout, e.g. {"stages.{s}.blocks.{b}.{p}": "stages.{s}.{b}.{p}"}.

    A field stands for one part of a dotted name; the first row that fits a key translates it. also: other templates of
    the other layout, by which it is read and never written, e.g. {"layers.{b}.{p}": "stages.{s}.blocks.{b}.{p}"}.
    """

    def __init__(self, rows: dict[str, str], also: dict[str, str] | None = None):
        self._to_theirs = [(_pattern(ours), theirs) for ours, theirs in rows.items()]
        self._to_ours = [(_pattern(theirs), ours) for ours, theirs in rows.items()]
        self._to_ours += [(_pattern(theirs), ours) for theirs, ours in (also or {}).items()]

    def theirs(self, key: str) -> str | None:
        """The other layout's name of one of our keys; None where the table has none."""
        return _translate(key, self._to_theirs)

    def ours(self, key: str) -> str | None:
        """Our name of one of the other layout's keys; None where the table has none."""
        return _translate(key, self._to_ours)


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)  # literal, field, literal, ...
    return re.compile("".join(f"(?P<{part}>[^.]+)" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def _translate(key: str, rows: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rows:
        if match := pattern.fullmatch(key):
            return template.format(**match.groupdict())
    return None
