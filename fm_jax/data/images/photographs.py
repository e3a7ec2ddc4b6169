"""Two photographs included in scikit-learn: a Chinese temple and a flower, 427 × 640 pixels."""

from functools import cache

import numpy as np

from fm_jax.core.errors import ConfigError

NAMES = ("china", "flower")


@cache
def load(name: str) -> np.ndarray:
    """Return a photograph, uint8 [427, 640, 3], read-only.

    Raises:
        ConfigError: no such photograph, or scikit-learn is missing.
    """
    if name not in NAMES:
        raise ConfigError(f"no photograph {name!r}; choose {' or '.join(NAMES)}")
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ConfigError('the photographs need scikit-learn; install "fm_jax[quickstart]"') from error
    image = np.array(load_sample_image(f"{name}.jpg"))
    image.setflags(write=False)
    return image
