"""Learning-rate schedules."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from fm_jax.core.errors import ConfigError

Kind = Literal["cosine", "linear", "rsqrt", "wsd", "constant", "steps"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Linear warm-up from `start_ratio * peak` to `peak`, then a decay by `kind`."""

    kind: Kind = "cosine"
    peak: float  # the highest rate, reached at step `warmup_steps`
    num_steps: int  # steps of the whole run, including warm-up; afterwards the last value is kept
    warmup_steps: int = 0
    start_ratio: float = 0.0  # rate at step 0 as a share of the peak; 1.0 with kind rsqrt is exactly T5's schedule
    final_ratio: float = 0.0  # rate at step `num_steps` as a share of the peak (cosine, linear, wsd)
    decay_steps: int = 0  # wsd: length of the final decay
    drop: float = 0.1  # steps: factor of the rate at each of `drop_at`, or every `drop_every` steps
    drop_at: tuple[int, ...] = ()  # steps: counted from the start of the run
    drop_every: int = 0  # steps: counted from the start of the run

    def __post_init__(self) -> None:
        """Check that values are in range and consistent."""
        if self.kind not in get_args(Kind):
            raise ConfigError(f"schedule.kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if not (math.isfinite(self.peak) and self.peak >= 0):
            raise ConfigError(f"schedule.peak must be a finite number of at least 0, not {self.peak}")
        for name in ("start_ratio", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"schedule.{name} must be between 0 and 1, not {getattr(self, name)}")
        for name, least in (("num_steps", 1), ("warmup_steps", 0), ("decay_steps", 0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least and value == int(value)):
                raise ConfigError(f"schedule.{name} must be a whole number of at least {least}, not {value}")
        self._check_together()

    def _check_together(self) -> None:
        if self.warmup_steps > self.num_steps:
            raise ConfigError(f"schedule.warmup_steps {self.warmup_steps} is more than num_steps {self.num_steps}")
        if self.kind in ("cosine", "linear") and self.warmup_steps == self.num_steps:
            raise ConfigError(
                f"schedule.warmup_steps {self.warmup_steps} leaves no step for the {self.kind} decay; "
                "it must be below num_steps"
            )
        if self.kind == "wsd" and not 1 <= self.decay_steps <= self.num_steps - self.warmup_steps:
            raise ConfigError(
                f"schedule.decay_steps of wsd must be between 1 and num_steps - warmup_steps "
                f"= {self.num_steps - self.warmup_steps}, not {self.decay_steps}"
            )
        if self.kind != "wsd" and self.decay_steps:
            raise ConfigError(f"schedule.decay_steps is for wsd only; remove it for {self.kind}")
        if not 0 < self.drop <= 1 or min((self.drop_every, *self.drop_at)) < 0:
            raise ConfigError(
                f"schedule.drop must be above 0 and at most 1, and drop_at and drop_every at least 0, not {self.drop}, "
                f"{self.drop_at}, {self.drop_every}"
            )
        if self.kind == "steps" and bool(self.drop_at) == bool(self.drop_every):
            raise ConfigError("schedule.kind steps needs either drop_at or drop_every, not both")
        if self.kind != "steps" and (self.drop_at or self.drop_every):
            raise ConfigError(f"schedule.drop_at and drop_every are for steps only; remove them for {self.kind}")
        if self.kind in ("rsqrt", "constant", "steps") and self.final_ratio:
            raise ConfigError(f"schedule.final_ratio is not used by {self.kind}; remove it")
        if self.kind == "rsqrt" and not self.warmup_steps:
            raise ConfigError("schedule.warmup_steps sets the time scale of rsqrt and must be at least 1, not 0")


def make(cfg: Config) -> optax.Schedule:
    """Return the function from a step (from 0; int or array of any shape) to its rate (of the same shape).

    With `start_ratio` 0 the first step has rate 0, as everywhere in optax. The decays after warm-up:

    * cosine: half a period down to `final_ratio * peak` (Loshchilov & Hutter 2017).
    * linear: a straight line down to `final_ratio * peak` (Devlin et al. 2019).
    * rsqrt: peak * sqrt(warmup_steps / step) (Vaswani et al. 2017). T5 holds the rate during the first
      `warmup_steps` instead of raising it (Raffel et al. 2020, section 3.1.2): `start_ratio=1`.
    * wsd: constant at the peak, then a straight line down over the last `decay_steps` (Hu et al. 2024, MiniCPM).
    * constant: constant at the peak.
    * steps: multiplied by `drop` at every drop (He et al. 2016; every 2.4 epochs in Tan & Le 2019).
    """
    body = _after_warmup(cfg)
    if not cfg.warmup_steps:
        return body
    rise = optax.linear_schedule(cfg.start_ratio * cfg.peak, cfg.peak, cfg.warmup_steps)
    return optax.join_schedules([rise, body], [cfg.warmup_steps])


def _after_warmup(cfg: Config) -> optax.Schedule:
    """Return the rate as a function of the steps since the end of warm-up."""
    left, final = cfg.num_steps - cfg.warmup_steps, cfg.final_ratio * cfg.peak
    if cfg.kind == "cosine":
        return optax.cosine_decay_schedule(cfg.peak, left, cfg.final_ratio)
    if cfg.kind == "linear":
        return optax.linear_schedule(cfg.peak, final, left)
    if cfg.kind == "wsd":
        return optax.linear_schedule(cfg.peak, final, cfg.decay_steps, transition_begin=left - cfg.decay_steps)
    if cfg.kind == "rsqrt":
        # `since` is below 0 during warm-up; `join_schedules` discards that value, but it must not divide by zero.
        return lambda since: cfg.peak * jnp.sqrt(cfg.warmup_steps / (cfg.warmup_steps + jnp.maximum(since, 0)))
    if cfg.kind == "steps":
        return lambda since: cfg.peak * cfg.drop ** _drops(cfg, since + cfg.warmup_steps)
    return optax.constant_schedule(cfg.peak)


def _drops(cfg: Config, step: jax.typing.ArrayLike) -> jax.Array:
    """Return the number of drops up to a step of the run."""
    if cfg.drop_every:
        return jnp.asarray(step) // cfg.drop_every
    return (jnp.asarray(step) >= jnp.array(cfg.drop_at)).sum()
