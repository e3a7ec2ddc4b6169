"""Convolutions whose kernels carry logical axis names, in the form that each backend runs fastest."""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.layers.dense import Initializer
from fm_jax.ops.depthwise import depthwise

Padding = Literal["SAME", "VALID"] | Sequence[tuple[int, int]]


def fan_out(gain: float = 2.0) -> Initializer:
    """Draw from N(0, gain / (k² · out)): He et al. 2015 with the outgoing fan, as residual networks are drawn."""
    return nn.initializers.variance_scaling(gain, "fan_out", "normal")


def conv(
    features: int,
    size: int | tuple[int, int],
    axes: tuple[str | None, str | None],
    *,
    stride: int = 1,
    padding: Padding | int | None = None,
    bias: bool = False,
    init: Initializer | None = None,
    dtype: Any = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """Make a convolution [B, H, W, C] -> [B, H', W', features]; the kernel is [k, k, C, features].

    Args:
        features: channels out.
        size: k, or (height, width).
        axes: logical names of (channels in, channels out).
        stride: of both axes.
        padding: "SAME" (XLA's and TensorFlow's: uneven where the stride is 2), "VALID", pairs, or an int for torch's
            symmetric padding; None is torch's usual (k - 1) / 2.
        bias: whether a bias is added; a normalisation that follows makes it useless.
        init: of the kernel; He's by default.
        dtype: of the computation.
        name: of the module.
    """
    sides = (size, size) if isinstance(size, int) else size
    if padding is None:
        padding = [((side - 1) // 2,) * 2 for side in sides]
    elif isinstance(padding, int):
        padding = [(padding, padding)] * 2
    return nn.Conv(
        features,
        sides,
        strides=(stride, stride),
        padding=padding,
        use_bias=bias,
        kernel_init=nn.with_logical_partitioning(init or fan_out(), (None, None, *axes)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
        dtype=dtype,
        param_dtype=jnp.float32,
        name=name,
    )


class Depthwise(nn.Module):
    """Convolve each channel by itself: [B, H, W, C] -> [B, H', W', C]; the kernel is [k, k, 1, C]."""

    size: int
    stride: int = 1
    padding: Padding | None = None  # as in `conv`
    kernel_init: Initializer = fan_out()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the filtered channels."""
        size = self.size
        init = nn.with_logical_partitioning(self.kernel_init, (None, None, None, "mlp"))
        kernel = self.param("kernel", init, (size, size, 1, x.shape[-1]), jnp.float32)
        padding = [((size - 1) // 2,) * 2] * 2 if self.padding is None else self.padding
        return depthwise(x.astype(self.dtype), kernel.astype(self.dtype), stride=self.stride, padding=padding)
