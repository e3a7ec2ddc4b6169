"""Clips and transcripts: only speech, equal texts in one split, and every odd file named."""

import gzip
import io
import json
import wave

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.packages import speech

LIST = """; comment: not a clip

hello: Hello there.
digits/1: one
again: One!
letters/at: at [@]
note: Leave a message. (simple tone sound plays)
beep: [this is a simple beep tone]
silence/1: (1 second of silence)
absent: never recorded
colon: Press 1: now
"""
CLIPS = ("hello", "digits/1", "again", "letters/at", "note", "beep", "silence/1", "colon", "unlisted")


def wav(seconds=0.5, channels=1, width=2, rate=8000):
    data = io.BytesIO()
    with wave.open(data, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(b"\1" * int(seconds * rate) * channels * width)
    return data.getvalue()


def put(root, clips=None, listed=None):
    texts, sounds = root / "texts", root / "sounds"
    path = texts / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(LIST.encode()) if listed is None else listed)
    for name, content in (clips or {name: wav() for name in CLIPS}).items():
        file = sounds / f"usr/share/asterisk/sounds/en_US_f_Allison/{name}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (root / "out").mkdir()
    return {"asterisk-core-sounds-en": texts, "asterisk-core-sounds-en-wav": sounds}, root / "out"


def rows(out, split):
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]


def test_only_speech_is_kept_with_its_words(tmp_path):
    packages, out = put(tmp_path)
    counts = speech.convert(packages, out)
    every = {row["file"]: row for split in speech.SPLITS for row in rows(out, split)}
    assert {file: row["text"] for file, row in every.items()} == {
        "clips/hello.wav": "Hello there.", "clips/digits/1.wav": "one", "clips/again.wav": "One!",
        "clips/letters/at.wav": "at", "clips/note.wav": "Leave a message.", "clips/colon.wav": "Press 1: now",
    }  # fmt: skip
    for file, row in every.items():
        with wave.open(str(out / file)) as clip:
            assert clip.getnframes() / clip.getframerate() == row["seconds"] == 0.5
    assert counts["clips"] == 6 and counts["left_out_without_speech"] == 3 and counts["minutes"] == 0.05
    assert (counts["words"], counts["distinct_words"]) == (10, 9)
    assert len(list((out / "clips").rglob("*.wav"))) == 6


def test_equal_texts_are_in_one_split_and_every_split_gets_some():
    assert speech.split_of("One!") == speech.split_of("one")
    splits = [speech.split_of(f"text {number}") for number in range(1000)]
    assert all(60 < splits.count(split) < 140 for split in ("validation", "test"))


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (wav(rate=16000), r"hello\.wav has \(1, 2, 16000\)"),
        (wav(channels=2), r"hello\.wav has \(2, 2, 8000\)"),
        (wav(seconds=0), r"hello\.wav has"),
        (wav()[:-100], r"hello\.wav has"),
        (wav()[:20], r"hello\.wav is not a WAV file"),
        (b"", r"hello\.wav is not a WAV file"),
        (b"OggS" * 100, r"hello\.wav is not a WAV file"),
    ],
    ids=["rate", "channels", "empty", "cut", "cut header", "nothing", "another format"],
)
def test_a_clip_of_another_form_is_named(clip, message, tmp_path):
    packages, out = put(tmp_path, {"hello": clip})
    with pytest.raises(DataError, match=message):
        speech.convert(packages, out)


@pytest.mark.parametrize(
    "listed",
    [b"", gzip.compress(LIST.encode())[:-9], b"text", gzip.compress(b"\xff: x")],
    ids=["nothing", "cut", "not packed", "not UTF-8"],
)
def test_a_damaged_list_is_named(listed, tmp_path):
    packages, out = put(tmp_path, listed=listed)
    with pytest.raises(DataError, match=r"core-sounds-en\.txt\.gz is damaged|no clip has a transcript"):
        speech.convert(packages, out)


def test_a_list_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "_MAX_LIST", 100)
    packages, out = put(tmp_path)
    with pytest.raises(DataError, match="holds more than 100 bytes"):
        speech.convert(packages, out)
