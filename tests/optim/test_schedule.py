import math

import jax
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError
from fm_jax.optim import schedule
from tests.close import close, small

PEAK, STEPS, WARMUP = 3e-3, 1000, 100

AFTER_WARMUP = {  # kind -> (options, rate at a step past warm-up, written out)
    "cosine": (
        {"final_ratio": 0.1},
        lambda t: PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min((t - WARMUP) / (STEPS - WARMUP), 1)))),
    ),
    "linear": ({"final_ratio": 0.2}, lambda t: PEAK * (1 - 0.8 * min((t - WARMUP) / (STEPS - WARMUP), 1))),
    "wsd": (
        {"final_ratio": 0.05, "decay_steps": 200},
        lambda t: PEAK * (1 - 0.95 * min(max(t - (STEPS - 200), 0) / 200, 1)),
    ),
    "rsqrt": ({}, lambda t: PEAK * math.sqrt(WARMUP / t)),
    "constant": ({}, lambda t: PEAK),
    "steps": ({"drop": 0.5, "drop_at": (300, 801)}, lambda t: PEAK * 0.5 ** sum(t >= drop for drop in (300, 801))),
}


@pytest.mark.parametrize("kind", AFTER_WARMUP)
def test_rate_rises_from_zero_to_the_peak_and_then_follows_its_formula(kind):
    options, expected = AFTER_WARMUP[kind]
    rate = schedule.make(schedule.Config(kind=kind, peak=PEAK, num_steps=STEPS, warmup_steps=WARMUP, **options))
    assert float(rate(0)) == 0
    close(rate(WARMUP // 2), PEAK / 2)
    close(rate(WARMUP), PEAK)
    for step in (WARMUP + 1, 555, 800, 801, 900, STEPS - 1, STEPS, STEPS + 123):
        close(rate(step), expected(step))


@pytest.mark.parametrize("kind", AFTER_WARMUP)
def test_a_traced_step_gives_the_same_finite_rate_that_never_exceeds_the_peak(kind):
    options, _ = AFTER_WARMUP[kind]
    rate = schedule.make(schedule.Config(kind=kind, peak=PEAK, num_steps=STEPS, warmup_steps=WARMUP, **options))
    steps = np.arange(0, STEPS + 50, 7)
    traced = np.asarray(jax.jit(jax.vmap(rate))(steps))
    close(traced, np.array([float(rate(int(step))) for step in steps]))
    assert np.isfinite(traced).all() and traced.max() <= PEAK * (1 + 1e-5)
    past = traced[steps >= WARMUP]
    small(np.diff(past).max() / PEAK, 1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_without_warmup_the_run_starts_at_the_peak_and_ends_at_the_final_ratio(kind):
    extra = {"decay_steps": 30} if kind == "wsd" else {}
    rate = schedule.make(schedule.Config(kind=kind, peak=2.0, num_steps=100, final_ratio=0.25, **extra))
    close(np.array([rate(0), rate(100)]), np.array([2.0, 0.5]))


def test_rsqrt_with_start_ratio_one_is_the_schedule_of_t5():
    rate = schedule.make(schedule.Config(kind="rsqrt", peak=0.01, num_steps=10**6, warmup_steps=10_000, start_ratio=1))
    for step in (0, 1, 9_999, 10_000, 40_000, 10**6):
        close(rate(step), 1 / math.sqrt(max(step, 10_000)))


def test_a_rate_dropped_at_equal_distances_counts_them_from_the_start_of_the_run():
    options = {"kind": "steps", "drop": 0.97, "drop_every": 24, "warmup_steps": 50}
    rate = schedule.make(schedule.Config(peak=0.256, num_steps=1000, **options))
    for step in (50, 71, 72, 95, 96, 500):
        close(rate(step), 0.256 * 0.97 ** (step // 24))


def test_start_ratio_is_where_the_rise_begins():
    rate = schedule.make(schedule.Config(peak=1.0, num_steps=100, warmup_steps=10, start_ratio=0.2))
    close(np.array([rate(0), rate(5), rate(10)]), np.array([0.2, 0.6, 1.0]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "cosin"}, "kind"),
        ({"peak": math.nan}, "peak"),
        ({"peak": math.inf}, "peak"),
        ({"peak": -1e-3}, "peak"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": math.nan}, "num_steps"),
        ({"num_steps": 10.5}, "num_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_steps": 1001}, "warmup_steps 1001 is more than num_steps 1000"),
        ({"warmup_steps": 1000}, "leaves no step for the cosine decay"),
        ({"final_ratio": math.nan}, "final_ratio"),
        ({"final_ratio": -0.1}, "final_ratio"),
        ({"final_ratio": 1.1}, "final_ratio"),
        ({"start_ratio": 2.0}, "start_ratio"),
        ({"decay_steps": 10}, "is for wsd only"),
        ({"kind": "wsd"}, "decay_steps"),
        ({"kind": "wsd", "warmup_steps": 900, "decay_steps": 101}, "not 101"),
        ({"kind": "rsqrt"}, "time scale"),
        ({"kind": "constant", "final_ratio": 0.1}, "not used by constant"),
        ({"kind": "steps"}, "drop_at or drop_every"),
        ({"kind": "steps", "drop_at": (3,), "drop_every": 3}, "not both"),
        ({"kind": "steps", "drop_at": (3,), "drop": 0.0}, "schedule.drop must"),
        ({"kind": "steps", "drop_at": (-3,)}, "drop_at"),
        ({"drop_every": 3}, "are for steps only"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=named):
        schedule.Config(**{"peak": 1e-3, "num_steps": 1000, **options})
