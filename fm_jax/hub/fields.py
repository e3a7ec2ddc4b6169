"""Read a config.json field by field, so that nothing in it is silently ignored.

A family's file takes the fields that its config holds and states the values that it requires of the others. A field
that is left at the end, and is not known to have no effect on what the model computes, is an error that names it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fm_jax.core.errors import CheckpointError
from fm_jax.hub.files.safetensors import once

T = TypeVar("T")
_NEEDED: Any = object()
_LAYERS = 10_000

# Fields that change neither a logit nor a gradient: names and versions, generation settings, the initialisation of
# new weights, and what the tokenizer's files repeat.
_HARMLESS = frozenset(
    """
    _attn_implementation _commit_hash _name_or_path architectures auto_map chunk_size_feed_forward dtype
    finetuning_task gradient_checkpointing id2label initializer_factor initializer_range is_composition label2id
    language license model_type name_or_path num_labels output_attentions output_hidden_states output_past
    problem_type return_dict return_dict_in_generate task_specific_params tokenizer_class torch_dtype torchscript
    transformers_version use_cache use_return_dict vocab_file vocabulary_size_note

    bos_token_id decoder_start_token_id eos_token_id forced_bos_token_id forced_eos_token_id mask_token_id pad_token_id
    prefix sep_token_id unk_token_id

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    suppress_tokens temperature top_k top_p typical_p
    """.split()
)  # fmt: skip

# Switches that change the computation if they are on; a family that supports one reads it.
_OFF = {
    "add_cross_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tf_legacy_loss": False,
    "use_bfloat16": False,
}


class Fields:
    """The fields of one config.json, and which of them have been read."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        """Start with every field unread; `where` names the file in messages."""
        self.data, self.where = dict(data), where
        self._read: set[str] = set()
        self._refused: list[str] = []

    @classmethod
    def open(cls, file: Path) -> "Fields":
        """Read a config.json.

        Raises:
            CheckpointError: there is none, it is not a JSON object, or it has a field twice.
        """
        try:
            data = json.loads(file.read_text("utf-8"), object_pairs_hook=once)
        except FileNotFoundError:
            raise CheckpointError(f"there is no {file}; a model folder holds config.json beside its weights") from None
        except (ValueError, OSError, RecursionError) as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise CheckpointError(f"{file} holds a {type(data).__name__}, not a JSON object")
        return cls(data, str(file))

    @property
    def kind(self) -> str:
        """Return `model_type`, or "" if there is none."""
        return str(self.data.get("model_type", ""))

    @property
    def architecture(self) -> str:
        """Return the first of `architectures`, the class that the weights were saved from, or ""."""
        names = self.data.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    def has(self, name: str) -> bool:
        """Say whether a field is present and not null."""
        return self.data.get(name) is not None

    def take(self, name: str, kind: type[T], default: T = _NEEDED) -> T:
        """Return a field's value; null counts as absent, and an integer is accepted as a float.

        Raises:
            CheckpointError: absent without a default, or of another type.
        """
        self._read.add(name)
        value = self.data.get(name)
        if value is None:
            if default is _NEEDED:
                raise CheckpointError(f"{self.where}: {name} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise CheckpointError(f"{self.where}: {name} is {str(value)[:60]!r}, not {kind.__name__}")
        # tables are built layer by layer: a config must not ask for a billion layers before the weights are read
        if isinstance(value, int) and not -1 <= value < (_LAYERS if "layer" in name else 1 << 31):
            raise CheckpointError(f"{self.where}: {name} is {value}, which is out of range")
        return value

    def choose(self, name: str, choices: Mapping[str, T], default: str | None = None) -> T:
        """Return our word for theirs, such as an activation's.

        Raises:
            CheckpointError: absent without a default, or a word that is not supported.
        """
        word = self.take(name, str) if default is None else self.take(name, str, default)
        if word not in choices:
            known = ", ".join(choices)
            raise CheckpointError(f"{self.where}: {name} {word!r} is not supported; supported are {known}")
        return choices[word]

    def expect(self, name: str, *values: Any) -> None:
        """Read a field that, if present, must have one of these values (null counts as absent)."""
        self._read.add(name)
        value = self.data.get(name)
        if value is not None and not any(value == known and type(value) is type(known) for known in values):
            words = " or ".join(json.dumps(known) for known in values)
            self._refused.append(f"{name} is {json.dumps(value)[:60]}, but only {words} is supported")

    def refuse(self, problem: str) -> None:
        """Record something unsupported; `close` raises it with the other problems."""
        self._refused.append(problem)

    def skip(self, *names: str) -> None:
        """Mark fields as read that this family does not need."""
        self._read.update(names)

    def close(self, ignore: Iterable[str] = ()) -> None:
        """Raise one error for everything unsupported and for every field that was not read.

        Args:
            ignore: further fields that the caller knows to have no effect.
        """
        for name, off in _OFF.items():
            if name not in self._read:
                self.expect(name, off)
        known = self._read | _HARMLESS | set(ignore)
        unknown = sorted(name for name, value in self.data.items() if name not in known and value is not None)
        problems = self._refused + [
            f"{name} ({json.dumps(self.data[name])[:40]}) is unknown; ignore it only if it changes no result"
            for name in unknown
        ]
        if problems:
            raise CheckpointError(f"{self.where} is not supported: {'; '.join(problems)}")
