"""Every set is fetched, and is what its authors published: counts, digests, and figures that papers report."""

import hashlib
import json
import wave

import numpy as np
import pytest
from safetensors.numpy import load_file

from fm_jax.data.images.folder import ImageFolder
from fm_jax.data.packages import cache
from fm_jax.data.packages.sources import SOURCES
from fm_jax.data.text import documents, labelled, parallel
from fm_jax.hub.files import safetensors

pytestmark = pytest.mark.real

TESTS = {
    "crows_pairs": 1018, "stereoset": 4229, "bbq": 1012, "winobias": 761, "mmlu": 2850, "commonsenseqa": 1221,
    "openbookqa": 500, "piqa": 1500, "siqa": 1954, "medqa": 1273, "medmcqa": 4183, "pubmedqa": 500, "xsum": 999,
    "narrativeqa": 3000, "nq_open": 3569, "truthfulqa": 817, "disflqa": 1000,
}  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", SOURCES)
def test_a_set_is_whole_and_its_licence_lies_beside_it(name, fetched):
    path = fetched(name)
    record = cache.opened(path, SOURCES[name])
    assert record is not None and record["licence"] == SOURCES[name].licence
    text = (path / cache.LICENCE).read_text("utf-8")
    assert SOURCES[name].attribution in text and text.count("=" * 80) == len(SOURCES[name].packages)
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert found - {cache.RECORD} == set(record["files"])


def test_minilm_is_the_official_file(fetched):
    path = fetched("minilm")
    sha256 = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert sha256.startswith("53aa5117") and sha256.endswith("d9db")
    file = safetensors.open_file(path / "model.safetensors")
    assert len(file.specs) == 104
    floats = [spec.shape for spec in file.specs.values() if spec.dtype == "float32"]
    assert sum(int(np.prod(shape)) for shape in floats) == 22_713_216
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 6


def test_smollm2_is_the_known_file(fetched):
    (path,) = fetched("smollm2").glob("*.gguf")
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    assert data[:4] == b"GGUF" and sha256.startswith("b179c952") and sha256.endswith("0db53")


def test_whisper_has_every_tensor_and_its_positions_are_the_sinusoids(fetched):
    tensors = load_file(fetched("whisper_base") / "model.safetensors")
    assert len(tensors) == 245 and sum(array.size for array in tensors.values()) == 72_593_920
    time = np.arange(1500)[:, None] * np.exp(-np.log(10_000) / 255 * np.arange(256))
    wanted = np.concatenate([np.sin(time), np.cos(time)], axis=1)
    # the file stores halves: 11 bits of a number below 1
    assert np.abs(tensors["model.encoder.embed_positions.weight"] - wanted).max() < 2**-11


def test_transformers_opens_whisper_and_it_understands_speech(fetched):
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    path, sound = fetched("whisper_base"), fetched("speech_en")
    model, report = transformers.WhisperForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()) and model.dtype == torch.float32
    processor = transformers.WhisperProcessor.from_pretrained(path)
    rows = {
        row["file"]: row["text"] for split in ("train", "validation", "test") for row in lines(sound / f"{split}.jsonl")
    }
    for name in ("agent-incorrect", "call-waiting", "conf-onlyperson"):
        with wave.open(str(sound / f"clips/{name}.wav")) as clip:
            samples = np.frombuffer(clip.readframes(clip.getnframes()), np.int16) / 32768
        twice = np.interp(np.arange(2 * len(samples)) / 2, np.arange(len(samples)), samples)  # 8 to 16 kHz
        features = processor(twice.astype(np.float32), sampling_rate=16_000, return_tensors="pt").input_features
        said = processor.batch_decode(
            model.generate(features, language="en", task="transcribe"), skip_special_tokens=True
        )
        assert said[0].split() == rows[f"clips/{name}.wav"].split()


def test_boolq_has_the_official_splits_and_majority(fetched, tmp_path):
    path = fetched("boolq")
    task = labelled.load(labelled.Config(path, text="question", second="passage"), tmp_path)
    assert len(task.train.texts) + len(task.validation.texts) == 9427 and len(task.test.texts) == 3270
    assert f"{task.test.labels.mean():.3f}" == "0.622" and task.classes == ("false", "true")
    assert not set(task.train.second) & set(task.validation.second)
    counts = cache.opened(path, SOURCES["boolq"])["counts"]
    assert counts["passages"] == 12_271 and f"{counts['passage_words'] / 1e6:.2f}" == "1.19"
    passages = documents.Config("jsonl", path=path / "passages")
    parts = [documents.documents(passages, split, tmp_path) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 12_271


@pytest.mark.parametrize("name", TESTS)
def test_an_evaluation_set_has_its_published_number_of_rows(name, fetched):
    rows = lines(fetched("language_tests") / f"{name}.jsonl")
    assert len(rows) == TESTS[name]
    if "choices" in rows[0] and "answer" in rows[0]:
        assert all(0 <= row["answer"] < len(row["choices"]) for row in rows)
        assert len({row["answer"] for row in rows}) == max(len(row["choices"]) for row in rows)
    if name == "disflqa":
        assert sum(row["start"] >= 0 for row in rows) == 600


def test_the_help_is_parallel_and_no_test_sentence_is_in_train(fetched):
    path = fetched("help_en_de")
    pairs = {split: parallel.load(path, split) for split in ("train", "validation", "test")}
    texts = {split: {part.sources[row] for row in range(len(part))} for split, part in pairs.items()}
    assert [len(part) for part in pairs.values()] == [24_903, 874, 984]
    assert not texts["train"] & (texts["validation"] | texts["test"]) and not texts["validation"] & texts["test"]
    counts = cache.opened(path, SOURCES["help_en_de"])["counts"]
    assert 35_000 < counts["distinct_pairs"] < 40_000
    assert 28_000 < counts["distinct_pairs_of_3_to_60_english_words"] < 30_000


def test_the_speech_is_24_minutes_of_telephone_sound(fetched):
    path = fetched("speech_en")
    rows = [row for split in ("train", "validation", "test") for row in lines(path / f"{split}.jsonl")]
    counts = cache.opened(path, SOURCES["speech_en"])["counts"]
    assert len(rows) == 553 and counts["left_out_without_speech"] == 15  # 568 clips: 5 tones, 10 silences
    assert f"{sum(row['seconds'] for row in rows) / 60:.2f}" == "24.27"
    assert (counts["words"], counts["distinct_words"]) == (3133, 715)
    assert all((path / row["file"]).is_file() and row["text"] for row in rows)


def test_the_emoji_are_pictures_of_both_styles_with_captions(fetched):
    path = fetched("emoji")
    rows = lines(path / "captions.jsonl")
    counts = cache.opened(path, SOURCES["emoji"])["counts"]
    assert (counts["concepts"], counts["concepts_with_cldr_names"]) == (1911, 1585)
    assert sum(row["style"] == "twitter" for row in rows) == sum(row["style"] == "google" for row in rows) == 3786
    (dog,) = (row for row in rows if row["code"] == "1F436" and row["style"] == "twitter")
    assert (dog["caption"], dog["names"]["de"]) == ("dog face", "Hundegesicht") and "pet" in dog["keywords"]["en"]
    assert [counts[name] for name in ("twitter", "google", "twitter_skins", "google_skins")] == [1911] * 2 + [1875] * 2
    train, test = (ImageFolder(path / "google", split, classes_from="train") for split in ("train", "test"))
    assert len(train.classes) == 10 and len(train) > 1400 and test[0][0].shape == (64, 64, 3)
    shares = [row["split"] for row in rows if not row["skin"]]
    assert all(0.07 < shares.count(split) / len(shares) < 0.13 for split in ("validation", "test"))


def test_movielens_is_the_whole_hundred_thousand(fetched):
    counts = cache.opened(fetched("movielens"), SOURCES["movielens"])["counts"]
    assert counts == {"interactions": 100_000, "items": 1682, "users": 943, "mean_rating": 3.5299}


def test_the_word_vectors_give_the_published_effect_sizes(fetched):
    path = fetched("weat")
    sets = json.loads((path / "word_sets.json").read_text())
    words = {word: row for row, word in enumerate((path / "words.txt").read_text().split())}
    vectors = load_file(path / "vectors.safetensors")["vectors"].astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def of(name):
        return vectors[[words[word] for word in sets[name] if word in words]]

    sizes = {}
    for test in json.loads((path / "tests.json").read_text()):
        first, second = (of(name) for name in test["attributes"])
        if min(map(len, (first, second, *map(of, test["targets"])))):
            one, other = ((of(name) @ first.T).mean(1) - (of(name) @ second.T).mean(1) for name in test["targets"])
            sizes[test["name"]] = (one.mean() - other.mean()) / np.concatenate([one, other]).std(ddof=1)
    known = {"flowers and insects": "1.54", "career and family": "1.89", "maths and arts": "0.97"}
    assert len(sets) == 31 and len(words) == 347
    assert {name: f"{sizes[name]:.2f}" for name in known} == known
    assert 1.6 < sizes["instruments and weapons"] < 1.7
