"""Callbacks of `fit`: they get the training state and return metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fm_jax.train.state import TrainState


@dataclass(frozen=True)
class Hook:
    """Call `call(step, state)` every `every` steps (0: only after the last step) and after the last step.

    The metrics it returns are logged beside the training metrics; the best checkpoint is chosen by them.
    """

    call: Callable[[int, TrainState], Mapping[str, float] | None]
    every: int = 0

    def due(self, step: int, last: bool) -> bool:
        """Say whether the hook runs at this step."""
        return last or (self.every > 0 and step % self.every == 0)
