"""Retrieval between images and texts: the share of queries whose own partner is among the nearest k (R@k).

Legend: N images, M texts, of which an image may have several.
"""

from collections.abc import Sequence

import numpy as np

from fm_jax.core.errors import DataError

KS = (1, 5, 10)


def recalls(scores: np.ndarray, image_of: np.ndarray, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return R@k of both directions, and the median rank of a partner (1 is best).

    An image's query is answered if any of its texts is among the k nearest, a text's if its image is. Ties count
    against the model: one that scores everything alike finds nothing but by having no more candidates than k.

    Args:
        scores: similarities [N, M].
        image_of: the image [M] of each text.
        ks: numbers of answers; one above the number of candidates is left out.

    Returns:
        {"image_to_text@1": …, "text_to_image@1": …, "image_to_text_median_rank": …, …}; images without a text are no
        queries, and are candidates.

    Raises:
        DataError: inconsistent shapes, NaN scores, an image that does not exist, or k below 1.
    """
    image_of = np.asarray(image_of)
    if scores.ndim != 2 or not scores.size or image_of.shape != (scores.shape[1],):
        raise DataError(f"scores {scores.shape} must be [images, texts], and image_of {image_of.shape} [texts]")
    if image_of.dtype.kind not in "iu" or image_of.min() < 0 or image_of.max() >= len(scores):
        raise DataError(f"image_of holds {image_of.min()} to {image_of.max()}; there are images 0 to {len(scores) - 1}")
    if np.isnan(scores).any():
        raise DataError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN")
    if not ks or min(ks) < 1:
        raise DataError(f"ks {tuple(ks)} must be one or more numbers of at least 1")
    own = image_of[None] == np.arange(len(scores))[:, None]
    best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
    of_images = 1 + ((scores >= best) & ~own).sum(axis=1)[own.any(axis=1)]
    mine = scores[image_of, np.arange(len(image_of))]
    of_texts = 1 + ((scores >= mine[None]) & ~own).sum(axis=0)
    measured: dict[str, float] = {}
    for name, ranks, candidates in (
        ("image_to_text", of_images, scores.shape[1]),
        ("text_to_image", of_texts, scores.shape[0]),
    ):
        measured |= {f"{name}@{k}": float((ranks <= k).mean()) for k in ks if k <= candidates}
        measured[f"{name}_median_rank"] = float(np.median(ranks))
    return measured
