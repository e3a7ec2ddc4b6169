"""MovieLens 100K as typed tables: interactions.csv, items.csv, users.csv, and schema.json.

interactions: user_id, item_id, rating (1 to 5), timestamp (seconds since 1970). items: item_id, title, year (empty if
unknown), genres (joined by |). users: user_id, age, gender, occupation, zip_code. schema.json: {table: {column: type}},
where a type is id, integer, number, time, text, category or categories; ids in interactions are those of the other
tables.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fm_jax.core.errors import DataError

GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western", "unknown",
)  # fmt: skip
SCHEMA = {
    "interactions": {"user_id": "id", "item_id": "id", "rating": "number", "timestamp": "time"},
    "items": {"item_id": "id", "title": "text", "year": "integer", "genres": "categories"},
    "users": {"user_id": "id", "age": "integer", "gender": "category", "occupation": "category", "zip_code": "text"},
}
_NO_YEAR = ("", "unkonwn", "V")  # so spelt in the file; V is the part of a title with two brackets, "Land (V)"
_HEADS = {  # table -> (file, its header)
    "interactions": ("inter", "user_id:token item_id:token rating:float timestamp:float"),
    "items": ("item", "item_id:token movie_title:token_seq release_year:token class:token_seq"),
    "users": ("user", "user_id:token age:token gender:token occupation:token zip_code:token"),
}


def convert(packages: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the three tables; return their rows, and the mean rating."""
    folder = packages["recbole"] / "recbole/dataset_example/ml-100k"
    tables = {name: [_row(name, cells, where) for where, cells in _lines(folder, name)] for name in SCHEMA}
    for ids, name in (("user_id", "users"), ("item_id", "items")):
        known = [row[ids] for row in tables[name]]
        if len(set(known)) != len(known):
            raise DataError(f"{name} has an {ids} twice")
        if unknown := {row[ids] for row in tables["interactions"]} - set(known):
            raise DataError(f"interactions has the {ids} {min(unknown)}, which {name} lacks")
    for name, rows in tables.items():
        with (out / f"{name}.csv").open("x", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(SCHEMA[name]))
            writer.writeheader()
            writer.writerows(rows)
    (out / "schema.json").write_text(json.dumps(SCHEMA, indent=1) + "\n", "utf-8")
    ratings = [float(row["rating"]) for row in tables["interactions"]]
    return {name: len(rows) for name, rows in tables.items()} | {"mean_rating": round(sum(ratings) / len(ratings), 4)}


def _lines(folder: Path, table: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (place, cells) of a tab-separated file whose first line must be the known header."""
    suffix, head = _HEADS[table]
    path = folder / f"ml-100k.{suffix}"
    width = len(SCHEMA[table])
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        cells = line.split("\t")
        where = f"{path.name}:{number}"
        if number == 1 and cells != head.split():
            raise DataError(f"{where}: the columns are {cells}, not {head.split()}")
        if len(cells) != width:
            raise DataError(f"{where}: {len(cells)} cells instead of {width}")
        if number > 1:
            yield where, cells


def _row(table: str, cells: list[str], where: str) -> dict[str, str]:
    row = dict(zip(SCHEMA[table], (cell.strip() for cell in cells), strict=True))
    for column, kind in SCHEMA[table].items():
        try:
            row[column] = _READ.get(kind, str)(row[column])
        except ValueError as error:
            raise DataError(f"{where}: {column} {row[column][:40]!r} is not of type {kind}") from error
    return row


def _integer(text: str) -> str:
    return "" if text in _NO_YEAR else str(int(text))


def _time(text: str) -> str:
    seconds = float(text)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(text)
    return str(int(seconds))


def _number(text: str) -> str:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return f"{value:g}"


def _genres(text: str) -> str:
    names = text.split()
    if not set(names) <= set(GENRES):
        raise ValueError(text)
    return "|".join(names)


def _id(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


_READ: dict[str, Callable[[str], str]] = {
    "id": _id, "integer": _integer, "number": _number, "time": _time, "categories": _genres,
}  # fmt: skip
