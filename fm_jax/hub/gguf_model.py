"""Open a GGUF file as a model folder is opened: a config.json, tensors under its names, and a tokenizer.

llama.cpp's converter renames the tensors and changes some values. Those are changed back here: LLaMA's q and k rows,
which it reorders for its form of the rotary positions, Gemma's norms, to which it adds one, and GPT-2's matrices,
which it transposes. Everything that the file says of the architecture is read or refused, as for a config.json.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.data.text.tokenizer import Tokenizer
from fm_jax.hub import gguf_tokenizer
from fm_jax.hub.fields import Fields
from fm_jax.hub.files import gguf, stored
from fm_jax.hub.files.weights import Index, Spec, Weights
from fm_jax.ops.positions import Rope, rope_frequencies

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    **{f"attn_{head}": f"model.layers.{{}}.self_attn.{head}_proj" for head in "qkv"},
    **{f"attn_{head}_norm": f"model.layers.{{}}.self_attn.{head}_norm" for head in "qk"},
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    **{f"ffn_{part}": f"model.layers.{{}}.mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_norm": "transformer.h.{}.ln_2",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}
_NAMES = {"llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gemma": _LLAMA, "gpt2": _GPT2}
"""Architecture -> {name of a tensor, without "blk.N." and ".weight": name in transformers}. Mistral's is "llama"."""

_FLIPPED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")  # of GPT-2, whose Conv1D stores [in, out]
_ROPE_TENSOR = "rope_freqs.weight"
_UNUSED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
_STEMS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}


@dataclass(frozen=True)
class Opened:
    """What a model folder holds."""

    config: Fields
    weights: Weights
    tokenizer: Tokenizer | None  # None if the file has none


def open_file(path: Path, ignore: Iterable[str] = (), *, tokenizer: bool = True) -> Opened:
    """Read the metadata of a GGUF file; its tensors are read later.

    Args:
        path: the file.
        ignore: keys of the metadata that do not change the computation, such as "llama.NAME".
        tokenizer: read the tokenizer too.

    Raises:
        CheckpointError: the file is malformed, or holds a part of a model, another architecture or another option than
            the families of this folder compute.
        DataError: its tokenizer is of a kind that is not known.
    """
    file = gguf.open_file(stored.sound(path))
    kind = _kind(_fields(file, "general.", "split."))
    fields = _fields(file, f"{kind}.")
    try:
        config = _gpt2(fields, file) if kind == "gpt2" else _llama(fields, file, kind)
    except ConfigError as error:
        raise CheckpointError(f"{file.where}: {error}") from None
    fields.close(ignore)
    config |= gguf_tokenizer.special_ids(file.metadata)
    weights = Translated(file, _tensors(file, kind, config))
    reads = gguf_tokenizer.read(file.metadata, file.where, kind) if tokenizer else None
    return Opened(Fields(config, file.where), weights, reads)


def _fields(file: gguf.GGUFFile, *prefixes: str) -> Fields:
    """Return the metadata whose keys begin so, with the values that JSON would have."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.tolist()
        return [plain(part) for part in value] if isinstance(value, list) else value

    return Fields({key: plain(value) for key, value in file.metadata.items() if key.startswith(prefixes)}, file.where)


def _kind(general: Fields) -> str:
    """Return the architecture, or refuse a file that is not a whole model of a known one."""
    if (holds := general.take("general.type", str, "model")) != "model":
        raise CheckpointError(f"{general.where} holds a {holds[:40]!r}, not a model; give the model's own file")
    if (parts := general.take("split.count", int, 1)) > 1:
        raise CheckpointError(f"{general.where} is one of {parts} parts; join them with llama-gguf-split --merge")
    if (kind := general.take("general.architecture", str)) not in _NAMES:
        known = ", ".join(_NAMES)
        raise CheckpointError(f"{general.where}: architecture {kind[:40]!r} is not supported; supported are {known}")
    return kind


def _llama(fields: Fields, file: gguf.GGUFFile, kind: str) -> dict[str, Any]:
    """Return the config.json of a decoder with rotary positions."""
    width, count = fields.take(f"{kind}.embedding_length", int), _same(fields, f"{kind}.attention.head_count")
    window = fields.take("llama.attention.sliding_window", int, 0) if kind == "llama" else 0
    model_type = "mistral" if window else kind
    rotated = fields.take(f"{kind}.rope.dimension_count", int, width // max(count, 1))
    head_dim = fields.take(f"{kind}.attention.key_length", int, rotated)
    # values of another width, or a rotation of a part of the head, is not supported
    fields.expect(f"{kind}.attention.value_length", head_dim)
    fields.expect(f"{kind}.rope.dimension_count", head_dim)
    fields.expect(f"{kind}.expert_count", 0)
    fields.expect(f"{kind}.attention.causal", True)
    fields.expect(f"{kind}.pooling_type", 0)
    fields.expect("llama.tensor_data_layout", "Meta AI original pth")
    fields.skip(f"{kind}.expert_used_count")
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [f"{_STEMS[model_type]}ForCausalLM"],
        "vocab_size": _vocabulary(fields, file, kind),
        "max_position_embeddings": fields.take(f"{kind}.context_length", int),
        "num_hidden_layers": fields.take(f"{kind}.block_count", int),
        "hidden_size": width,
        "intermediate_size": _same(fields, f"{kind}.feed_forward_length"),
        "num_attention_heads": count,
        "num_key_value_heads": _same(fields, f"{kind}.attention.head_count_kv", count),
        "head_dim": head_dim,
        "rms_norm_eps": fields.take(f"{kind}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope(fields, file, kind, head_dim),
        "tie_word_embeddings": "output.weight" not in file.specs,
    }
    if model_type == "mistral":
        config["sliding_window"] = window
    biased = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return config | {name: True for name, tensor in biased.items() if tensor in file.specs}


def _gpt2(fields: Fields, file: gguf.GGUFFile) -> dict[str, Any]:
    """Return the config.json of a GPT-2."""
    count = fields.take("gpt2.attention.head_count", int)
    fields.expect("gpt2.attention.head_count_kv", count)
    # earlier converters wrote the tied head as a copy; the table of names compares it with the embedding
    copied = "output.weight" in file.specs and file.kind("output.weight") == file.kind("token_embd.weight")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": _vocabulary(fields, file, "gpt2"),
        "n_positions": fields.take("gpt2.context_length", int),
        "n_layer": fields.take("gpt2.block_count", int),
        "n_embd": fields.take("gpt2.embedding_length", int),
        "n_head": count,
        "n_inner": fields.take("gpt2.feed_forward_length", int),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": fields.take("gpt2.attention.layer_norm_epsilon", float),
        "tie_word_embeddings": copied or "output.weight" not in file.specs,
    }


def _same(fields: Fields, key: str, default: int | None = None) -> int:
    """Read a number that the file may give for every layer apart; refuse it if the layers differ."""
    value = fields.data.get(key)
    if isinstance(value, list) and value and all(number == value[0] for number in value):
        fields.data[key] = value[0]
    elif isinstance(value, list):
        raise CheckpointError(
            f"{fields.where}: {key} is {str(value)[:40]}; only one number for all layers is supported"
        )
    return fields.take(key, int) if default is None else fields.take(key, int, default)


def _vocabulary(fields: Fields, file: gguf.GGUFFile, kind: str) -> int:
    """Return the number of rows of the embedding, which the metadata need not repeat."""
    spec = file.specs.get("token_embd.weight")
    if spec is None or len(spec.shape) != 2:
        raise CheckpointError(f"{file.where} has no matrix token_embd.weight; it is not a whole model")
    return fields.take(f"{kind}.vocab_size", int, spec.shape[0])


def _rope(fields: Fields, file: gguf.GGUFFile, kind: str, head_dim: int) -> dict[str, Any]:
    """Return rope_parameters, from the metadata or from the tensor of LLaMA 3.1."""
    prefix = f"{kind}.rope.scaling"
    base = fields.take(f"{kind}.rope.freq_base", float, 10_000.0)
    linear = fields.take(f"{kind}.rope.scale_linear", float, 1.0)  # its name in the oldest files
    word = fields.take(f"{prefix}.type", str, "linear" if linear != 1 else "none")
    factor = fields.take(f"{prefix}.factor", float, linear)
    original = fields.take(f"{prefix}.original_context_length", int, 0)
    fields.skip(f"{prefix}.finetuned")
    fields.expect(f"{prefix}.yarn_ext_factor", 1.0, -1.0)  # −1: the default of the kind, which is 1
    fields.expect(f"{prefix}.attn_factor", 1.0)
    fields.expect(f"{prefix}.yarn_attn_factor", 1.0)
    slow, fast = (fields.take(f"{prefix}.yarn_beta_{end}", float, 0.0) for end in ("slow", "fast"))
    if _ROPE_TENSOR in file.specs:
        if word != "none":
            raise CheckpointError(f"{file.where} has both {prefix}.type {word!r} and a tensor {_ROPE_TENSOR}")
        return _llama3(file, base, head_dim)
    if word == "none":
        return {"rope_type": "default", "rope_theta": base}
    if word not in ("linear", "yarn"):
        raise CheckpointError(f"{file.where}: {prefix}.type {word!r} is not supported, only none, linear, yarn")
    theirs: dict[str, Any] = {"rope_type": word, "rope_theta": base, "factor": factor}
    if word == "linear":
        return theirs
    lengths = {"original_max_position_embeddings": original} if original else {}
    return theirs | lengths | {"beta_slow": slow or 1.0, "beta_fast": fast or 32.0}


def _llama3(file: gguf.GGUFFile, base: float, head_dim: int) -> dict[str, Any]:
    """Return the rope scaling whose divisors of the frequencies [K/2] a tensor holds; the metadata do not name it.

    All of LLaMA 3.1 to 3.3 were extended from 8192 positions with low_freq_factor 1 and high_freq_factor 4, by the
    factor of the slowest frequency, so that scaling is computed and compared with the tensor.

    Raises:
        CheckpointError: it is another scaling.
    """
    spec = file.specs[_ROPE_TENSOR]
    divisors = file.read(_ROPE_TENSOR, tuple(slice(0, size) for size in spec.shape)).astype(np.float64)
    plain, _ = rope_frequencies(Rope(base), head_dim)
    if divisors.shape == plain.shape and (divisors == 1).all():
        return {"rope_type": "default", "rope_theta": base}
    rope = Rope(base, "llama3", max(1.0, float(divisors.max())), 8192, 1.0, 4.0)
    scaled, _ = rope_frequencies(rope, head_dim)
    if divisors.shape != plain.shape or not np.abs(divisors / (plain / scaled) - 1).max() < 1e-5:
        raise CheckpointError(
            f"{file.where} scales its rotary frequencies by a tensor, {_ROPE_TENSOR}, that is not LLaMA 3.1's; "
            "use the model's folder with its config.json, which names the scaling"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_length,
        "low_freq_factor": rope.low_frequency,
        "high_freq_factor": rope.high_frequency,
    }


class _Tensor(NamedTuple):
    """A tensor of the file, and how its values differ from those under the name in transformers."""

    name: str
    flipped: bool = False  # its two axes are exchanged
    head: int = 0  # rows of a head whose rotary pairs are neighbours; 0: none
    added: float = 0.0  # what was added to every value


def _tensors(file: gguf.GGUFFile, kind: str, config: Mapping[str, Any]) -> dict[str, _Tensor]:
    """Return {name in transformers: tensor}; a tensor of another name keeps it, and the family's table refuses it."""
    tensors: dict[str, _Tensor] = {}
    for name in file.specs:
        if kind != "gpt2" and _UNUSED.fullmatch(name):
            continue
        parts = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        layer, short, ending = parts.groups() if parts else ("", "", "")
        known = _NAMES[kind].get(short, "")
        theirs = f"{known}.{ending}".replace("{}", layer or "{}")
        if not known or ("{}" in known) != bool(layer):
            theirs, short = name, ""
        if theirs in tensors:
            raise CheckpointError(f"{file.where}: {tensors[theirs].name} and {name} are both {theirs}")
        head = config["head_dim"] if kind == "llama" and short in ("attn_q", "attn_k") else 0
        shape = file.specs[name].shape
        if head and (head < 2 or head % 2 or len(shape) not in (1, 2) or shape[0] % head):
            raise CheckpointError(f"{file.where}: {name} has shape {list(shape)}, not rows of heads of {head} numbers")
        tensors[theirs] = _Tensor(
            name,
            flipped=kind == "gpt2" and short in _FLIPPED and ending == "weight",
            head=head,
            added=1.0 if kind == "gemma" and short.endswith("norm") else 0.0,
        )
    return tensors


class Translated:
    """The tensors of a GGUF file as transformers stores them; implements `weights.Weights`."""

    def __init__(self, file: gguf.GGUFFile, tensors: Mapping[str, _Tensor]) -> None:
        """Rename and change back the tensors of a file."""
        self._file, self._tensors, self.where = file, tensors, file.where
        self.specs: dict[str, Spec] = {}
        for name, tensor in tensors.items():
            dtype, shape = file.specs[tensor.name]
            self.specs[name] = Spec("float32" if tensor.added else dtype, shape[::-1] if tensor.flipped else shape)

    def read(self, name: str, index: Index, out: np.ndarray | None = None) -> np.ndarray:
        """Return a part of a tensor, one slice an axis."""
        tensor = self._tensors[name]
        if tensor == _Tensor(tensor.name):
            return self._file.read(tensor.name, index, out)
        if tensor.flipped:
            part = self._file.read(tensor.name, index[::-1]).T
        elif tensor.head:
            part = self._halves(tensor, index)
        else:
            part = self._file.read(tensor.name, index).astype(np.float32) - np.float32(tensor.added)
        if out is None:
            return part
        out[...] = part
        return out

    def _halves(self, tensor: _Tensor, index: Index) -> np.ndarray:
        """Read rows of q or k, in each head from the order 0, K/2, 1, K/2 + 1, … back to 0, 1, …, K - 1.

        Whole heads are read, for the two halves of a head are mixed in the file.
        """
        start, stop, _ = index[0].indices(self._file.specs[tensor.name].shape[0])
        size = tensor.head
        first, last = start // size * size, -(-stop // size) * size
        rows = self._file.read(tensor.name, (slice(first, last), *index[1:]))
        heads = (last - first) // size
        rows = rows.reshape(heads, size // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        return rows[start - first : stop - first]
