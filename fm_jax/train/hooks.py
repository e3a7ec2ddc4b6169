"""Things `fit` does beside stepping: called with the state, answering with metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fm_jax.train.state import TrainState


@dataclass(frozen=True)
class Hook:
    """Call `call(step, state)` every `every` steps (0: never in between) and after the last one.

    What it returns is written beside the training metrics and is what a checkpoint's "best" is chosen by.
    """

    call: Callable[[int, TrainState], Mapping[str, float] | None]
    every: int = 0

    def due(self, step: int, last: bool) -> bool:
        """Say whether this step is one of the hook's."""
        return last or (self.every > 0 and step % self.every == 0)
