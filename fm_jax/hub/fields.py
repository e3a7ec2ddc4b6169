"""Read a config.json field by field, so that nothing in it is silently ignored.

A family's file takes the fields that its config holds and states the values that it requires of the others. A field
that is left at the end, and is not known to have no effect on what the model computes, is an error that names it.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fm_jax.core import files, json_file
from fm_jax.core.errors import CheckpointError, as_json, shown
from fm_jax.hub import bookkeeping

T = TypeVar("T")
_NEEDED: Any = object()
_LARGEST = 1 << 24  # of a number of anything; the longest published context has 10,485,760 tokens
_LAYERS = 2_000
_LISTED = 20  # problems in one message


class Fields:
    """The fields of one config.json, and which of them have been read."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        """Start with every field unread; `where` names the file in messages."""
        self.data, self.where = dict(data), where
        self._read: set[str] = set()
        self._refused: list[str] = []
        self._inner: list[Fields] = []

    @classmethod
    def open(cls, file: Path) -> "Fields":
        """Read a config.json.

        Raises:
            CheckpointError: there is none, or it is not a JSON object.
        """
        if not files.there(file, CheckpointError):
            raise CheckpointError(f"there is no {file}; a model folder holds config.json beside its weights")
        return cls(json_file.read(file, CheckpointError), str(file))

    @property
    def kind(self) -> str:
        """Return `model_type`, or "" if there is none."""
        kind = self.data.get("model_type", "")
        return kind if isinstance(kind, str) else shown(kind)

    @property
    def architecture(self) -> str:
        """Return the first of `architectures`, the class that the weights were saved from, or ""."""
        names = self.data.get("architectures")
        if not isinstance(names, list) or not names:
            return ""
        return names[0] if isinstance(names[0], str) and len(names[0]) < 100 else shown(names[0])

    def inside(self, name: str, data: Mapping[str, Any]) -> "Fields":
        """Return the fields of a config inside this one; `close` closes it too."""
        self._inner.append(Fields(data, f"{self.where}, {name}"))
        return self._inner[-1]

    def has(self, name: str) -> bool:
        """Say whether a field is present and not null."""
        return self.data.get(name) is not None

    def take(self, name: str, kind: type[T], default: T = _NEEDED, *, most: int = _LARGEST) -> T:
        """Return a field's value; null counts as absent, and an integer is accepted as a float.

        Args:
            name: name of the field.
            kind: its type.
            default: its value if it is absent.
            most: largest value of an integer; a number of layers is at most 2,000, whatever this says.

        Raises:
            CheckpointError: absent without a default, of another type, or out of range.
        """
        self._read.add(name)
        value = self.data.get(name)
        if value is None:
            if default is _NEEDED:
                raise CheckpointError(f"{self.where}: {name} is missing")
            return default
        if kind is float and type(value) is int and abs(value) < 1 << 128:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise CheckpointError(f"{self.where}: {name} is {shown(value)}, not {kind.__name__}")
        # Tables are built layer by layer, and positions row by row: a config must not ask for a billion of them before
        # the weights are read.
        most = min(most, _LAYERS) if "layer" in name else most
        if isinstance(value, int) and not -1 <= value <= most:
            raise CheckpointError(f"{self.where}: {name} is {shown(value)}, which is out of range (at most {most})")
        return value

    def many(self, name: str, kind: type[T], default: list[T], *, longest: int = _LAYERS) -> list[T]:
        """Return a list of values of one type; null counts as absent.

        Args:
            name: name of the field.
            kind: type of every value.
            default: the list if the field is absent.
            longest: largest length.

        Raises:
            CheckpointError: it is not such a list.
        """
        values = self.take(name, list, default)
        if len(values) > longest or any(type(value) is not kind for value in values):
            raise CheckpointError(
                f"{self.where}: {name} {shown(values)} is not a list of {kind.__name__}, at most {longest} long"
            )
        return values

    def choose(self, name: str, choices: Mapping[str, T], default: str | None = None) -> T:
        """Return our word for theirs, such as an activation's.

        Raises:
            CheckpointError: absent without a default, or a word that is not supported.
        """
        word = self.take(name, str) if default is None else self.take(name, str, default)
        if word not in choices:
            known = ", ".join(choices)
            raise CheckpointError(f"{self.where}: {name} {shown(word)} is not supported; supported are {known}")
        return choices[word]

    def expect(self, name: str, *values: Any) -> None:
        """Read a field that, if present, must have one of these values; null counts as absent, and 0 is 0.0."""
        self._read.add(name)
        value = self.data.get(name)
        if value is not None and not any(_equal(value, known) for known in values):
            words = " or ".join(as_json(known) for known in values)
            self._refused.append(f"{name} is {as_json(value)}, but only {words} is supported")

    def refuse(self, problem: str) -> None:
        """Record something unsupported; `close` raises it with the other problems."""
        self._refused.append(problem)

    def skip(self, *names: str) -> None:
        """Mark fields as read that this family does not need."""
        self._read.update(names)

    def close(self, ignore: Iterable[str] = ()) -> None:
        """Raise one error for everything unsupported and for every field that was not read.

        Args:
            ignore: further fields that the caller knows to have no effect.
        """
        for inner in self._inner:
            inner.close(ignore)
        for name, off in bookkeeping.ONLY.items():
            if name not in self._read:
                self.expect(name, off)
        known = self._read | bookkeeping.NAMES | set(ignore)
        unknown = sorted(name for name, value in self.data.items() if name not in known and value is not None)
        problems = list(self._refused)
        if unknown:
            listed = ", ".join(f"{name[:40]} ({as_json(self.data[name], 40)})" for name in unknown[:_LISTED])
            more = f" and {len(unknown) - _LISTED} more fields" if len(unknown) > _LISTED else ""
            one = len(unknown) == 1
            rule = "is unknown; ignore it only if it changes" if one else "are unknown; ignore them only if they change"
            problems.append(f"{listed}{more} {rule} no result")
        if problems:
            raise CheckpointError(f"{self.where} is not supported: {'; '.join(problems)}")


def _equal(value: Any, known: Any) -> bool:
    """Say whether two values are equal and of one type; a whole number may stand for a float."""
    alike = type(value) is type(known) or (type(value), type(known)) == (int, float)
    return alike and bool(value == known)
