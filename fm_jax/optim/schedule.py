"""The learning rate as a function of the step."""

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
    """A linear rise from `start_ratio * peak` to `peak`, then what `kind` says."""

    kind: Kind = "cosine"
    peak: float  # the highest rate, reached at step `warmup_steps`
    num_steps: int  # of the whole run, warm-up included; the last value holds from there on
    warmup_steps: int = 0
    start_ratio: float = 0.0  # of the peak, at step 0; 1.0 with kind "rsqrt" is T5's schedule to the letter
    final_ratio: float = 0.0  # of the peak, at step `num_steps` (cosine, linear, wsd)
    decay_steps: int = 0  # length of the last, falling part (wsd)
    drop: float = 0.1  # what the rate is multiplied by at each of `drop_at`, or every `drop_every` steps (steps)
    drop_at: tuple[int, ...] = ()  # counted from the start of the run
    drop_every: int = 0

    def __post_init__(self) -> None:
        """Refuse a schedule that cannot be followed."""
        if self.kind not in get_args(Kind):
            raise ConfigError(f"schedule.kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if not (math.isfinite(self.peak) and self.peak >= 0):
            raise ConfigError(f"schedule.peak must be a finite number of at least 0, not {self.peak}")
        for name in ("start_ratio", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"schedule.{name} must be within 0 and 1, not {getattr(self, name)}")
        for name, least in (("num_steps", 1), ("warmup_steps", 0), ("decay_steps", 0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least and value == int(value)):
                raise ConfigError(f"schedule.{name} must be a whole number of at least {least}, not {value}")
        self._check_together()

    def _check_together(self) -> None:
        if self.warmup_steps > self.num_steps:
            raise ConfigError(f"schedule.warmup_steps {self.warmup_steps} is more than num_steps {self.num_steps}")
        if self.kind in ("cosine", "linear") and self.warmup_steps == self.num_steps:
            raise ConfigError(f"schedule.warmup_steps {self.warmup_steps} leaves the {self.kind} decay no step")
        if self.kind == "wsd" and not 1 <= self.decay_steps <= self.num_steps - self.warmup_steps:
            raise ConfigError(
                f"schedule.decay_steps of wsd must be within 1 and num_steps - warmup_steps "
                f"= {self.num_steps - self.warmup_steps}, not {self.decay_steps}"
            )
        if self.kind != "wsd" and self.decay_steps:
            raise ConfigError(f"schedule.decay_steps belongs to wsd; remove it for {self.kind}")
        if not 0 < self.drop <= 1 or min((self.drop_every, *self.drop_at)) < 0:
            raise ConfigError(
                f"schedule.drop must be above 0 and at most 1, and drop_at and drop_every at least 0, not {self.drop}, "
                f"{self.drop_at}, {self.drop_every}"
            )
        if self.kind == "steps" and bool(self.drop_at) == bool(self.drop_every):
            raise ConfigError("schedule.kind steps needs drop_at or drop_every, and not both")
        if self.kind != "steps" and (self.drop_at or self.drop_every):
            raise ConfigError(f"schedule.drop_at and drop_every belong to steps; remove them for {self.kind}")
        if self.kind in ("rsqrt", "constant", "steps") and self.final_ratio:
            raise ConfigError(f"schedule.final_ratio is not read by {self.kind}; remove it")
        if self.kind == "rsqrt" and not self.warmup_steps:
            raise ConfigError("schedule.warmup_steps sets the time scale of rsqrt and must be at least 1")


def make(cfg: Config) -> optax.Schedule:
    """Make the function from a step (from 0, int or array) to its rate.

    With `start_ratio` 0 the first step moves nothing, as everywhere in optax. The decays after warm-up:

    * cosine: half a period down to `final_ratio * peak` (Loshchilov & Hutter 2017).
    * linear: a straight line down to it (Devlin et al. 2019).
    * rsqrt: peak * sqrt(warmup_steps / step) (Vaswani et al. 2017). T5 holds the rate during the first
      `warmup_steps` instead of raising it (Raffel et al. 2020, section 3.1.2): `start_ratio=1`.
    * wsd: the peak held, then a straight line down over the last `decay_steps` (Hu et al. 2024, MiniCPM).
    * constant: the peak held.
    * steps: the peak times `drop` for every drop so far (He et al. 2016; every 2.4 epochs in Tan & Le 2019).
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
        # since < 0 during warm-up, whose value `join_schedules` discards: keep it from dividing by zero
        return lambda since: cfg.peak * jnp.sqrt(cfg.warmup_steps / (cfg.warmup_steps + jnp.maximum(since, 0)))
    if cfg.kind == "steps":
        return lambda since: cfg.peak * cfg.drop ** _drops(cfg, since + cfg.warmup_steps)
    return optax.constant_schedule(cfg.peak)


def _drops(cfg: Config, step: jax.typing.ArrayLike) -> jax.Array:
    """Return how often the rate has been dropped by a step of the run."""
    if cfg.drop_every:
        return jnp.asarray(step) // cfg.drop_every
    return (jnp.asarray(step) >= jnp.array(cfg.drop_at)).sum()
