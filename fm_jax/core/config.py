"""Nested frozen dataclasses as typed configs: override, read, write, compare.

A config is plain data: int, float, bool, str, Path, Literal, None, tuples of these, and sections
(dataclasses of these). Nothing is evaluated and nothing is imported by name.
"""

import dataclasses
import json
import math
import os.path
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from fm_jax.core.errors import ConfigError, FmError
from fm_jax.core.options import choices, default, describe, hint_for, members, options, section, show, spelt, tag

C = TypeVar("C")
_NONE = ("none", "null", "~")  # as people write None; in any case
# The whole form of each token: a folder may well be called out/hf_checkpoint or sk-learn-baseline.
_SECRET = re.compile(
    r"""(?<![A-Za-z0-9_-])(?:
    hf_[A-Za-z0-9]{30,}                                     # Hugging Face
    | sk-[A-Za-z0-9]{40,} | sk-(?:proj|ant|or|svcacct|admin)-[A-Za-z0-9_-]{32,}   # model providers
    | gh[pousr]_[A-Za-z0-9]{36,} | github_pat_[A-Za-z0-9_]{50,} | glpat-[A-Za-z0-9_-]{20,}
    | xox[abeoprs]-\d{8,}-[A-Za-z0-9-]{10,}                 # Slack
    | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[A-Za-z0-9_-]{35}      # AWS, Google
    )(?![A-Za-z0-9_-])""",
    re.VERBOSE,
)


def training(default: C) -> C:
    """Return a field that only training reads: two models that differ only in it compute the same function."""
    return dataclasses.field(default=default, metadata={"training": True})


def precision(default: C) -> C:
    """Return a field that sets the precision of a computation, such as a dtype."""
    return dataclasses.field(default=default, metadata={"precision": True})


def check_least(section: Any, **least: float) -> None:
    """Raise for the first field below its least value: `check_least(self, batch_size=1, workers=0)`.

    Raises:
        ConfigError: it names the field, its value and the least.
    """
    for name, smallest in least.items():
        if getattr(section, name) < smallest:
            raise ConfigError(f"{name} must be at least {smallest}, not {getattr(section, name)}")


def apply_overrides(cfg: C, argv: Sequence[str], *, also: Iterable[str] = ()) -> C:
    """Return `cfg` with `--a.b VALUE` and `--a.b=VALUE` applied; each changed section is validated once, whole.

    Where a field is one of several sections, `--a NAME` chooses which one (see `options.choices`).

    `also`: names of the caller's own options; they are used in "did you mean" hints only.

    Raises:
        ConfigError: unknown, repeated, incomplete or ill-typed option, or a section that refuses its values.
    """
    texts = split_argv(argv)
    listed = {option.path: option for option in options(cfg, chosen=texts)}
    known, unions = set(listed), {path: choices(option.hint) for path, option in listed.items()}
    for name in texts:
        if unions.get(name) and texts[name] not in unions[name]:
            _parse(texts[name], listed[name].hint, f"--{name}")  # before the options inside it are called unknown
        if name in known:
            continue
        for path, sections in unions.items():
            for choice, cls in sections.items():
                if name in {option.path for option in options(cls, f"{path}.")}:
                    raise ConfigError(f"--{name} is an option of --{path} {choice}; add that")
        if inside := [f"--{path}" for path in sorted(known) if path.startswith(f"{name}.")]:
            raise ConfigError(f"--{name} is a section; set one of its options: {', '.join(inside[:8])}")
        raise ConfigError(f"unknown option --{name[:80]}{hint_for(name, [*known, *also], '--')}")
    return _rebuild(type(cfg), cfg, texts, "")


def split_argv(argv: Sequence[str]) -> dict[str, str]:
    """Return {"a.b": "VALUE"} from `--a.b VALUE` and `--a.b=VALUE`; repeats and bare words raise ConfigError."""
    texts: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--") or not name:
            raise ConfigError(f"unexpected argument {word[:80]!r}; options look like --name VALUE")
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"option --{name[:80]} needs a value")
            value = following
        if name in texts:
            raise ConfigError(f"option --{name[:80]} is given twice")
        texts[name] = value
    return texts


def to_dict(cfg: Any) -> dict[str, Any]:
    """Return the config as JSON data; `from_dict` gives back an equal config.

    Raises:
        ConfigError: a field's value is not config data (an array, a function, nan).
    """
    return _encode(cfg, type(cfg), "")


def from_dict(cls: type[C], data: Mapping[str, Any]) -> C:
    """Build `cls` from JSON data; unknown keys and wrong types raise ConfigError, absent keys take their default."""
    return _decode(cls, data, "")


def changes(old: Any, new: Any) -> dict[str, tuple[str, str]]:
    """Return {"a.b": (old, new)} as text, for two configs or the dicts of two configs."""
    before, after = (x if isinstance(x, Mapping) else to_dict(x) for x in (old, new))
    return dict(_changes(before, after, ""))


def diff(old: Any, new: Any) -> list[str]:
    """Return the changed keys as lines `path: old -> new`."""
    return [f"{path}: {before} -> {after}" for path, (before, after) in changes(old, new).items()]


def _rebuild(cls: type[C], current: C | None, texts: Mapping[str, str], prefix: str) -> C:
    """Return `current` (or a fresh `cls`) with the texts below `prefix` parsed into it."""
    mine = {name: text for name, text in texts.items() if name.startswith(prefix)}
    if current is not None and not mine:
        return current
    hints, values = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if not field.init:
            continue
        path, hint = prefix + spelt(field.name), hints[field.name]
        value = getattr(current, field.name) if current is not None else default(field)
        inside = any(name.startswith(f"{path}.") for name in mine)
        if (chosen := choices(hint).get(mine.get(path, ""))) is not None:
            value = _rebuild(chosen, value if type(value) is chosen else None, mine, f"{path}.")
        elif path in mine and inside:
            raise ConfigError(f"--{path} {mine[path]} cannot be combined with options inside --{path}")
        elif path in mine:
            value = _parse(mine[path], hint, f"--{path}")
        elif inside:
            value = _rebuild(section(hint, value), value if dataclasses.is_dataclass(value) else None, mine, f"{path}.")
        if value is dataclasses.MISSING:
            raise ConfigError(f"--{path} is required (it has no default)")
        values[field.name] = value
    return _construct(cls, values, prefix.rstrip("."))


def _construct(cls: type[C], values: dict[str, Any], where: str) -> C:
    try:
        return cls(**values)
    except (ValueError, FmError) as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _parse(text: str, hint: Any, name: str) -> Any:
    if _SECRET.search(text):
        raise ConfigError(f"{name}: the value looks like a secret and would be written to disk; use the environment")
    try:
        return _value(text, hint)
    except TypeError:
        raise ConfigError(f"{name} ({describe(hint)}) cannot be set on the command line") from None
    except ValueError:
        words = [str(c) for m in members(hint) if get_origin(m) is Literal for c in get_args(m)]
        near = hint_for(text, [*words, *choices(hint)])
        if any(get_origin(m) is tuple for m in members(hint)) and "" in _items(text):
            near = "; there is nothing between two commas, or after the last one"
        raise ConfigError(f"{name}: {text[:80]!r} is not {describe(hint)}{near}") from None


def _value(text: str, hint: Any) -> Any:
    """Parse `text` as `hint`; ValueError if it does not fit, TypeError if the type cannot be parsed from text."""
    if len(members(hint)) > 1:
        if type(None) in members(hint) and text.lower() in _NONE:
            return None
        for member in members(hint):
            if member is type(None) or dataclasses.is_dataclass(member):
                continue
            try:
                return _value(text, member)
            except ValueError:
                continue
        _refuse(text)
    if get_origin(hint) is Literal:
        literals = {str(literal): literal for literal in get_args(hint)}
        return literals[text] if text in literals else _refuse(text)
    if get_origin(hint) is tuple:
        parts = _items(text)
        if "" in parts:
            _refuse(text)
        return tuple(_value(part, kind) for part, kind in zip(parts, _kinds(hint, len(parts)), strict=True))
    if (parse := _PARSERS.get(hint)) is None:
        raise TypeError(hint)
    return parse(text)


def _items(text: str) -> list[str]:
    """Return the items of a list as it is typed; a text without any has none."""
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _kinds(hint: Any, length: int) -> tuple[Any, ...]:
    """Return the type of each of `length` items of a tuple hint; `tuple[int, ...]` repeats its type."""
    kinds = get_args(hint) or (Any, Ellipsis)
    return kinds[:1] * length if kinds[1:] == (Ellipsis,) else kinds


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


def _integer(text: str) -> int:
    try:
        number = Decimal(text)  # takes 1_000 and 1e6, exactly
    except InvalidOperation:
        _refuse(text)
    # The size is checked before int(): 1e999999999 would fill the memory.
    if not number.is_finite() or not -(2**63) <= number < 2**63 or number != number.to_integral_value():
        _refuse(text)
    return int(number)


def _real(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _refuse(text)


def _boolean(text: str) -> bool:
    return text == "true" if text in ("true", "false") else _refuse(text)


def _string(text: str) -> str:
    return _refuse(text) if "\0" in text else text


def _path(text: str) -> Path:
    """Return a path; "~/" is the home directory, which a shell does not put into `--name=~/path`.

    None in any spelling is no path: where no path can be left out, a folder of that name would be meant by accident.
    """
    if not text or text.lower() in _NONE or re.search(r"[\0\r\n]", text):
        _refuse(text)
    return Path(os.path.expanduser(text) if text.startswith("~/") else text)


_PARSERS: dict[Any, Callable[[str], Any]] = {
    int: _integer,
    float: _real,
    bool: _boolean,
    str: _string,
    Path: _path,
}


def _encode(value: Any, hint: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value):
        hints, dotted = get_type_hints(type(value)), f"{path}." if path else ""
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        data = {spelt(name): _encode(getattr(value, name), hints[name], dotted + spelt(name)) for name in fields}
        several = sum(dataclasses.is_dataclass(member) for member in members(hint)) > 1
        return {"class": tag(type(value), hint)} | data if several else data
    if isinstance(value, tuple):
        inner = next((m for m in members(hint) if get_origin(m) is tuple), tuple)
        kinds = _kinds(inner, len(value))
        return [_encode(item, kind, f"{path}.{i}") for i, (item, kind) in enumerate(zip(value, kinds, strict=True))]
    if isinstance(value, Path):
        return str(value)
    if type(value) is int and float in members(hint) and int not in members(hint):
        return float(value)  # 1 and 1.0 in a float field must give the same config and hash
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(f"{path}: {str(value)[:60]!r} of type {type(value).__name__} is not config data")


def _decode(hint: Any, data: Any, path: str) -> Any:
    if isinstance(data, Mapping):
        classes: list[Any] = [member for member in members(hint) if dataclasses.is_dataclass(member)]
        if len(classes) > 1:
            classes = [cls for cls in classes if tag(cls, hint) == data.get("class")]
            data = {key: value for key, value in data.items() if key != "class"}
        if classes:
            return _decode_section(classes[0], data, path)
    for member in members(hint):
        if get_origin(member) is tuple and isinstance(data, list):
            kinds = _kinds(member, len(data))
            if len(kinds) == len(data):
                pairs = zip(kinds, data, strict=True)
                return tuple(_decode(kind, item, f"{path}.{i}") for i, (kind, item) in enumerate(pairs))
        if _fits(data, member):
            return Path(data) if member is Path else float(data) if member is float else data
    raise ConfigError(f"{path or 'config'}: {json.dumps(data, default=str)[:80]} is not {describe(hint)}")


def _decode_section(cls: Any, data: Mapping[str, Any], path: str) -> Any:
    hints, dotted = get_type_hints(cls), f"{path}." if path else ""
    fields = {spelt(field.name): field for field in dataclasses.fields(cls) if field.init}
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key {dotted}{key}{hint_for(str(key), fields, dotted)}")
    values = {
        field.name: _decode(hints[field.name], data[name], dotted + name)
        for name, field in fields.items()
        if name in data
    }
    for name, field in fields.items():
        if name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"key {dotted}{name} is missing")
    return _construct(cls, values, path)


def _fits(data: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(data == choice and type(data) is type(choice) for choice in get_args(hint))
    if hint is float:
        return type(data) in (int, float) and math.isfinite(data)
    return hint in (int, bool, str, Path, type(None)) and type(data) is (str if hint is Path else hint)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, tuple[str, str]]]:
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, dataclasses.MISSING), new.get(key, dataclasses.MISSING)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, f"{prefix}{key}.")
        elif before != after or isinstance(before, bool) != isinstance(after, bool):
            yield prefix + key, (show(before), show(after))
