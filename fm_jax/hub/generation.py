"""Token ids and settings with which a checkpoint's texts are generated: config.json and generation_config.json.

They are kept as the files state them, so that a folder that is read and written again generates the same texts. An id
that a file states as null is none, which differs from an id that it does not state: for that, transformers has defaults
of its own (LLaMA's are 1 and 2).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fm_jax.core import files
from fm_jax.core.errors import CheckpointError
from fm_jax.hub.fields import Fields

FILE = "generation_config.json"
_MOST = 1000  # end tokens
_IDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "sep_token_id", "mask_token_id", "unk_token_id",
)  # fmt: skip
# Settings that config.json held before there was a generation_config.json; transformers still reads them there.
_EARLIER = (
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty", "max_length",
    "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "remove_invalid_values", "repetition_penalty", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
)  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """What a checkpoint says about generating texts with it.

    Raises:
        CheckpointError: an id is not a whole number.
    """

    ids: Mapping[str, Any] = field(default_factory=dict)  # "eos_token_id" …, as config.json states them; null is none
    settings: Mapping[str, Any] | None = None  # content of generation_config.json; None if there is none

    def __post_init__(self) -> None:
        """Refuse ids that are none, and numbers that JSON does not have."""
        for where, stated in (("config.json", self.ids), (FILE, self.settings or {})):
            for name in _IDS[:4]:
                numbers = _numbers(stated.get(name))
                if len(numbers) > _MOST or not all(type(number) is int for number in numbers):
                    raise CheckpointError(
                        f"{where}: {name} {str(stated[name])[:60]!r} is neither a token id nor a list of them"
                    )
            try:
                json.dumps(dict(stated), allow_nan=False)
            except ValueError as error:
                raise CheckpointError(f"{where} holds what is no JSON: {error}") from None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a text; () if none is stated."""
        return self._stated("eos_token_id")

    @property
    def pad_id(self) -> int | None:
        """Return the padding token, or None."""
        return next(iter(self._stated("pad_token_id")), None)

    @property
    def start_id(self) -> int | None:
        """Return the token before every text, or None."""
        return next(iter(self._stated("bos_token_id")), None)

    @property
    def decoder_start_id(self) -> int | None:
        """Return the token before every output of an encoder-decoder, or None."""
        return next(iter(self._stated("decoder_start_token_id")), None)

    def describe(self) -> dict[str, Any]:
        """Return the JSON data from which `of_run` makes the same, for the meta of a run's checkpoints."""
        return {"ids": dict(self.ids), "settings": None if self.settings is None else dict(self.settings)}

    def _stated(self, name: str) -> tuple[int, ...]:
        """Return the ids of a name in generation_config.json, or else in config.json; old files write -1 for none."""
        settings = self.settings or {}
        value = settings[name] if name in settings else self.ids.get(name)
        return tuple(number for number in _numbers(value) if number >= 0)


def read(folder: Path, config: Fields, ignore: Iterable[str] = ()) -> Generation | None:
    """Return what a folder says about generation; None if it says nothing.

    Args:
        folder: the checkpoint's folder.
        config: its config.json.
        ignore: with "generation_config.json", that file is not read.

    Raises:
        CheckpointError: a damaged file, or an id that is not a whole number.
    """
    ids = {name: config.data[name] for name in _IDS if name in config.data}
    earlier = {name: config.data[name] for name in _EARLIER if config.has(name)}
    settings = {**ids, **earlier} if earlier else None
    if FILE not in ignore and files.there(folder / FILE, CheckpointError):
        settings = Fields.open(folder / FILE).data
    try:
        return Generation(ids, settings) if ids or settings else None
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}; correct it, or name {FILE} in ignore if it is there") from None


def of_run(meta: Mapping[str, Any]) -> Generation | None:
    """Return what a run's checkpoint keeps under "generation" of the model it started from; None if nothing."""
    return Generation(**meta["generation"]) if meta.get("generation") else None


def write(folder: Path, generation: Generation) -> None:
    """Write generation_config.json, if there are settings."""
    if generation.settings is not None:
        (folder / FILE).write_text(json.dumps(dict(generation.settings), indent=2, sort_keys=True) + "\n", "utf-8")


def _numbers(value: Any) -> list[Any]:
    """Return a list of ids, whether one, several or none (null) is stated."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
