"""Telephone prompts read by one English speaker, with transcripts.

train.jsonl, validation.jsonl, test.jsonl: {"file": "clips/NAME.wav", "text", "seconds"}; equal texts are in one split.
Clips are mono WAV files of 16 bits at 8 kHz, as in the package; tones, noises and silences are left out. Where the list
has a sign or a note beside the words ("at [@]", "(tone plays)"), the text is the words.
"""

import gzip
import hashlib
import io
import re
import shutil
import wave
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fm_jax.core.errors import DataError
from fm_jax.data.packages import json_lines

SPLITS = ("train", "validation", "test")
_MAX_LIST = 1 << 20
_NOTE = re.compile(r"\s*(?:\[[^\]]*\]|\([^)]*\))\s*")  # a sign, or what a clip holds beside speech


def convert(packages: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the clips and their texts; return how many, and how long they are."""
    texts = transcripts(packages["asterisk-core-sounds-en"] / "usr/share/doc/asterisk-core-sounds-en")
    root = packages["asterisk-core-sounds-en-wav"] / "usr/share/asterisk/sounds/en_US_f_Allison"
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    left = 0
    for path in sorted(root.rglob("*.wav")):
        name = path.relative_to(root).with_suffix("").as_posix()
        if not (text := texts.get(name, "")):
            left += 1
            continue
        file = out / "clips" / f"{name}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, file)
        row = {"file": file.relative_to(out).as_posix(), "text": text, "seconds": round(_seconds(file), 3)}
        rows[split_of(text)].append(row)
    every = [row for part in rows.values() for row in part]
    if not every:
        raise DataError("no clip has a transcript")
    words = [word for row in every for word in re.findall(r"[a-z']+", row["text"].lower())]
    counts: dict[str, Any] = {split: json_lines.write(out / f"{split}.jsonl", part) for split, part in rows.items()}
    minutes = round(sum(row["seconds"] for row in every) / 60, 2)
    return counts | {
        "clips": len(every), "minutes": minutes, "words": len(words), "distinct_words": len(set(words)),
        "left_out_without_speech": left,
    }  # fmt: skip


def transcripts(folder: Path) -> dict[str, str]:
    """Return {name: text} of the package's list; a text is "" where the clip is no speech.

    Raises:
        DataError: the list is damaged.
    """
    path = folder / "core-sounds-en.txt.gz"
    try:
        with gzip.open(path) as file:
            data = file.read(_MAX_LIST + 1)
        lines = data.decode("utf-8").splitlines()
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} is damaged ({error})") from error
    if len(data) > _MAX_LIST:
        raise DataError(f"{path.name} holds more than {_MAX_LIST} bytes")
    found = {}
    for line in lines:
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            found[name.strip()] = " ".join(_NOTE.sub(" ", text).split())
    return found


def split_of(text: str) -> str:
    """Return the split of a text: about 80, 10 and 10 %."""
    plain = " ".join(re.findall(r"[\w']+", text.lower()))
    share = int.from_bytes(hashlib.sha256(plain.encode()).digest()[:4], "big") / 2**32
    return "validation" if share < 0.1 else "test" if share < 0.2 else "train"


def _seconds(path: Path) -> float:
    """Return a clip's length; DataError unless it is mono, of 16 bits, at 8 kHz."""
    try:
        with wave.open(io.BytesIO(path.read_bytes())) as clip:
            form = (clip.getnchannels(), clip.getsampwidth(), clip.getframerate())
            frames, data = clip.getnframes(), len(clip.readframes(clip.getnframes()))
    except (wave.Error, EOFError) as error:
        raise DataError(f"{path.name} is not a WAV file ({error})") from error
    if form != (1, 2, 8000) or not frames or data != 2 * frames:
        raise DataError(f"{path.name} has {form} channels, bytes and Hz and {data} bytes, not (1, 2, 8000)")
    return frames / form[2]
