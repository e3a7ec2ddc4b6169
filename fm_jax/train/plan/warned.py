"""What the compiler says on standard error: arrays that it gathers whole because it knows no other way to move them."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental.compilation_cache import compilation_cache

_WHOLE = re.compile(
    r"Involuntary full rematerialization.* for HLO operation:? %?\S+ = ([^\s{]+)(?:.*op_name=\"([^\"]*)\")?"
)

_CHATTER = re.compile(r"[IW]\d{4} \d\d:\d\d:\d\d")  # what a compiler notes for its own authors


@contextmanager
def heard() -> Iterator[list[str]]:
    """Yield a list that holds the arrays rematerialised involuntarily in the block, once it is left.

    A compiler writes to the file descriptor itself, so that is where it is read. Its errors, and what Python writes,
    are passed on.
    """
    whole: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield whole
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                if found := _WHOLE.search(line):
                    whole.append(f"{found[1]} in {found[2] or 'an unnamed operation'}")
                elif not _CHATTER.match(line):
                    print(line, file=sys.stderr)


@contextmanager
def uncached() -> Iterator[None]:
    """Compile anew: a program from the compile cache comes without its warnings, and a plan's would only fill it."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it is used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
