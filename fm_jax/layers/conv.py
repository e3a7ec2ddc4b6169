"""Convolutions whose kernels carry logical axis names."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError
from fm_jax.core.sharding import constrain
from fm_jax.layers.dense import Initializer
from fm_jax.ops.convolution import convolve
from fm_jax.ops.depthwise import depthwise
from fm_jax.ops.windows import Padding


def check_images(image: jax.Array, channels: int) -> None:
    """Raise ConfigError unless these are images [B, H, W, channels]."""
    if image.ndim != 4 or image.shape[-1] != channels:
        raise ConfigError(f"images must be [B, H, W, {channels}], not {list(image.shape)}; set in_channels")


def fan_out(gain: float = 2.0) -> Initializer:
    """Initialise from N(0, gain / (k² · out)): He et al. 2015 with the fan-out, as usual for residual networks."""
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
    bias_init: Initializer | None = None,
    dtype: Any = jnp.float32,
    name: str | None = None,
) -> "Conv":
    """Make a convolution [B, H, W, C] -> [B, H', W', features]; the kernel is [k, k, C, features].

    Args:
        features: output channels.
        size: kernel size k, or (height, width).
        axes: logical names of (input channels, output channels).
        stride: stride of both axes.
        padding: "SAME" (as in XLA and TensorFlow: uneven at stride 2), "VALID", pairs, or an int for torch's symmetric
            padding; None is torch's usual (k - 1) / 2.
        bias: whether to add a bias; a normalisation after it makes it redundant.
        init: kernel initialiser; by default He's.
        bias_init: initialiser of the bias; by default zeros.
        dtype: compute dtype.
        name: name of the module.
    """
    sides = (size, size) if isinstance(size, int) else size
    if padding is None:
        padding = [((side - 1) // 2,) * 2 for side in sides]
    elif isinstance(padding, int):
        padding = [(padding, padding)] * 2
    pads: Any = padding if isinstance(padding, str) else tuple(padding)
    inits = (init or fan_out(), bias_init or nn.initializers.zeros_init())
    return Conv(features, sides, axes, stride, pads, bias, *inits, dtype, name=name)


class Conv(nn.Module):
    """A convolution whose kernel is gathered along "embed" before use; create it with `conv`."""

    features: int
    size: tuple[int, int]
    axes: tuple[str | None, str | None]
    stride: int
    padding: Padding
    use_bias: bool
    kernel_init: Initializer
    bias_init: Initializer
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve: [B, H, W, C] -> [B, H', W', features]."""
        init = nn.with_logical_partitioning(self.kernel_init, (None, None, *self.axes))
        kernel = self.param("kernel", init, (*self.size, x.shape[-1], self.features), jnp.float32)
        # Gather the axis that fsdp splits (as for an embedding table). The batch is split over that mesh axis too, and
        # XLA's partitioner (jax 0.10.2, mesh data 2 · fsdp 2 · tensor 2) otherwise mixed up the rows of two devices.
        kept = [None if name == "embed" else name for name in self.axes]
        kernel = constrain(kernel.astype(self.dtype), None, None, *kept)
        out = convolve(x.astype(self.dtype), kernel, stride=self.stride, padding=self.padding)
        if self.use_bias:
            start = nn.with_logical_partitioning(self.bias_init, self.axes[1:])
            out = out + self.param("bias", start, (self.features,), jnp.float32).astype(self.dtype).reshape(1, 1, 1, -1)
        return out


class Depthwise(nn.Module):
    """Depthwise convolution: [B, H, W, C] -> [B, H', W', C]; the kernel is [k, k, 1, C]."""

    size: int
    stride: int = 1
    padding: Padding | None = None  # as in `conv`
    # The fan-out is k², not k² · C; Flax computes that number as the "fan_in" of this kernel shape.
    kernel_init: Initializer = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve each channel: [B, H, W, C] -> [B, H', W', C]."""
        size = self.size
        init = nn.with_logical_partitioning(self.kernel_init, (None, None, None, "mlp"))
        kernel = self.param("kernel", init, (size, size, 1, x.shape[-1]), jnp.float32)
        padding = [((size - 1) // 2,) * 2] * 2 if self.padding is None else self.padding
        return depthwise(x.astype(self.dtype), kernel.astype(self.dtype), stride=self.stride, padding=padding)
