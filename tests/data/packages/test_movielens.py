"""Typed tables whose ids refer to each other."""

import csv
import json

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.packages import movielens

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t881250949\n2\t1\t5.0\t891717742.0\n"
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tToy Story\t1995\tAnimation Children's Comedy\n2\tWho, me?\tunkonwn\tunknown\n"
)
USER = (
    "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n1\t24\tM\ta\t01234\n2\t53\tF\tb\tT8H1N\n"
)


def put(root, **changes):
    folder = root / "recbole/dataset_example/ml-100k"
    folder.mkdir(parents=True)
    for suffix, text in ({"inter": INTER, "item": ITEM, "user": USER} | changes).items():
        (folder / f"ml-100k.{suffix}").write_text(text)
    (root / "out").mkdir()
    return {"recbole": root}, root / "out"


def test_the_tables_have_the_columns_and_types_of_the_schema(tmp_path):
    packages, out = put(tmp_path)
    assert movielens.convert(packages, out) == {"interactions": 2, "items": 2, "users": 2, "mean_rating": 4.0}
    schema = json.loads((out / "schema.json").read_text())
    tables = {name: list(csv.DictReader((out / f"{name}.csv").open(newline=""))) for name in schema}
    assert all(list(row) == list(schema[name]) for name, rows in tables.items() for row in rows)
    assert [row["rating"] for row in tables["interactions"]] == ["3", "5"]
    assert [row["timestamp"] for row in tables["interactions"]] == ["881250949", "891717742"]
    assert tables["items"][0]["genres"] == "Animation|Children's|Comedy"
    assert (tables["items"][1]["title"], tables["items"][1]["year"]) == ("Who, me?", "")
    assert [row["zip_code"] for row in tables["users"]] == ["01234", "T8H1N"]  # texts: a leading zero stays


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inter": INTER.replace("rating:float", "rating:token")}, r"inter:1: the columns are"),
        ({"inter": INTER + "1\t2\t3\n"}, "inter:4: 3 cells instead of 4"),
        ({"inter": INTER + "1\t2\tnan\t5\n"}, "inter:4: rating 'nan' is not of type number"),
        ({"inter": INTER + "1\t2\t3\t-5\n"}, "timestamp '-5' is not of type time"),
        ({"inter": INTER + "9\t2\t3\t5\n"}, "interactions has the user_id 9, which users lacks"),
        ({"inter": INTER + "1\t9\t3\t5\n"}, "interactions has the item_id 9, which items lacks"),
        ({"item": ITEM.replace("1995", "soon")}, "year 'soon' is not of type integer"),
        ({"item": ITEM.replace("Comedy", "Comedie")}, "genres .* is not of type categories"),
        ({"user": USER + "1\t24\tM\ta\t0\n"}, "users has an user_id twice"),
        ({"user": USER.replace("\n1\t", "\n\t")}, "user_id '' is not of type id"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(changes, message, tmp_path):
    packages, out = put(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        movielens.convert(packages, out)
