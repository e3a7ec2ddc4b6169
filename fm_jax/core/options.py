"""The options that the command line can set in a config: paths, types as text, nearest names, the help page."""

import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: dotted path, type hint, current value (or dataclasses.MISSING), the class that declares it.

    The value of a field that is one of several sections is the current one's name.
    """

    path: str
    hint: Any
    value: Any
    owner: type


def options(cfg: Any, prefix: str = "", *, chosen: Mapping[str, str] | None = None) -> Iterator[Option]:
    """Yield the options of a config (or of a dataclass, with its defaults) in order of declaration.

    The options of an optional section are listed even while the section is None: setting one creates it. Of a field
    that is one of several sections, those of the current one are listed, or of the one that `chosen` names at its path.
    """
    cls, current = (cfg, None) if isinstance(cfg, type) else (type(cfg), cfg)
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        path, hint = prefix + spelt(field.name), hints[field.name]
        value = getattr(current, field.name) if current is not None else default(field)
        inside, sections = section(hint, value), choices(hint)
        other = sections.get((chosen or {}).get(path, ""))
        if other is not None and other is not inside:
            value, inside = dataclasses.MISSING, other
        if inside is None or sections or type(None) in members(hint):
            shown = next((name for name, cls_ in sections.items() if cls_ is inside), value)
            yield Option(path, hint, shown, cls)
        if inside is not None:
            yield from options(value if dataclasses.is_dataclass(value) else inside, f"{path}.", chosen=chosen)


def help_text(cfg: Any, doc: str | None = None, *, chosen: Mapping[str, str] | None = None) -> str:
    """Return a page with every option: name, type, current value, and the field's comment or docstring."""
    listed = list(options(cfg, chosen=chosen))
    notes = {cls: _comments(cls) for cls in {option.owner for option in listed}}
    rows = [
        (f"--{o.path}", describe(o.hint), show(o.value), notes[o.owner].get(o.path.rpartition(".")[2], ""))
        for o in listed
    ]
    widths = [min(max((len(row[i]) for row in rows), default=0), limit) for i, limit in enumerate((44, 40, 24))]
    lines = ["  ".join([*(t.ljust(w) for t, w in zip(row[:3], widths, strict=True)), row[3]]) for row in rows]
    head = [inspect.cleandoc(doc), ""] if doc else []
    return "\n".join([*head, "options (type, current value):", *(f"  {line}".rstrip() for line in lines)])


def hint_for(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean X?` for the nearest known name in any section, or "" if none is near."""
    wanted = name.lower().replace("-", "_")
    last = wanted.rpartition(".")[2]

    def nearness(option: str) -> float:
        option = option.lower()
        leaf = option.rpartition(".")[2]
        whole = difflib.SequenceMatcher(None, wanted, option).ratio()
        part = difflib.SequenceMatcher(None, last, leaf).ratio()
        starts = 0.9 if len(last) >= 2 and leaf.startswith(last) else 0.0
        return max(whole, 0.95 * part, starts) + 0.01 * whole  # the whole path breaks ties

    best = max(sorted(known), key=nearness, default=None)
    return f"; did you mean {prefix}{best}?" if best is not None and nearness(best) >= 0.65 else ""


def describe(hint: Any) -> str:
    """Return a type as text: int, float, true|false, gelu|relu, int,int, float|none."""
    if get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in get_args(hint))
    if len(members(hint)) > 1:
        names = {cls: name for name, cls in choices(hint).items()}
        return "|".join(names.get(member) or describe(member) for member in members(hint))
    if get_origin(hint) is tuple:
        inner = [describe(arg) for arg in get_args(hint) if arg is not Ellipsis]
        return f"{inner[0]},…" if Ellipsis in get_args(hint) else ",".join(inner)
    if dataclasses.is_dataclass(hint):
        return "section"
    words = {bool: "true|false", str: "text", type(None): "none"}
    return words.get(hint) or str(getattr(hint, "__name__", hint)).lower()


def show(value: Any) -> str:
    """Return a value as a user would type it."""
    if value is dataclasses.MISSING:
        return "(not set)"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(show(item) for item in value) or "''"
    return str(value) if value != "" else "''"


def members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the hint alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def section(hint: Any, value: Any) -> Any:
    """Return the dataclass whose fields are options below this field, or None."""
    if dataclasses.is_dataclass(value):
        return type(value)
    classes = [member for member in members(hint) if dataclasses.is_dataclass(member)]
    return classes[0] if len(classes) == 1 else None


def choices(hint: Any) -> dict[str, type]:
    """Return the sections that a union of several chooses among, by name; {} for any other hint.

    A class's name is its tag in stored configs; of a `Config` that is one of several, its module's alone.
    """
    classes: list[Any] = [member for member in members(hint) if dataclasses.is_dataclass(member)]
    return {tag(cls, hint).removesuffix(".Config"): cls for cls in classes} if len(classes) > 1 else {}


def tag(cls: Any, hint: Any) -> str:
    """Return a class's tag within a union: its name, with the module's name where two classes share one."""
    names = [member.__name__ for member in members(hint) if isinstance(member, type)]
    return cls.__name__ if names.count(cls.__name__) == 1 else f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def spelt(name: str) -> str:
    """Return the option name of a field: `from_` is spelt "from", which Python does not allow as a field name."""
    return name.removesuffix("_")


def default(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default, or dataclasses.MISSING."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _comments(cls: type) -> dict[str, str]:
    """Return each field's note from the source: the docstring below it, else the comment on its line."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
        body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):  # no source: a shell, or a class made at run time
        return {}
    lines, notes = source.splitlines(), {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()  # type: ignore[operator]
        note = rest.partition("#")[2].strip()
        if isinstance(following, ast.Expr) and isinstance(text := getattr(following.value, "value", None), str):
            note = " ".join(text.split())
        notes[spelt(node.target.id)] = note
    return notes
