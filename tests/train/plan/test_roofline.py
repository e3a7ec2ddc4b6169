"""The arithmetic of a plan: FLOPs of a traced step, and times at stated rates."""

import jax
import jax.numpy as jnp

from fm_jax.train import chips
from fm_jax.train.plan import flops, roofline


def test_products_count_two_for_each_multiply_add_and_loops_each_trip() -> None:
    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, w: (jax.checkpoint(lambda x: x @ w)(x), None), x, w)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x.T, lambda x: jnp.zeros((4, 4)), x)

    counted = flops.count(jax.make_jaxpr(step)(jnp.zeros((4, 8)), jnp.zeros((5, 8, 8))))
    assert dict(counted) == {"float32": 5 * 2 * 4 * 8 * 8 + 2 * 4 * 8 * 4}


def test_a_convolutions_gradients_count_as_much_as_itself() -> None:
    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), [(0, 0), (0, 0)], dimension_numbers=numbers)

    x, kernel = jnp.zeros((2, 8, 8, 3), jnp.bfloat16), jnp.zeros((2, 2, 3, 5), jnp.bfloat16)
    once = 2 * (2 * 4 * 4 * 5) * (2 * 2 * 3)
    assert dict(flops.count(jax.make_jaxpr(forward)(x, kernel))) == {"bfloat16": once}
    gradients = jax.make_jaxpr(jax.grad(lambda x, kernel: forward(x, kernel).sum(), (0, 1)))(x, kernel)
    assert once <= flops.count(gradients).total() <= 12 * once


def test_times_are_amounts_over_rates() -> None:
    chip = chips.Chip("toy", bfloat16=100.0, memory=1.0, bandwidth=10.0, link=5.0)
    sent = roofline.Traffic("all-gather", ("fsdp",), 3, 80, 60.0, 4)
    given = {"link": {4: 5.0}, "tensor_float": False}
    times = roofline.times(chip, {"bfloat16": 300.0, "float32": 100.0}, 50.0, [sent], **given)
    assert (times.compute, times.memory, times.collectives) == (4.0, 5.0, 12.0)
    assert (times.least, times.most) == (12.0, 17.0)
    times = roofline.times(chip, {"bfloat16": 300.0, "float32": 100.0}, 50.0, [], link={}, tensor_float=True)
    assert times.compute == 5.0  # float32 at half the rate


def test_chips_that_can_be_planned_state_all_rates() -> None:
    for name in ("v5e", "v5p", "v6e", "h100", "h200"):
        chip = chips.CHIPS[name]
        assert min(chip.bfloat16, chip.memory, chip.bandwidth, chip.link) > 0
    assert chips.of_kind("TPU v5 lite") is chips.CHIPS["v5e"]
    assert chips.of_kind("NVIDIA H200") is chips.CHIPS["h200"]
    assert chips.of_kind("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
