"""Zero-shot classification: a class is the mean of the vectors of a few texts that name it.

Radford et al. 2021, section 3.1.4: one vector for each of several prompt templates, of length 1, averaged, and scaled
to length 1 again. It costs no more than one template, since classes are embedded once.

Legend: N images, C classes, M templates, P width of the vectors.
"""

from collections.abc import Sequence

import numpy as np

from fm_jax.core.errors import DataError, shown

PLAIN = ("a photo of a {}.",)


def prompts(classes: Sequence[str], templates: Sequence[str] = PLAIN) -> list[str]:
    """Return every class in every template: C · M texts, those of a class together.

    Raises:
        DataError: no class or template, an empty or repeated class, or a template without one place "{}" for it.
    """
    if not classes or not templates:
        raise DataError(f"{len(classes)} classes and {len(templates)} templates make no prompt; give one of each")
    if empty := [number for number, name in enumerate(classes) if not name.strip()]:
        raise DataError(f"class {empty[0]} has an empty name")
    if twice := [name for number, name in enumerate(classes) if name in classes[:number]]:
        raise DataError(f"the class {shown(twice[0])} is named twice; equal names cannot be told apart")
    for template in templates:
        if template.count("{}") != 1:
            raise DataError(f'the template {shown(template)} must have one place "{{}}" for the class')
    return [template.replace("{}", name) for name in classes for template in templates]


def class_vectors(vectors: np.ndarray, num_classes: int) -> np.ndarray:
    """Average the vectors [C · M, P] of `prompts` to one vector a class, of length 1: float32 [C, P].

    Raises:
        DataError: not [C · M, P], or not a whole number of templates.
    """
    if vectors.ndim != 2 or not len(vectors) or num_classes < 1 or len(vectors) % num_classes:
        raise DataError(f"vectors of shape {vectors.shape} are not those of the prompts of {num_classes} classes")
    each = _unit(vectors).reshape(num_classes, -1, vectors.shape[1])
    return _unit(each.mean(axis=1))


def cosines(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the cosines float32 [N, C] of image vectors [N, P] with class vectors [C, P]; the largest is the answer.

    Raises:
        DataError: inconsistent shapes.
    """
    if images.ndim != 2 or classes.ndim != 2 or images.shape[1] != classes.shape[1]:
        raise DataError(f"vectors must be [N, P] and [C, P], not {images.shape} and {classes.shape}")
    scores: np.ndarray = _unit(images) @ _unit(classes).T
    return scores


def _unit(vectors: np.ndarray) -> np.ndarray:
    values = vectors.astype(np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
