"""Render chat templates in a process of its own; run by `chat.render`, which talks to it by JSON.

A template is a program from outside. Jinja's sandbox keeps it from Python's internals, and this process bounds its
time, its memory and its output: no template can hang, exhaust or take over the process that trains or serves.

Input: {"template": …, "variables": [{…}, …], "seconds": …, "bytes": …, "characters": …}.
Output: {"texts": […]}, or {"error": kind, "message": …} with kind "jinja" (a missing or old package), "template" (the
template is wrong, or refuses the messages) or "bound".
"""

import contextlib
import json
import sys
from datetime import datetime
from typing import Any, NoReturn

OLDEST = (3, 1, 6)  # earlier sandboxes have known escapes


class TooLong(Exception):
    """The texts exceed the number of characters."""


def main() -> dict[str, Any]:
    """Answer the request on the standard input."""
    asked = json.load(sys.stdin)
    try:
        import jinja2
    except ImportError:
        return {"error": "jinja", "message": "jinja2 is not installed"}
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < OLDEST:
        return {"error": "jinja", "message": f"jinja2 {jinja2.__version__} has a sandbox that is known to leak"}
    bound(asked["seconds"], asked["bytes"])
    left, texts = asked["characters"], list[str]()
    try:
        template = environment().from_string(asked["template"])
        for variables in asked["variables"]:
            pieces: list[str] = []
            for piece in template.generate(variables):
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    raise TooLong
            texts.append("".join(pieces))
        return {"texts": texts}
    except MemoryError:
        return {"error": "bound", "message": f"needs more than {asked['bytes']:,} bytes of memory"}
    except TooLong:
        return {"error": "bound", "message": f"writes more than {asked['characters']:,} characters"}
    except Exception as error:  # whatever a template does wrong: its errors have many classes
        return {"error": "template", "message": str(error) or type(error).__name__}


def bound(seconds: int, size: int) -> None:
    """Limit this process's CPU time and memory, where the system can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def environment() -> Any:
    """Return Jinja's sandbox with what chat templates are written for (transformers' `apply_chat_template`)."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """The tag `generation`, which encloses what the assistant wrote; it changes no text."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain attribute

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def tojson(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **form)  # Jinja's own escapes HTML

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
