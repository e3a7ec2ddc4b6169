from pathlib import Path

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.python_docs import library

ONLY = ("email", "http", "queue", "textwrap", "wsgiref")

SOURCE = '''#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""A module's own words."""
# A comment over two lines
# that says something.

x = 1  # beside code, too short to keep
# ------------------------------
# too short

class Thing:
    """What a thing is."""

    # Why it is done like this.
    def act(self):
        """Do it.

        As follows:
            indented more.
        """
'''


def test_blocks_are_docstrings_and_whole_line_comments_in_the_order_of_the_source(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(SOURCE)
    assert [(block.kind, block.text) for block in library._blocks(file)] == [
        ("docstring", "A module's own words."),
        ("comment", "# A comment over two lines\n# that says something."),
        ("docstring", "What a thing is."),
        ("comment", "# Why it is done like this."),
        ("docstring", "Do it.\n\nAs follows:\n    indented more."),
    ]


@pytest.mark.parametrize("damaged", [b"def f(:\n", b"x = '\xff'\n", b"# coding: nonsense\n", b"\0", b"if x:\n'''"])
def test_a_file_that_does_not_parse_gives_nothing(tmp_path: Path, damaged: bytes) -> None:
    file = tmp_path / "m.py"
    file.write_bytes(damaged)
    assert list(library._blocks(file)) == []


def test_a_lone_surrogate_in_a_docstring_becomes_text_that_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text('"""Say \\ud800 here."""\n')
    (block,) = library._blocks(file)
    assert block.text.encode() == b"Say ? here."


def test_no_module_stands_in_two_splits_and_nothing_is_said_twice() -> None:
    modules = library.read(ONLY)
    names = [module.name for module in modules]
    assert len(names) == len(set(names)) > 20
    assert {module.split for module in modules} == set(library.SPLITS)
    assert all(module.split == library.split_of(module.name) for module in modules)
    words = [block.words for module in modules for block in module.blocks]
    assert len(words) == len(set(words))


def test_the_first_copy_of_a_block_is_kept_in_train_and_marked() -> None:
    block = library.Block("docstring", "Said  by two\nmodules.")
    other = library.Block("docstring", "Said by two modules.")
    own = library.Block("docstring", "Said by one.")
    modules = [
        library.Module("a", "train", (block,)),
        library.Module("b", "test", (other, own)),
        library.Module("c", "test", (other,)),
    ]
    first, second = library._once(modules)
    assert (first.name, first.blocks[0].repeated) == ("a", True)
    assert (second.name, second.text, second.blocks[0].repeated) == ("b", "Said by one.", False)


def test_every_labelled_package_has_modules_in_every_split() -> None:
    assert len(library.LABELLED) >= 10
    names = {name for name, _ in library.sources(library.LABELLED)}
    assert names >= library._VALIDATION | library._TEST
    for package in library.LABELLED:
        mine = {library.split_of(name) for name in names if name.partition(".")[0] == package}
        assert mine == set(library.SPLITS), package


def test_test_suites_and_other_peoples_packages_are_left_out() -> None:
    names = [name for name, _ in library.sources(())]
    assert "asyncio.locks" in names and "unittest" in names
    assert not [name for name in names if {"test", "tests", "site-packages", "idle_test"} & set(name.split("."))]


def test_the_fingerprint_names_the_python_and_changes_with_the_modules() -> None:
    one, two = library.fingerprint(("queue",)), library.fingerprint(("queue", "textwrap"))
    assert one != two and one.split("-")[0].startswith("3.")


def test_topics_do_not_repeat_each_other_and_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = list(library._topics(()))
    if library._topics_file(()):
        assert len(pages) > 30
        assert len(set(pages)) == len(pages)
    monkeypatch.setattr(library, "_topics_file", lambda only: None)
    assert list(library._topics(())) == []


def test_a_python_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_root", lambda: tmp_path)
    with pytest.raises(DataError, match=r"no docstrings in .* for queue; install a Python"):
        library.read.__wrapped__(("queue",))


@pytest.mark.slow
def test_the_whole_library_is_divided_as_the_documentation_says() -> None:
    size = dict.fromkeys(library.SPLITS, 0)
    for module in library.read():
        size[module.split] += len(module.text.encode())
    total = sum(size.values())
    assert total > 2_500_000
    assert 0.87 < size["train"] / total < 0.93
    assert min(size.values()) / total > 0.035
