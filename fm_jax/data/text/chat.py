"""Chat templates: messages to the text that a chat model was trained on, as transformers' `apply_chat_template`.

A template is a Jinja program that comes with a checkpoint. It is rendered in a process of its own (`chat_process.py`)
with bounded time, memory and output; it takes about a tenth of a second, for one conversation or for thousands. Only
rendering needs the package jinja2 (the extra `chat`).

A message is {"role": "user", "content": "…"}; roles and further fields are the template's.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fm_jax.core import files
from fm_jax.core.errors import ConfigError, DataError

FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"
SECONDS, BYTES, CHARACTERS = 10, 1 << 30, 50_000_000  # of CPU time, of memory, of text
_WALL = 120  # seconds: a process that waits takes no CPU time
_LONGEST = 1_000_000  # characters of a template; published ones have at most twenty thousand

# Two code points that Unicode keeps free of meaning enclose a control token that a message spells out.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"

Message = Mapping[str, Any]


def stated(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return a folder's templates in the form of tokenizer_config.json's "chat_template"; None if it has none.

    The files chat_template.jinja and additional_chat_templates/NAME.jinja count before tokenizer_config.json.

    Raises:
        DataError: a file that cannot be read.
    """
    paths = {"default": folder / FILE} if files.there(folder / FILE, DataError) else {}
    if (folder / FOLDER).is_dir():
        paths |= {path.stem: path for path in sorted((folder / FOLDER).glob("*.jinja"))}
    if not paths:
        return config.get("chat_template")
    texts = {name: _read(path) for name, path in paths.items()}
    if texts.keys() == {"default"}:
        return texts["default"]
    return [{"name": name, "template": text} for name, text in texts.items()]


def templates(value: Any, where: str) -> dict[str, str]:
    """Return {name: template} of tokenizer_config.json's "chat_template": one template, or a list with names.

    Raises:
        DataError: another form.
    """
    if value is None:
        return {}
    rows = value if isinstance(value, list) else [{"name": "default", "template": value}]
    named: dict[Any, Any] = dict(
        (row.get("name"), row.get("template")) if isinstance(row, dict) else (None, None) for row in rows
    )
    if not all(isinstance(part, str) for pair in named.items() for part in pair):
        raise DataError(f"{where}: chat_template is neither a text nor a list of names and templates")
    return named


def choose(known: Mapping[str, str], name: str | None, *, tools: bool, where: str) -> str:
    """Return the template of a name; without one, "tool_use" if there are tools and such a template, else "default".

    Raises:
        DataError: no template, or none of this name.
    """
    if not known:
        raise DataError(f"{where} has no chat template; give the prompt as text, or use a model made for chat")
    wanted = name or ("tool_use" if tools and "tool_use" in known else "default")
    if wanted not in known:
        raise DataError(f"{where} has no chat template {wanted!r}; it has {', '.join(known)}")
    return known[wanted]


def render(template: str, variables: Sequence[Mapping[str, Any]], *, where: str = "the chat template") -> list[str]:
    """Return the text of a template for each set of variables.

    Raises:
        ConfigError: jinja2 is missing.
        DataError: the template is wrong, refuses the messages or exceeds its bounds, or a variable is no JSON data.
    """
    if len(template) > _LONGEST:
        raise DataError(f"{where} has {len(template):,} characters, more than {_LONGEST:,}; it is no chat template")
    try:
        asked = json.dumps(
            {
                "template": template, "variables": [dict(each) for each in variables],
                "seconds": SECONDS, "bytes": BYTES, "characters": CHARACTERS,
            }
        )  # fmt: skip
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"messages for {where} must be JSON data (texts, numbers, lists, dicts): {error}") from error
    command = [sys.executable, "-P", str(Path(__file__).with_name("chat_process.py"))]
    try:
        done = subprocess.run(command, input=asked.encode(), capture_output=True, timeout=_WALL, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"{where} does not end: stopped after {_WALL} seconds") from None
    if done.returncode < 0:  # killed by a limit
        raise DataError(f"{where} exceeds its bounds: {SECONDS} seconds of CPU time and {BYTES:,} bytes of memory")
    if done.returncode:
        raise DataError(f"{where} cannot be rendered: {_line(done.stderr.decode(errors='replace')[-300:])}")
    answer = json.loads(done.stdout)
    if answer.get("error") == "jinja":
        raise ConfigError(f"{answer['message']}; chat templates need it: install fm_jax[chat]")
    if "error" in answer:
        line = _line(answer["message"])
        what = line if answer["error"] == "bound" else f"refuses these messages: {line}"
        raise DataError(f"{where} {what}")
    return list(answer["texts"])


def plain(messages: Sequence[Message], where: str) -> list[dict[str, Any]]:
    """Return messages as dicts without the fields that are None, which templates would write out.

    Raises:
        DataError: no message, or one that is not a mapping.
    """
    if not messages:
        raise DataError(f"there are no messages for {where}; give at least one")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f'message {number} is {str(message)[:40]!r}, not {{"role": …, "content": …}}')
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def mark(value: Any, control: Iterable[str]) -> Any:
    """Return messages with marks around every control token that their texts spell out."""
    longest_first = sorted(control, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            bare = value.replace(_OPEN, "").replace(_CLOSE, "")  # no text can forge a mark
            return pattern.sub(lambda match: f"{_OPEN}{match[0]}{_CLOSE}", bare)
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list | tuple) else value

    return walk(value)


def parts(text: str) -> list[tuple[str, bool]]:
    """Split a rendered text at its marks: (part, whether its control tokens are a template's own)."""
    pieces = re.split(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}", text)
    split = [(piece, index % 2 == 0) for index, piece in enumerate(pieces)]
    # a template may have cut between two marks: a mark that is left alone still separates
    return [(part, own) for piece, own in split for part in re.split(f"[{_OPEN}{_CLOSE}]", piece) if part]


def _line(message: str) -> str:
    """Return a message from outside as one printable line."""
    return "".join(char if char.isprintable() else " " for char in message)[:300].strip()


def _read(path: Path) -> str:
    files.there(path, DataError)  # refuses what would hang, such as a pipe
    try:
        return path.read_text("utf-8")
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
