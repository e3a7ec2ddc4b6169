"""Taps: read, overwrite, add to or differentiate at any named activation.

A model calls `visit(self, tap, "block.attn.z", x)` at each site. Without a tap this returns `x` itself, so the
traced program equals the untapped model's. With a tap, edits are arrays, not callbacks: one compilation serves a whole
sweep over layers, heads and positions, under jit, scan, remat, vmap and grad.

Inside a scanned stack every array of a `block.` or `cross.` site has the layer axis first: [L, ...]. In a model with
two stacks the plain names are the decoder's; the encoder's have the prefix `encoder.`. With an image and a text tower
the plain names are the text's; the image's have the prefix `image.`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

STACKED = ("block.", "cross.")
ENCODER = "encoder."  # prefix of the encoder's sites in a model with two stacks
IMAGE = "image."  # prefix of the image tower's sites in a model with two towers
STORED = "site:"  # prefix of a site's name in the collection "taps", because "embed" is also a submodule's name
SITES = (
    "embed",
    "block.resid_pre", "block.resid_mid", "block.resid_post",
    "block.attn.q", "block.attn.k", "block.attn.v", "block.attn.scores", "block.attn.pattern",
    "block.attn.z", "block.attn.out",
    "block.mlp.pre", "block.mlp.act", "block.mlp.out",
    "final",
)  # fmt: skip
CROSS = (
    "cross.q", "cross.k", "cross.v", "cross.scores", "cross.pattern", "cross.z", "cross.out",
)  # fmt: skip


def stages(count: int) -> tuple[str, ...]:
    """Return the sites of a convolutional network: the outputs of its stem and of each stage, and the last features."""
    return ("embed", *(f"conv.stage{stage}" for stage in range(1, count + 1)), "final")


class Tap(struct.PyTreeNode):
    """Reads and edits at named sites.

    Attributes:
        read: names of sites to return (in the Flax collection "taps").
        put: site -> (mask, value): the activation becomes `where(mask, value, x)`; both broadcast to it.
        add: site -> delta, added after `put`. Differentiate with respect to a delta of zeros to get the
            gradient at the site.
        prefix: prefix that was removed from this tap's names; returned activations get it back.
    """

    read: tuple[str, ...] = struct.field(pytree_node=False, default=())
    put: dict[str, tuple[jax.Array, jax.Array]] = struct.field(default_factory=dict)
    add: dict[str, jax.Array] = struct.field(default_factory=dict)
    prefix: str = struct.field(pytree_node=False, default="")

    def names(self) -> set[str]:
        """Return every site that this tap reads or edits."""
        return {*self.read, *self.put, *self.add}

    def stacked(self) -> "Tap":
        """Return the part of the tap inside the repeated block."""
        return self._where(lambda name: name.startswith(STACKED))

    def inside(self, prefix: str) -> "Tap":
        """Return the part of the tap whose names begin with `prefix`, with the prefix removed."""
        mine, cut = self._where(lambda name: name.startswith(prefix)), len(prefix)
        return Tap(
            read=tuple(name[cut:] for name in mine.read),
            put={name[cut:]: edit for name, edit in mine.put.items()},
            add={name[cut:]: delta for name, delta in mine.add.items()},
            prefix=self.prefix + prefix,
        )

    def _where(self, wanted: Callable[[str], bool]) -> "Tap":
        return Tap(
            read=tuple(name for name in self.read if wanted(name)),
            put={name: edit for name, edit in self.put.items() if wanted(name)},
            add={name: delta for name, delta in self.add.items() if wanted(name)},
            prefix=self.prefix,
        )


def is_stacked(site: str) -> bool:
    """Return whether a site's arrays have the layer axis first."""
    return site.removeprefix(ENCODER).removeprefix(IMAGE).startswith(STACKED)


def touches(tap: Tap | None, prefix: str) -> bool:
    """Return whether a tap reads or edits a site whose name begins with `prefix`."""
    return tap is not None and any(name.startswith(prefix) for name in tap.names())


def visit(module: nn.Module, tap: Tap | None, site: str, x: jax.Array) -> jax.Array:
    """Apply the tap to the activation `x` (any shape, kept) of `module` at a site."""
    if tap is None:
        return x
    if site in tap.put:
        mask, value = tap.put[site]
        x = jnp.where(mask, value.astype(x.dtype), x)
    if site in tap.add:
        x = x + tap.add[site].astype(x.dtype)
    if site in tap.read:
        kept = module.sow("taps", STORED + tap.prefix + site, x, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        if not kept:
            raise ValueError(f'cannot return {site}; apply with mutable=["taps"], as interpret.capture.apply does')
    return x
