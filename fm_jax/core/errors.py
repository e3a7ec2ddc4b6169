"""Errors a user can fix: one line that names the thing, its value and what to do; `code` is the exit status."""

import json
from typing import Any

_LONGEST = 1_900  # characters of a message
_JSON = json.JSONEncoder(ensure_ascii=False, default=repr)


class FmError(Exception):
    """Any error whose message alone is enough; the command line prints it without a traceback."""

    code = 1

    def __str__(self) -> str:
        """Return the message on one line; what it quotes of a file neither steers a terminal nor fills it."""
        text = printable(super().__str__())
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class ConfigError(FmError):
    """An invalid option, mesh or work directory."""

    code = 2


class DataError(FmError):
    """Missing, damaged or unusable data."""

    code = 3


class CheckpointError(FmError):
    """A checkpoint or weights file that is missing, damaged or has the wrong shapes."""

    code = 4


class ResourceError(FmError):
    """No space, memory or device left."""

    code = 5


class NumericError(FmError):
    """Loss or gradients stayed non-finite for longer than the run allows."""

    code = 6


class Preempted(FmError):
    """The run was asked to stop and has saved; start it again with the same command."""

    code = 75


def printable(text: str) -> str:
    """Return a text on one line: whitespace as spaces, and what may steer a terminal as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any, most: int = 60) -> str:
    """Return outside data as a message may quote it: a text in quotes, other data as JSON; cut after `most`."""
    if isinstance(value, str):
        return repr(value) if len(value) <= most else f"{value[:most]!r}…"
    return as_json(value, most)


def as_json(value: Any, most: int = 60) -> str:
    """Return data as the file spells them, printable, cut after `most` characters."""
    text = ""
    for part in _JSON.iterencode(value):  # lazily: a list of a million numbers is not spelt out
        text += part
        if len(text) > most:
            return printable(text[:most]) + "…"
    return printable(text)
