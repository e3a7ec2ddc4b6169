"""Evaluation of image classifiers: validation loss, then top-1, top-5, calibration and the confusion matrix."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fm_jax.core.types import Batch, LossFn, Params
from fm_jax.evals import metrics, runner
from fm_jax.evals.report import report, results

Apply = Callable[[Params, Batch], jax.Array]


def validation(loss: LossFn, batches: Callable[[], Iterable[Batch]]) -> Callable[[int, Params], dict[str, float]]:
    """Return a function (step, params) -> {name: mean} for a loss and its metrics."""
    step = runner.make_eval_step(loss)

    def validate(_: int, params: Params) -> dict[str, float]:
        return runner.evaluate(step, params, batches())

    return validate


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return top1, top5 (if C > 5), nll in nats, calibration_error and images for logits [N, C] and labels [N]."""
    log_p = np.asarray(jax.nn.log_softmax(logits))
    values = {
        "top1": metrics.accuracy(labels, logits.argmax(axis=1)),
        "nll": float(-log_p[np.arange(len(labels)), labels].mean(dtype=np.float64)),
        "calibration_error": metrics.expected_calibration_error(np.exp(log_p), labels),
        "images": float(len(labels)),
    }
    return values | ({"top5": metrics.top_k_accuracy(labels, logits, 5)} if logits.shape[1] > 5 else {})


def write(
    workdir: Path, apply: Apply, params: Params, splits: Mapping[str, Iterable[Batch]], classes: Sequence[str]
) -> dict[str, Any]:
    """Evaluate and print splits; write results.json and the last split's confusion.png (up to 50 classes).

    Args:
        workdir: the folder to write to.
        apply: (params, batch) -> logits [B, C].
        params: the model's parameters.
        splits: {name: all batches of the split}.
        classes: names of the classes, in order.

    Returns:
        {split: `scores`}.
    """
    measured: dict[str, Any] = {}
    for split, batches in splits.items():
        logits, labels = runner.predict(apply, params, batches)
        measured[split] = scores(logits, labels)
        if jax.process_index() == 0:
            print(f"{split}:", "  ".join(f"{name} {value:.4g}" for name, value in measured[split].items()), flush=True)
    results.write(workdir / "results.json", measured)
    if len(classes) <= 50 and jax.process_index() == 0:
        counts = metrics.confusion(labels, logits.argmax(axis=1), len(classes))
        report.confusion_matrix(workdir / "confusion.png", counts, classes, title=f"{split}: confusion matrix")
    return measured
