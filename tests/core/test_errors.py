"""What an error quotes: on one line, printable, and not without end."""

import pytest

from fm_jax.core.errors import DataError, as_json, printable, shown


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain ünïcode ▁", "plain ünïcode ▁"),
        ("two\nlines\tand\u2028more", "two lines and more"),
        ("\x1b[2J\x07\x00", r"\x1b[2J\x07\x00"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("half \ud800", r"half \ud800"),
        ("", ""),
    ],
)
def test_a_message_cannot_steer_a_terminal(text: str, wanted: str) -> None:
    assert printable(text) == wanted == str(DataError(text))
    wanted.encode()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("a\x1b", r"'a\x1b'"),
        ("x" * 99, f"'{'x' * 20}'…"),
        (["a", None, 1.5], '["a", null, 1.5]'),
        ({"a": {"b": []}}, '{"a": {"b": []}}'),
        (10**400, "1" + "0" * 19 + "…"),
        (float("nan"), "NaN"),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, 6…"),
        (object, "\"<class 'object'>\""),
    ],
    ids=lambda value: str(value)[:12],
)
def test_outside_data_are_quoted_shortly(value: object, wanted: str) -> None:
    assert shown(value, 20) == wanted


def test_a_message_ends() -> None:
    assert str(DataError("x" * 10**6)) == "x" * 1900 + "…"


def test_a_text_among_data_is_spelt_as_in_the_file() -> None:
    assert as_json("a") == '"a"'
