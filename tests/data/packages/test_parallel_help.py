"""Help pages become sentence pairs: joined by id, split by file, nothing of train in test."""

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.packages import parallel_help
from fm_jax.data.text import parallel

PAGE = """<html><body><p dir="auto">{0} without an id stays out</p>
<h2 id="hd_id1" dir="auto"><a href="x">{0} heading of this page</a></h2>
<p id="par_id2" class="paragraph"><span class="avis">{0} text with &quot;marks&quot;</span> and<br>a break.</p>
<p id="par_id3">Press <span class="switchinline"><span hidden="true" id="MACx" class="MAC"><span class="k">{0}
Command</span></span><span hidden="true" id="defaultx">Ctrl</span></span> on {0} now</p>
<p id="par_id4">Open <span hidden="true" class="CALC">{0} sheet</span><span hidden="true" class="WRITER">{0} text</span>
here</p><p id="par_id5">code = equal in both</p><p id="par_id6">{0} short</p><p id="par_id7">{1}</p>
<p id="par_id2">{0} repeated id, other text</p><p id="par_idonly{0}">{0} of one language only</p></body></html>"""


def put(root, pages):
    for package, name in parallel_help.LANGUAGES.values():
        folder = root / package / "usr/share/libreoffice/help" / name / "text"
        for path, texts in pages.items():
            if name in texts:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(texts[name], "utf-8")
        folder.mkdir(parents=True, exist_ok=True)
    return {package: root / package for package, _ in parallel_help.LANGUAGES.values()}


def page(word, other, number=""):
    long = " ".join(["word"] * 61)
    return {"en-US": PAGE.format(f"{word}{number}", long), "de": PAGE.format(f"{other}{number}", long)}


def names(split, count):
    """Return names of files that fall into a split."""
    every = (f"shared/{number:03}.html" for number in range(10_000))
    return [name for name in every if parallel_help.split_of(name) == split][:count]


def test_a_page_gives_its_paragraphs_and_headings_with_plain_text(tmp_path):
    (name,) = names("train", 1)
    (tmp_path / "out").mkdir()
    counts = parallel_help.convert(put(tmp_path, {name: page("House", "Haus")}), tmp_path / "out")
    pairs = parallel.load(tmp_path / "out", "train")
    assert [pairs.sources[row] for row in range(len(pairs))] == [
        "House heading of this page",
        'House text with "marks" and a break.',
        "Press Ctrl on House now",
    ]
    assert pairs.targets[2] == "Press Ctrl on Haus now"
    assert (counts["files"], counts["distinct_pairs"], counts["train"]) == (1, 6, 3)
    assert (counts["left_out_equal"], counts["left_out_by_length"]) == (2, 1)


def test_files_are_split_and_a_sentence_of_train_is_not_in_test(tmp_path):
    (tmp_path / "out").mkdir()
    files = {split: names(split, 2) for split in parallel_help.SPLITS}
    pages = {
        name: page("own", "eigen", number)
        for number, name in enumerate(name for part in files.values() for name in part)
    }
    shared = '<p id="par_id1">A sentence that all pages share.</p>', '<p id="par_id1">Ein Satz aller Seiten.</p>'
    pages = {name: {"en-US": text["en-US"] + shared[0], "de": text["de"] + shared[1]} for name, text in pages.items()}
    counts = parallel_help.convert(put(tmp_path, pages), tmp_path / "out")
    lines = {split: (tmp_path / "out" / f"{split}.en").read_text().splitlines() for split in parallel_help.SPLITS}
    assert [counts[split] for split in parallel_help.SPLITS] == [7, 6, 6]
    assert not set(lines["train"]) & {*lines["validation"], *lines["test"]}
    assert "A sentence that all pages share." in lines["train"]
    for split in parallel_help.SPLITS:
        assert len(parallel.load(tmp_path / "out", split)) == counts[split]


def test_about_a_twentieth_of_the_files_is_held_out_twice():
    splits = [parallel_help.split_of(f"shared/{number}.html") for number in range(4000)]
    assert all(150 < splits.count(split) < 250 for split in ("validation", "test"))


def test_pages_of_one_language_give_no_pair(tmp_path):
    (tmp_path / "out").mkdir()
    packages = put(tmp_path, {"a.html": {"en-US": page("a", "b")["en-US"]}})
    with pytest.raises(DataError, match="have no paragraph in common"):
        parallel_help.convert(packages, tmp_path / "out")


def test_a_page_of_absurd_size_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_help, "_MAX_FILE", 100)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"a\.html has \d+ bytes; at most 100"):
        parallel_help.convert(put(tmp_path, {"a.html": page("a", "b")}), tmp_path / "out")
