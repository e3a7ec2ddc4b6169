"""A tiny Whisper in CTranslate2's format becomes a checkpoint folder with every number in its place."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files import whisper_ctranslate2
from tests.hub.files.test_ctranslate2 import model, variable

WIDTH, HEADS, MELS, LAYERS, FF, VOCAB = 8, 2, 5, 2, 12, 30
SPECIAL = ["endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startofprev", "notimestamps"]
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float16)


def block(name, stacks, width=WIDTH):
    """Return {name: array} of one attention: its norm, the stacked projections and the output projection."""
    found = {f"{name}/layer_norm/gamma": draw(width), f"{name}/layer_norm/beta": draw(width)}
    for number, letters in enumerate((*stacks, "o")):
        found[f"{name}/linear_{number}/weight"] = draw(len(letters) * width, width)
        bias = [np.zeros(width, np.float16) if letter == "k" else draw(width) for letter in letters]
        found[f"{name}/linear_{number}/bias"] = np.concatenate(bias)
    return found


def whisper():
    """Return the variables of a small model, by their names."""
    found = {
        "decoder/activation": np.array(3, np.int8), "decoder/pre_norm": np.array(1, np.int8),
        "decoder/alibi": np.array(0, np.int8), "decoder/scale_embeddings": np.array(0, np.int8),
        "decoder/scale_alibi": np.array(0, np.int8), "decoder/alignment_layer": np.array(-1, np.int16),
        "decoder/embeddings/weight": draw(VOCAB, WIDTH),
        "encoder/conv1/weight": draw(WIDTH, MELS, 3), "encoder/conv1/bias": draw(WIDTH),
        "encoder/conv2/weight": draw(WIDTH, WIDTH, 3), "encoder/conv2/bias": draw(WIDTH),
    }  # fmt: skip
    for side, length in (("encoder", 20), ("decoder", 16)):
        found[f"{side}/num_heads"] = np.array(HEADS, np.int16)
        found[f"{side}/position_encodings/encodings"] = draw(length, WIDTH)
        found |= {f"{side}/layer_norm/gamma": draw(WIDTH), f"{side}/layer_norm/beta": draw(WIDTH)}
        for layer in range(LAYERS):
            name = f"{side}/layer_{layer}"
            found |= block(f"{name}/self_attention", ["qkv"])
            if side == "decoder":
                found |= block(f"{name}/attention", ["q", "kv"])
            found |= {f"{name}/ffn/layer_norm/gamma": draw(WIDTH), f"{name}/ffn/layer_norm/beta": draw(WIDTH)}
            found |= {f"{name}/ffn/linear_0/weight": draw(FF, WIDTH), f"{name}/ffn/linear_0/bias": draw(FF)}
            found |= {f"{name}/ffn/linear_1/weight": draw(WIDTH, FF), f"{name}/ffn/linear_1/bias": draw(WIDTH)}
    return found


def put(root, found, *, spec="WhisperSpec", tied=True, config=None, tokens=VOCAB):
    """Write two packages and return them with an empty folder."""
    aliases = [("decoder/projection/weight", "decoder/embeddings/weight")] if tied else []
    data = model(*(variable(*pair) for pair in found.items()), aliases=aliases, spec=spec)
    packages = {"one": root / "one", "two": root / "two"}
    for folder in (*packages.values(), root / "out"):
        folder.mkdir(parents=True)
    (packages["one"] / "model.bin.part1").write_bytes(data[:1000])
    (packages["two"] / "model.bin.part2").write_bytes(data[1000:])
    first = tokens - len(SPECIAL)
    added = [{"id": first + number, "content": f"<|{word}|>"} for number, word in enumerate(SPECIAL)]
    tokenizer = {"model": {"vocab": {f"t{n}": n for n in range(first)}}, "added_tokens": added}
    (packages["two"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    ids = {"alignment_heads": [[1, 0]], "lang_ids": [first + 2, first + 3], "suppress_ids": [1, 2]}
    (packages["two"] / "config.json").write_text(json.dumps(ids | {"suppress_ids_begin": [0]} | (config or {})))
    return packages, root / "out"


def test_every_number_is_in_its_place(tmp_path):
    found = whisper()
    packages, out = put(tmp_path, found)
    counts = whisper_ctranslate2.convert(packages, out)
    tensors = load_file(out / "model.safetensors")
    assert counts == {"tensors": len(tensors), "parameters": sum(array.size for array in tensors.values())}
    assert len(tensors) == 4 + 3 + 4 + LAYERS * (9 + 6 + 9 + 9 + 6)
    for side in ("encoder", "decoder"):
        theirs, ours = f"{side}/layer_1", f"model.{side}.layers.1"
        stacked = found[f"{theirs}/self_attention/linear_0/weight"].reshape(3, WIDTH, WIDTH)
        for letter, part in zip("qkv", stacked, strict=True):
            np.testing.assert_array_equal(tensors[f"{ours}.self_attn.{letter}_proj.weight"], part.astype(np.float32))
        np.testing.assert_array_equal(
            tensors[f"{ours}.self_attn.v_proj.bias"],
            found[f"{theirs}/self_attention/linear_0/bias"][2 * WIDTH :].astype(np.float32),
        )
        assert f"{ours}.self_attn.k_proj.bias" not in tensors
        np.testing.assert_array_equal(tensors[f"{ours}.fc2.bias"], found[f"{theirs}/ffn/linear_1/bias"])
        np.testing.assert_array_equal(
            tensors[f"{ours}.self_attn.out_proj.weight"], found[f"{theirs}/self_attention/linear_1/weight"]
        )
    theirs, ours = "decoder/layer_0/attention", "model.decoder.layers.0.encoder_attn"
    np.testing.assert_array_equal(tensors[f"{ours}.q_proj.weight"], found[f"{theirs}/linear_0/weight"])
    np.testing.assert_array_equal(tensors[f"{ours}.v_proj.weight"], found[f"{theirs}/linear_1/weight"][WIDTH:])
    np.testing.assert_array_equal(tensors[f"{ours}.out_proj.bias"], found[f"{theirs}/linear_2/bias"])
    np.testing.assert_array_equal(tensors[f"{ours}_layer_norm.weight"], found[f"{theirs}/layer_norm/gamma"])


def test_the_config_comes_from_the_tensors_and_the_tokens(tmp_path):
    packages, out = put(tmp_path, whisper())
    whisper_ctranslate2.convert(packages, out)
    config, generation, sound = (
        json.loads((out / f"{name}.json").read_text())
        for name in ("config", "generation_config", "preprocessor_config")
    )
    assert config["architectures"] == ["WhisperForConditionalGeneration"]
    names = ("d_model", "encoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "vocab_size", "num_mel_bins")
    assert [config[name] for name in names] == [WIDTH, LAYERS, HEADS, FF, VOCAB, MELS]
    assert (config["max_source_positions"], config["max_target_positions"]) == (20, 16)
    assert generation["lang_to_id"] == {"<|en|>": 24, "<|de|>": 25}
    assert generation["task_to_id"] == {"transcribe": 27, "translate": 26}
    assert generation["suppress_tokens"] == [1, 2] and generation["alignment_heads"] == [[1, 0]]
    ends = ("eos_token_id", "decoder_start_token_id", "pad_token_id")
    assert [config[name] for name in ends] == [generation[name] for name in ends] == [22, 23, 22]
    assert sound["feature_size"] == MELS and sound["nb_max_frames"] == 3000
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


def without(name):
    return {key: array for key, array in whisper().items() if key != name}


REFUSED = {
    "another model": ({"spec": "TransformerSpec"}, {}, "is a TransformerSpec, not a WhisperSpec"),
    "untied": ({"tied": False}, {}, "its output projection is not its embedding"),
    "activation": ({}, {"decoder/activation": np.array(0, np.int8)}, "has decoder/activation 0, Whisper 3"),
    "left over": ({}, {"encoder/gate": draw(3)}, "variables that Whisper does not: encoder/gate"),
    "int8": ({}, {"encoder/layer_norm/beta": np.zeros(WIDTH, np.int8)}, "encoder/layer_norm/beta is int8"),
    "heads": ({}, {"encoder/num_heads": np.array(3, np.int16)}, "width 8 does not divide by heads"),
    "no heads": ({}, {"encoder/num_heads": np.array(0, np.int16)}, "width 8 does not divide by heads"),
    "key bias": ({}, {"encoder/layer_0/self_attention/linear_0/bias": draw(24)}, "its keys have a bias"),
    "rows": ({}, {"encoder/layer_0/self_attention/linear_0/weight": draw(25, 8)}, "has 25 rows for 3 parts"),
    "shape": ({}, {"decoder/layer_1/ffn/linear_0/weight": draw(FF, WIDTH + 1)}, r"fc1\.weight has shape \[12, 9\]"),
    "length": ({}, {"encoder/layer_0/ffn/layer_norm/beta": draw(WIDTH - 1)}, r"norm\.bias has shape \[7\]"),
    "infinity": ({}, {"encoder/conv1/bias": np.full(WIDTH, np.inf, np.float16)}, "holds an infinity"),
    "tokenizer": ({"tokens": 31}, {}, "has 31 tokens, the embedding 30 rows"),
    "languages": ({"config": {"lang_ids": [1]}}, {}, "names other languages"),
    "ids": ({"config": {"suppress_ids": ["1"]}}, {}, "suppress_ids is .* not a list of token ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_any_other_model_is_refused_and_nothing_large_is_left(case, tmp_path):
    options, changes, message = REFUSED[case]
    packages, out = put(tmp_path, whisper() | changes, **options)
    with pytest.raises(CheckpointError, match=message):
        whisper_ctranslate2.convert(packages, out)
    assert not (out / "model.bin").exists()


@pytest.mark.parametrize(
    "name", ["encoder/num_heads", "decoder/layer_1/attention/linear_1/weight", "encoder/conv2/bias"]
)
def test_a_missing_variable_is_named(name, tmp_path):
    packages, out = put(tmp_path, without(name))
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        whisper_ctranslate2.convert(packages, out)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
@pytest.mark.parametrize("text", [None, "{", "[]", '{"model": 5}'])
def test_a_damaged_json_is_named(name, text, tmp_path):
    packages, out = put(tmp_path, whisper())
    path = packages["two"] / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=name if text != '{"model": 5}' or "tok" in name else "list of token ids"):
        whisper_ctranslate2.convert(packages, out)


def test_a_missing_part_is_found(tmp_path):
    packages, out = put(tmp_path, whisper())
    (packages["two"] / "model.bin.part2").unlink()
    with pytest.raises(CheckpointError, match=r"model\.bin is damaged"):
        whisper_ctranslate2.convert(packages, out)
