"""BERT's pretraining model: a masked-language-model head and, optionally, a next-sentence head.

Devlin et al. 2019, section 3.1. Training computes logits at the masked positions only (`logits` of gathered states), so
it never holds [B, T, V].

Dims: B batch, T time, D d_model, E width of the embeddings, V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError
from fm_jax.layers.dense import dense, normal
from fm_jax.layers.mlp import ACTIVATIONS
from fm_jax.layers.norm import Norm
from fm_jax.layers.readout import Head
from fm_jax.layers.tap import Tap
from fm_jax.models.language.encoder import Config, Encoder


class MaskedLM(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]; parameters "backbone/…", "head/…" and, for pairs, "next/…"."""

    backbone: Encoder
    next_sentence: bool = False  # add BERT's pooler and next-sentence head

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the backbone's sites: the heads add none."""
        return self.backbone.sites

    def setup(self) -> None:
        """Declare the heads."""
        self.head = WordHead(self.backbone.cfg)
        if self.next_sentence:
            self.next = Head(2, hidden="tanh")

    def __call__(
        self,
        tokens: jax.Array,
        *,
        types: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        tap: Tap | None = None,
    ) -> jax.Array:
        """Return the logits [B, T, V] of every position in float32; arguments as of `Encoder.hidden`."""
        hidden = self.hidden(tokens, types=types, segments=segments, positions=positions, tap=tap)
        if self.next_sentence and self.is_initializing():
            self.pair(hidden)
        return self.logits(hidden)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        types: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        tap: Tap | None = None,
    ) -> jax.Array:
        """Return the encoder's hidden states [B, T, D]; arguments as of `Encoder.hidden`."""
        return self.backbone.hidden(tokens, types=types, segments=segments, positions=positions, tap=tap)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states [..., D] to logits [..., V] in float32, with the encoder's token table as head."""
        narrow, bias = self.head(hidden)
        return self.backbone.attend(narrow) + bias.reshape((1,) * (hidden.ndim - 1) + bias.shape)

    def pair(self, hidden: jax.Array) -> jax.Array:
        """Return next-sentence logits [B, 2] of hidden states [B, T, D]: class 0, B follows A; class 1, it does not.

        Raises:
            ConfigError: the model has no next-sentence head.
        """
        if not self.next_sentence:
            raise ConfigError("the model has no next-sentence head; create it with next_sentence=True")
        return self.next(hidden[:, 0])


class WordHead(nn.Module):
    """[..., D] -> ([..., E], bias [V]): dense, activation, norm; the token table maps the result to logits."""

    cfg: Config

    @nn.compact
    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the vectors [..., E] that the token table is multiplied with, and the tokens' biases [V]."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        width = cfg.embed_size or cfg.d_model
        x = dense(width, ("embed", None), bias=True, init=normal(cfg.init_std), dtype=dtype, name="dense")(hidden)
        x = Norm(cfg.norm, dtype, name="norm")(ACTIVATIONS[cfg.mlp.activation](x))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("vocab",))
        return x, self.param("bias", zeros, (cfg.vocab_size,), jnp.float32)
