"""Data files of every kind for tests, written small."""

import gzip
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet as pq


def put(path: Path, content: bytes) -> Path:
    """Write a file and the folders above it, packed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(content, path.suffix))
    return path


def packed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content, mtime=0)
    return pyarrow.compress(content, codec="zstd", asbytes=True) if suffix == ".zst" else content


def parquet(columns: Mapping[str, Sequence[Any]], **options: Any) -> bytes:
    held = io.BytesIO()
    pq.write_table(pyarrow.table(dict(columns)), held, **options)
    return held.getvalue()
