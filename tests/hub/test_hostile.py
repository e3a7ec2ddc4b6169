"""Files that others wrote, with values that nobody means: only errors of ours come out, each on one printable line.

A file is written with one or two of its values replaced, removed or doubled, the same ones on every machine.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fm_jax.checkpoint import read, seal
from fm_jax.core import workdir
from fm_jax.core.errors import FmError
from fm_jax.data.text import records, tokenizer, tokens
from fm_jax.evals.report import history, results
from fm_jax.hub import families, low_rank, preprocessing
from fm_jax.hub.fields import Fields
from fm_jax.hub.files import safetensors, stored
from fm_jax.hub.files.weights import Spec
from fm_jax.train import log
from tests.hub.published import PUBLISHED
from tests.hub.test_preprocessing import PUBLISHED as PREPROCESSORS

VALUES = (  # as they stand in the file
    "null", "true", "false", "0", "-1", "1", "7", "3.5", "-3.5", "99999", "16777215", "2147483648", "1e308", "-1e308",
    "5e-324", "1e999", "NaN", "-Infinity", "1" + "0" * 39, "-1" + "0" * 38, "1" + "0" * 400, "1" + "0" * 9999,
    "[]", "{}", "[[]]", "[1, 2]", "[-1]", '[1, "a", null]', '[[["global"], 99999]]', '[[["global"], -1]]', "[{}, {}]",
    '{"a": {"b": [1]}}', '{"": null}', "[" * 70 + "]" * 70, "[" * 5000, '""', '"a"', '"None"', '"../a"', '"<u2"',
    r'"\ud800"', r'"\u001b[2J"', r'"a\u0000b"', '"' + "x" * 5000 + '"', "[" + "0," * 5000 + "0]",
)  # fmt: skip


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key or index) of every value inside JSON data."""
    keys = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in keys:
        yield data, key
        yield from places(value)


def damaged(data: Any, rng: random.Random) -> bytes:
    """Return the text of the data with one or two values changed; rarely the whole of it."""
    data, chosen = json.loads(json.dumps(data)), [rng.choice(VALUES) for _ in range(rng.choice((1, 1, 2)))]
    for number in range(len(chosen)):
        if not (there := list(places(data))):
            break  # the only value was removed
        where, key = rng.choice(there)
        act = rng.random()
        if act < 0.1:
            del where[key]
        elif act < 0.2 and isinstance(where, dict):
            where[f"other {number}"] = f"@{number}@"
        else:
            where[key] = f"@{number}@"
    text = json.dumps(data)
    for number, value in enumerate(chosen):
        text = text.replace(f'"@{number}@"', value)
    how = rng.random()
    if how < 0.02:
        return text.encode("utf-16")
    if how < 0.04:
        return text[: rng.randrange(len(text))].encode("utf-8", "surrogatepass")
    return (b"\xef\xbb\xbf" * (how < 0.06)) + text.encode()


def tokenizer_files(folder: Path) -> None:
    tokenizer.train(["the quick brown fox"], 258).save(folder)


def shards(folder: Path) -> None:
    arrays = {f"layers.{i}": np.zeros(4, np.float32) for i in range(3)}
    specs = {name: Spec("float32", x.shape) for name, x in arrays.items()}
    safetensors.write(folder, specs, arrays.items(), shard_bytes=16)


def token_folder(folder: Path) -> None:
    (folder / "tokens.bin").write_bytes(b"\0" * 20)
    index = tokens.Index("<u2", 10, 2, 30, 300, 0, 1, "0" * 64, "x")
    (folder / "index.json").write_text(json.dumps(vars(index)))


def record_folder(folder: Path) -> None:
    index = {"files": ["a"], "dtype": "<u2", "length": 8, "num_records": 3, "num_bytes": 9, "vocab_size": 9}
    (folder / "index.json").write_text(json.dumps(index | {"pad_id": 0, "sha256": "0" * 64}))


RECORD = {
    "step": 3, "metric": "loss", "metrics": {"loss": 0.5}, "data": {}, "leaves": {"params/a": ["float32", [2]]},
    "meta": {"config": {"seed": 0}, "git": {"revision": "abc"}, "model": {"class": "vision.vit.ViT", "cfg": {}}},
}  # fmt: skip


def open_record(folder: Path) -> None:
    """Read what a checkpoint says, under a seal that fits."""
    inner = folder / "checkpoints" / "3"
    inner.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint.json").replace(inner / "checkpoint.json")
    (inner / "seal.json").unlink(missing_ok=True)
    seal.publish(inner, inner.with_name("4"))
    (inner.with_name("4")).replace(inner)
    read.best(folder / "checkpoints")
    read.stored(read.record(inner))


def adapter(folder: Path) -> None:
    fields = Fields.open(folder / "adapter_config.json")
    sizes = low_rank.Sizes.read(fields)
    fields.close(["base_model_name_or_path"])
    assert sizes.of("layers.0.q_proj")[0] > 0


def claimed(folder: Path) -> None:
    workdir.claim(folder, experiment="experiments.a", config={"seed": 1}).release()


ENTRY = {"benchmark": "a", "date": "2026-11-25T00:00:00", "load": 1.0, "numbers": {"x": 1.0}, "config": {}}
ADAPTER = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"], "use_dora": False,
    "rank_pattern": {"k_proj": 4}, "alpha_pattern": {"k_proj": 8}, "init_lora_weights": True, "use_rslora": False,
}  # fmt: skip
# name -> (file, what it holds or what writes it, what reads it)
READERS: dict[str, tuple[str, Any, Callable[[Path], Any]]] = {
    **{
        f"config of {name}": (
            "config.json", one.config, lambda folder: families.build(Fields.open(folder / "config.json"))
        )
        for name, one in PUBLISHED.items()
    },
    **{
        f"preprocessor of {name}": (
            preprocessing.FILE, data, lambda folder, kind=kind: preprocessing.read(folder, kind)
        )
        for name, (kind, data, _) in PREPROCESSORS.items()
    },
    "adapter": ("adapter_config.json", ADAPTER, adapter),
    "tokenizer": ("tokenizer.json", tokenizer_files, tokenizer.load),
    "tokenizer config": ("tokenizer_config.json", tokenizer_files, lambda folder: tokenizer.load(folder).end_id),
    "shards": ("model.safetensors.index.json", shards, stored.open_weights),
    "tokens": ("index.json", token_folder, tokens.load),
    "records": ("index.json", record_folder, records.load),
    "checkpoint": ("checkpoint.json", RECORD, open_record),
    "run": ("run.json", {"experiment": "experiments.a", "config": {"seed": 0}, "starts": [{"time": "t"}]}, claimed),
    "results": ("results.json", {"accuracy": 0.5}, lambda folder: results.read(folder / "results.json")),
    "history": ("history.jsonl", ENTRY, lambda folder: history.table(history.read(folder / "history.jsonl"))),
    "metrics": ("metrics.jsonl", {"step": 1, "loss": "nan"}, lambda folder: log.read(folder / "metrics.jsonl")),
}  # fmt: skip


def attack(name: str, folder: Path, rounds: int) -> int:
    """Damage a file many times and read it; return how often it was refused."""
    file, content, reader = READERS[name]
    if callable(content):
        content(folder)
        content = json.loads((folder / file).read_text())
    rng, refused = random.Random(name), 0
    for _ in range(rounds):
        text = damaged(content, rng)
        (folder / file).write_bytes(text)
        try:
            reader(folder)
        except FmError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 2000, text[:2000]
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} of {text[:2000]!r}") from error
    return refused


@pytest.mark.parametrize("name", READERS)
def test_only_errors_of_ours_come_out(name: str, tmp_path: Path) -> None:
    assert attack(name, tmp_path, 25) or name == "metrics"  # whose damaged lines are passed over


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_only_errors_of_ours_come_out_of_many(name: str, tmp_path: Path) -> None:
    assert attack(name, tmp_path, 200) or name == "metrics"


def test_a_short_list_that_stands_for_billions_is_counted_first() -> None:
    config = PUBLISHED["gpt-neo-125m"].config | {"attention_types": [[["global"] * 100_000, 12]] * 10}
    with pytest.raises(FmError, match=r"names 12000000 layers of 12$"):
        families.build(Fields(config, "config.json"))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("resnet-50", {"depths": [2, 99999]}, r"depths asks for 100,001 blocks; at most 1,000"),
        ("resnet-50", {"depths": [1] * 40}, r"depths \[1, 1, .*at most 32 long"),
        ("efficientnet-b0", {"depth_coefficient": 1e300}, r"depth_coefficient asks for"),
        ("efficientnet-b0", {"width_coefficient": 1e9}, r"width_coefficient 1000000000.0 must be"),
        ("efficientnet-b0", {"image_size": 50_000}, r"images of 50000 × 50000 × 3 are too large"),
        ("vit-base-patch16-224", {"num_channels": 9999999}, r"too large"),
        ("vit-mae-base", {"image_size": 2048, "patch_size": 1}, r"positions of width 768 is too large"),
        ("vit-mae-base", {"decoder_hidden_size": 1 << 20}, r"positions of width 1,048,576 is too large"),
        ("t5-small", {"relative_attention_max_distance": 1 << 20}, r"out of range \(at most 65536\)"),
        ("gpt2", {"n_layer": 2001}, r"n_layer is 2001, which is out of range \(at most 2000\)"),
        ("bert-base-uncased", {"vocab_size": 1 << 25}, r"vocab_size is 33554432, which is out of range"),
    ],
)
def test_a_count_is_bounded_before_anything_is_built(name: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(FmError, match=said):
        families.build(Fields(PUBLISHED[name].config | change, "config.json"))
