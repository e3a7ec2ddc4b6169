"""Rows of named fields from JSON lines, a JSON list, CSV, TSV or Parquet, as one stream in the order of the file.

    .jsonl .ndjson   an object a line; blank lines are skipped
    .json            the same, or one list of objects
    .csv             a line of column names, then rows; separated by , ; tab or |, whichever gives the wanted columns
    .tsv             the same, separated by tabs and without quoting, as GLUE is
    .parquet         columns (needs pyarrow)

All but Parquet, which is packed inside, may be packed (`.gz`, `.zst`). Text is UTF-8, with or without a byte order
mark. A field of a field is named with a dot: `translation.en`.
"""

import codecs
import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from fm_jax.core import json_file
from fm_jax.core.errors import DataError
from fm_jax.data import files, packed

Form = Literal["jsonl", "csv", "parquet"]
Row = dict[str, Any]

SUFFIXES: dict[Form, tuple[str, ...]] = {
    "jsonl": packed.with_packed(".jsonl", ".json", ".ndjson"),
    "csv": packed.with_packed(".csv", ".tsv"),
    "parquet": (".parquet",),
}
MAX_LINE = 10_000_000  # bytes; a longer line is a damaged file far more often than a document

_CHUNK = 1 << 20
_AT_ONCE = 64  # rows of Parquet decoded at once: one of them may have MAX_LINE bytes
_MISSING = object()


def form(file: Path) -> Form:
    """Return the form of a file by its name; a name that says nothing is taken for JSON lines."""
    name = file.name.lower()
    return next((form for form, suffixes in SUFFIXES.items() if name.endswith(suffixes)), "jsonl")


def one_form(found: files.Found) -> Form:
    """Return the form of all files of a split.

    Raises:
        DataError: they have several forms, so the same rows may be there twice.
    """
    forms = {form(file): file for file in found.files}
    if len(forms) > 1:
        first, second = list(forms.values())[:2]
        raise DataError(f"{first} and {second} have the same split in two forms; keep one")
    return next(iter(forms))


def is_list(file: Path) -> bool:
    """Return whether a .json file is one list of objects, and not an object a line."""
    if not packed.plain(file).endswith(".json"):
        return False
    with packed.reading(file) as stream:
        head = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    return head.startswith(b"[")


def place(file: Path, number: int) -> str:
    """Return how messages name a row: by its line, or by its number where rows are no lines."""
    lines = form(file) != "parquet" and not packed.plain(file).endswith(".json")
    return f"{file}:{number}" if lines else f"{file}: row {number}"


def rows(file: Path, fields: Sequence[str], *, optional: Sequence[str] = ()) -> Iterator[tuple[int, Row]]:
    """Yield (line or row number from 1, row) of a file.

    Args:
        file: one of the forms above.
        fields: the fields that are wanted; CSV and Parquet must have these columns, a JSON row is checked by `value`.
        optional: columns to read as well if they are there; without `fields`, one of them must be.

    Raises:
        DataError: while iterating: unreadable, damaged, not UTF-8, or not of its form; names file and line or row.
    """
    match form(file):
        case "parquet":
            yield from _parquet(file, fields, optional)
        case "csv":
            with packed.reading(file) as stream:
                yield from _csv(stream, file, fields)
        case "jsonl" if is_list(file):
            with packed.reading(file) as stream:
                yield from _items(stream, file)
        case _:
            with packed.reading(file) as stream:
                for number, _, line in lines(stream, file):
                    if line.strip():
                        yield number, parsed(line, place(file, number), first=number == 1)


def value(row: Row, field: str, where: str) -> Any:
    """Return a field of a row, or of an object in it (`translation.en`).

    Raises:
        DataError: the row has no such field; the message lists the fields that it has.
    """
    if (found := _lookup(row, field)) is _MISSING:
        raise DataError(f"{where}: no field {field!r} (the line has {', '.join(map(repr, list(row)[:8]))})")
    return found


def has(row: Row, field: str) -> bool:
    """Return whether `value` would find the field."""
    return _lookup(row, field) is not _MISSING


def text(given: Any, field: str, where: str) -> str:
    """Return a value that must be text; half a character (a lone surrogate, which JSON can spell) becomes "?".

    Raises:
        DataError: it is something else; the message names the field and the type.
    """
    if isinstance(given, bytes):
        try:
            return given.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: field {field!r} is not UTF-8 text (byte {error.start})") from None
    if not isinstance(given, str):
        raise DataError(f"{where}: field {field!r} is {type(given).__name__}, not text")
    return given.encode("utf-8", "replace").decode()


def lines(stream: BinaryIO, file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, position of the first byte, line) of a stream.

    Raises:
        DataError: a line is longer than MAX_LINE.
    """
    position = 0
    for number in itertools.count(1):
        if not (line := stream.readline(MAX_LINE + 1)):
            return
        if len(line) > MAX_LINE:
            raise DataError(f"{file}:{number}: the line is longer than {MAX_LINE} bytes")
        yield number, position, line
        position += len(line)


def parsed(line: bytes, where: str, *, first: bool = False) -> Row:
    """Return the object that a line of JSON spells; `first`: a byte order mark may stand before it.

    Raises:
        DataError: not UTF-8, not JSON, or not an object.
    """
    line = line.removeprefix(codecs.BOM_UTF8) if first else line
    return _object(json_file.parse(line, where, DataError, halves=True), where)


def not_utf8(file: Path, number: int, position: int, data: bytes, error: UnicodeDecodeError) -> DataError:
    """Return the error for bytes that are not UTF-8: `data` begin at byte `position`, in line `number`."""
    at, wide = position + error.start, position == 0 and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    hint = "; it is UTF-16: save it as UTF-8" if wide else ""
    return DataError(f"{file}:{number}: not UTF-8 text (byte {at}: {data[error.start]:#04x}){hint}")


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: the line has {type(row).__name__}, not an object of named fields")
    return row


def _lookup(row: Row, field: str) -> Any:
    if field in row:
        return row[field]
    here: Any = row
    for part in field.split("."):
        if not isinstance(here, dict) or part not in here:
            return _MISSING
        here = here[part]
    return here


def _items(stream: BinaryIO, file: Path) -> Iterator[tuple[int, Row]]:
    """Yield the objects of one JSON list, holding one of them and a chunk of the file at a time."""
    decoder, chunks = json_file.decoder(), _characters(stream, file)
    held = next(chunks, "")
    while "[" not in held and (more := next(chunks, "")):
        held += more
    at = held.find("[") + 1
    for number in itertools.count(1):
        where = f"{file}: row {number}"
        while (at := _space(held, at)) == len(held) and (more := next(chunks, "")):
            held, at = more, 0
        if held.startswith("]", at):
            if held[at + 1 :].strip() or "".join(chunks).strip():
                raise DataError(f"{file}: there is more after the end of the list")
            return
        if number > 1:
            if not held.startswith(",", at):
                raise DataError(f"{where}: not JSON, or truncated: expected ',' or ']', not {held[at : at + 1]!r}")
            at += 1
        while True:
            try:
                row, at = decoder.raw_decode(held, _space(held, at))
                break
            except (ValueError, RecursionError) as error:
                # The object may go on in the next chunk; one longer than a line may be is damage.
                over = isinstance(error, RecursionError) or len(held) - at > MAX_LINE
                if not (more := "" if over else next(chunks, "")):
                    raise DataError(f"{where}: not JSON, or truncated: {error}") from None
                held, at = held[at:] + more, 0
        yield number, _object(row, where)


def _space(text: str, at: int) -> int:
    """Return the position of the first character from `at` on that JSON does not skip."""
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _characters(stream: BinaryIO, file: Path) -> Iterator[str]:
    decoder, position, number = codecs.getincrementaldecoder("utf-8")(), 0, 1
    while True:
        data = stream.read(_CHUNK)
        kept = decoder.getstate()[0]
        try:
            characters = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            number += (kept + data)[: error.start].count(b"\n")
            raise not_utf8(file, number, position - len(kept), kept + data, error) from None
        position, number = position + len(data), number + data.count(b"\n")
        if characters:
            yield characters
        if not data:
            return


def _csv(stream: BinaryIO, file: Path, fields: Sequence[str]) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(MAX_LINE)  # its own limit is 131,072 characters
    decoded = _decoded(stream, file)
    first = next(decoded, "")
    tabs = packed.plain(file).endswith(".tsv")
    options: dict[str, Any] = {"delimiter": "\t" if tabs else _separator(first, fields), "strict": True}
    if tabs:
        options |= {"quoting": csv.QUOTE_NONE, "strict": False}
    reader = csv.reader(itertools.chain([first], decoded), **options)
    names: list[str] = []
    try:
        for cells in reader:
            where = f"{file}:{reader.line_num}"
            if not cells:
                continue
            if not names:
                names = [name.strip() for name in cells]
                _check_columns(names, fields, file)
                continue
            if len(cells) != len(names):
                raise DataError(f"{where}: {len(cells)} columns, but the first line names {len(names)}")
            yield reader.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not {'TSV' if tabs else 'CSV'}: {error}") from None


def _decoded(stream: BinaryIO, file: Path) -> Iterator[str]:
    for number, position, line in lines(stream, file):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(file, number, position, line, error) from None


def _separator(head: str, fields: Sequence[str]) -> str:
    """Return the separator by which a first line names all wanted columns, or else the most columns."""

    def named(separator: str) -> tuple[bool, int]:
        try:
            names = [name.strip() for name in next(csv.reader([head], delimiter=separator), [])]
        except csv.Error:
            return False, 0
        return set(fields) <= set(names), len(names)

    return max(",;\t|", key=named)


def _check_columns(names: Sequence[str], fields: Sequence[str], file: Path) -> None:
    for field in fields:
        if names.count(field) != 1:
            count = "no column" if field not in names else "more than one column"
            raise DataError(f"{file}: {count} {field!r} (the file has {', '.join(map(repr, names[:8]))})")


def _parquet(file: Path, fields: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[int, Row]]:
    files.check(file)
    arrow = packed.pyarrow(file, "Parquet files")
    from pyarrow import parquet

    number = 0
    try:
        with open(file, "rb") as stream:
            opened = parquet.ParquetFile(stream, page_checksum_verification=True)
            names = opened.schema_arrow.names
            _check_columns(names, [field if field in names else field.split(".")[0] for field in fields], file)
            columns = [*fields, *(name for name in optional if name in names and name not in fields)]
            if not columns:
                _check_columns(names, optional[:1], file)
            unpacked, most = 0, packed.limit(file)
            for batch in opened.iter_batches(_AT_ONCE, columns=columns, use_threads=False):
                if (unpacked := unpacked + batch.nbytes) > most:
                    raise DataError(f"{file} unpacks to more than {most} bytes; split it if that is right")
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file}: row {number + 1}: damaged, or not Parquet: {str(error).splitlines()[0]}") from None
    except OSError as error:  # pyarrow raises it without a number for damaged pages
        if error.errno:
            raise files.failed(error, f"cannot read {file}") from error
        raise DataError(f"{file}: row {number + 1}: damaged, or not Parquet: {str(error).splitlines()[0]}") from None
