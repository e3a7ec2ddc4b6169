"""A corpus that every Python contains: docstrings, comments and reference topics of its standard library.

Nothing is imported or run: sources are parsed with `ast` and `tokenize`. Test suites, site-packages and
platform-specific files are excluded. Modules missing from an installation are missing from its corpus.
"""

import ast
import functools
import hashlib
import importlib.util
import io
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fm_jax.core.errors import DataError

SPLITS = ("train", "validation", "test")
TOPICS = "pydoc_data.topics"

# Modules of the ten packages that `docstrings` classifies. Chosen by hand: the smaller packages have three to seven
# modules, so a hash would not give each a fair share of every split.
_VALIDATION = frozenset(
    """asyncio.queues asyncio.transports email.charset email.header email.quoprimime http.cookies
    importlib.resources.readers importlib.resources.simple importlib.util logging.handlers multiprocessing.process
    multiprocessing.spawn unittest.loader unittest.runner unittest.util urllib.robotparser wsgiref.simple_server
    wsgiref.util xml.dom.minidom xml.sax.saxutils""".split()
)
_TEST = frozenset(
    """asyncio.locks asyncio.streams email.feedparser email.generator email.headerregistry email.parser email.utils
    http.server importlib.abc importlib.resources.abc logging.config multiprocessing.connection unittest.result
    unittest.suite urllib.parse wsgiref.headers xml.sax.xmlreader""".split()
)
LABELLED = tuple(sorted({name.partition(".")[0] for name in _TEST}))

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "_bundled"}
_LEFT_OUT |= {"pydoc_data", "__phello__"}
_LOCAL = ("_sysconfigdata", "sitecustomize", "usercustomize")  # written by the installation, not by CPython


@dataclass(frozen=True)
class Block:
    """One docstring, or one run of comment lines, or one reference topic."""

    kind: Literal["docstring", "comment", "topic"]
    text: str
    repeated: bool = False  # other modules contain the same block

    @property
    def words(self) -> str:
        """The text with normalised white space, for comparing blocks."""
        return " ".join(self.text.split())


@dataclass(frozen=True)
class Module:
    """The blocks of one module, in source order."""

    name: str
    split: str
    blocks: tuple[Block, ...]

    @property
    def package(self) -> str:
        """The top-level package (or module) that this module belongs to."""
        return self.name.partition(".")[0]

    @property
    def text(self) -> str:
        """All blocks, separated by empty lines."""
        return "\n\n".join(block.text for block in self.blocks)


def split_of(module: str) -> str:
    """Return the split that a whole module belongs to; the same on every machine and Python version."""
    if module == TOPICS:
        return "train"  # its pages quote each other
    if module.partition(".")[0] in LABELLED:
        return "validation" if module in _VALIDATION else "test" if module in _TEST else "train"
    share = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") / 2**32
    return "validation" if share < 0.03 else "test" if share < 0.075 else "train"


@functools.lru_cache(maxsize=2)
def read(only: tuple[str, ...] = ()) -> tuple[Module, ...]:
    """Read the running Python's library, sorted by split and name; takes seconds.

    A repeated block (such as a licence header) is kept only in its first module. The train split comes first, so none
    of its blocks occur in the others.

    Args:
        only: top-level packages and modules to keep; empty: all.

    Raises:
        DataError: this Python has no sources (a frozen or stripped one), or none of `only`.
    """
    modules = [Module(name, split_of(name), tuple(_blocks(path))) for name, path in sources(only)]
    modules += [Module(TOPICS, "train", (Block("topic", text),)) for text in _topics(only)]
    modules.sort(key=lambda module: SPLITS.index(module.split))
    kept = _once(modules)
    if not kept:
        raise DataError(
            f"no docstrings in {_root()} for {', '.join(only) or 'any module'}; "
            "install a Python that includes the sources of its library"
        )
    return tuple(kept)


def _once(modules: Iterable[Module]) -> list[Module]:
    """Keep the first copy of every block."""
    modules, kept, seen = list(modules), [], set()
    copies = Counter(words for module in modules for words in {block.words for block in module.blocks})
    for module in modules:
        blocks = []
        for block in module.blocks:
            if block.words not in seen:
                seen.add(block.words)
                blocks.append(replace(block, repeated=copies[block.words] > 1))
        if blocks:
            kept.append(replace(module, blocks=tuple(blocks)))
    return kept


@functools.lru_cache(maxsize=8)
def fingerprint(only: tuple[str, ...] = ()) -> str:
    """Return version and hash of these sources, such as `3.12.1-0a1b2c3d`; takes about 0.1 s."""
    digest = hashlib.sha256()
    for name, path in [*sources(only), *([(TOPICS, topics)] if (topics := _topics_file(only)) else [])]:
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return f"{platform.python_version()}-{digest.hexdigest()[:8]}"


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def sources(only: Iterable[str]) -> list[tuple[str, Path]]:
    """Return (module name, source file), sorted by name."""
    root, files = _root(), []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in _LEFT_OUT and not name.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith(_LOCAL):
                path = Path(folder, name)
                parts = path.relative_to(root).with_suffix("").parts
                files.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return sorted((name, path) for name, path in files if not only or name.partition(".")[0] in only)


def _blocks(path: Path) -> Iterator[Block]:
    """Yield the docstrings and comments of a source file in order; nothing for a file that does not parse."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(source)
        blocks = [*_docstrings(tree), *_comments(source)]
    except (OSError, SyntaxError, ValueError, tokenize.TokenError):
        return
    yield from (block for _, block in sorted(blocks, key=lambda pair: pair[0]))


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, Block]]:
    waiting: list[ast.AST] = [tree]
    while waiting:  # `ast.walk` would visit every expression too, which takes a third of the whole time
        node = waiting.pop()
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            inside = getattr(node, field, None)
            waiting += inside if isinstance(inside, list) else []
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text.strip():
                yield node.body[0].lineno, Block("docstring", _printable(text))


def _comments(source: str) -> Iterator[tuple[int, Block]]:
    """Yield blocks of whole-line comments of at least three words; comments beside code mean little without it."""
    lines: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            lines.append((token.start[0], token.string.rstrip()))
    runs: list[list[tuple[int, str]]] = []
    for number, text in lines:
        if runs and runs[-1][-1][0] == number - 1:
            runs[-1].append((number, text))
        else:
            runs.append([(number, text)])
    for run in runs:
        kept = [text for _, text in run if not re.match(r"#!|#.*coding[:=]", text) and re.search(r"\w", text)]
        text = _printable("\n".join(kept))
        if len(re.findall(r"[A-Za-z]{2,}", text)) >= 3:
            yield run[0][0], Block("comment", text)


def _topics(only: Iterable[str]) -> Iterator[str]:
    """Yield the pages of the language reference, the largest first, without pages that a larger one contains."""
    path = _topics_file(only)
    if path is None:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        values = (getattr(node, "value", None) for node in tree.body)
        table = next(value for value in values if isinstance(value, ast.Dict))
        pages = sorted(map(str, ast.literal_eval(table).values()), key=lambda page: (-len(page), page))
    except (OSError, StopIteration, SyntaxError, ValueError):
        return
    bodies: list[str] = []
    for page in pages:
        # A page's heading level, and so its underline, differs where a larger page contains it.
        body = " ".join(re.sub(r"\n[*=~^\"+-]{3,}\n", "\n", page).split())
        if not any(body in larger for larger in bodies):
            bodies.append(body)
            yield _printable(page)


def _topics_file(only: Iterable[str]) -> Path | None:
    if only and TOPICS.partition(".")[0] not in only:
        return None
    try:
        spec = importlib.util.find_spec(TOPICS)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _printable(text: str) -> str:
    """Return text without lone surrogates (a docstring may contain one) and without trailing spaces."""
    text = text.strip().encode("utf-8", "replace").decode()
    return "\n".join(line.rstrip() for line in text.splitlines())
