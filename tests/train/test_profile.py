from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fm_jax.train.profile import Trace, decoder_flops_per_token, multiplied_params, peak_flops, total_peak_flops


def test_palms_own_figure_comes_out() -> None:
    """Section 4.1: 540B on 6144 TPU v4 at 238.3K tokens a second is 46.2 % (118 layers, 48 heads of 256, T 2048)."""
    flops = decoder_flops_per_token(540_350_000_000, 118, 48 * 256, 2048)
    peak = peak_flops("TPU v4")
    assert peak is not None
    assert round(238_300 * flops / (6144 * peak), 3) == 0.462


def test_flops_are_those_that_the_compiler_counts() -> None:
    """The rule against XLA's own count for a decoder of matrix products alone, forward and backward."""
    layers, width, hidden, time, vocab = 3, 64, 256, 32, 128
    key = jax.random.key(0)
    params = {
        "blocks": {name: jax.random.normal(key, (layers, width, width)) for name in "qkvo"}
        | {
            "up": jax.random.normal(key, (layers, width, hidden)),
            "down": jax.random.normal(key, (layers, hidden, width)),
        },
        "head": {"kernel": jax.random.normal(key, (width, vocab))},
        "embed": {"tokens": jax.random.normal(key, (vocab, width))},
    }

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for i in range(layers):
            q, k, v, o, up, down = (params["blocks"][name][i] for name in ("q", "k", "v", "o", "up", "down"))
            x = ((x @ q) @ (x @ k).T) @ (x @ v) @ o
            x = x @ up @ down
        return jnp.sum(jnp.square(x @ params["head"]["kernel"]))

    x = jnp.ones((time, width))
    cost = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile().cost_analysis()
    rule = time * decoder_flops_per_token(multiplied_params(params), layers, width, time)
    assert 0.98 < cost["flops"] / rule < 1.02


def test_causal_halves_attention_only() -> None:
    whole, halved = (decoder_flops_per_token(1000, 2, 8, 16, causal=causal) for causal in (False, True))
    assert whole - halved == 12 * 2 * 8 * 16 / 2


def test_a_table_that_is_also_the_head_counts_once() -> None:
    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    embed = {"tokens": shape(10, 4), "positions": shape(7, 4)}
    blocks = {"up": {"kernel": shape(2, 4, 8)}}
    assert multiplied_params({"embed": embed, "blocks": blocks}) == 64 + 40
    assert multiplied_params({"embed": embed, "blocks": blocks, "head": {"kernel": shape(4, 10)}}) == 64 + 40


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        # another device than the one whose name it holds
        ("NVIDIA L40S", None),
        ("TPU v4 lite", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100X", None),
        ("Tesla V100-SXM2-16GB", None),  # no bfloat16
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks(kind: str, teraflops: float | None) -> None:
    assert peak_flops(kind) == (None if teraflops is None else teraflops * 1e12)


def test_peaks_of_other_types() -> None:
    assert peak_flops("Tesla V100-SXM2-16GB", "float16") == 125e12
    assert peak_flops("Tesla V100-PCIE-16GB", "float16") == 112e12
    assert peak_flops("NVIDIA H200", "float16") == 989e12
    assert peak_flops("NVIDIA H200", "float32") is None


def test_the_total_is_known_only_if_every_part_is() -> None:
    devices: list[Any] = [SimpleNamespace(device_kind="NVIDIA H200")] * 3
    assert total_peak_flops(devices) == 3 * 989e12
    assert total_peak_flops([*devices, SimpleNamespace(device_kind="cpu")]) is None
    assert total_peak_flops(jax.devices()) is None
    assert total_peak_flops([]) is None


@pytest.fixture
def calls(monkeypatch: Any) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    return seen


@pytest.mark.parametrize(
    ("first", "steps", "expected"),
    [
        (2, range(0, 9), ["0", "1", "start", "2", "3", "4", "stop", "5", "6", "7", "8"]),
        (2, range(0, 4), ["0", "1", "start", "2", "3", "stop"]),  # the run ends first
        (2, range(5, 7), ["5", "6"]),  # resumed later
        (0, range(0, 3), ["0", "1", "2"]),  # not asked for
    ],
)
def test_traces_the_steps_asked_for(
    tmp_path: Path, calls: list[str], first: int, steps: range, expected: list[str]
) -> None:
    with Trace(first, 3, tmp_path) as trace:
        for step in steps:
            trace.before(step)
            calls.append(str(step))
    assert calls == expected


def test_an_error_ends_the_trace(tmp_path: Path, calls: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), Trace(1, 3, tmp_path) as trace:
        trace.before(1)
        raise ZeroDivisionError
    assert calls == ["start", "stop"]


def test_a_real_trace_is_written(tmp_path: Path) -> None:
    with Trace(1, 1, tmp_path / "t") as trace:
        trace.before(1)
        x = jnp.ones(3) + 1
        trace.before(2, wait_for=x)
    assert list((tmp_path / "t").rglob("*.xplane.pb"))
