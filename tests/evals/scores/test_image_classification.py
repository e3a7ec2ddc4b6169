import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.core.types import Loss
from fm_jax.evals.scores import image_classification
from tests.close import close

NAMES = tuple("abcdefg")


def batches(labels: np.ndarray, weights: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"label": labels[part], "weights": weights[part]} for part in (slice(0, 4), slice(4, 8))]


def test_top_1_top_5_and_likelihood_equal_a_count_by_hand() -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.1, 0.08, 0.06, 0.04, 0.02]] * 4, np.float32))
    found = image_classification.scores(logits, np.array([0, 1, 4, 6]))
    assert found["top1"] == 0.25 and found["top5"] == 0.75 and found["images"] == 4
    close(found["nll"], -np.log([0.4, 0.3, 0.06, 0.02]).mean())
    assert "top5" not in image_classification.scores(logits[:, :5], np.array([0, 1, 4, 3]))


def test_what_is_written_leaves_out_rows_of_weight_0_and_draws_the_last_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, weights = np.arange(8, dtype=np.int32) % 7, np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32)

    def always_b(params: object, batch: dict[str, np.ndarray]) -> object:
        return jnp.zeros((4, 7)).at[:, 1].set(1.0) + 0 * batch["label"][:, None]

    splits = {"train": batches(labels, weights), "test": batches(labels, weights)}
    found = image_classification.write(tmp_path, always_b, {}, splits, NAMES)
    assert found["test"]["images"] == 6
    close(found["test"]["top1"], 1 / 6)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[1].startswith("test: top1 0.1667  nll ") and said[1].endswith("  top5 0.8333")


def test_validation_is_the_weighted_mean_of_the_loss() -> None:
    def loss(params: float, batch: dict[str, np.ndarray], rng: object, step: object) -> Loss:
        total, weight = (params * batch["label"] * batch["weights"]).sum(), batch["weights"].sum()
        return Loss(total, weight, {"nll": (total, weight)})

    rows = batches(np.arange(8, dtype=np.int32), np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32))
    validate = image_classification.validation(loss, lambda: iter(rows))
    for _ in range(2):  # the batches are asked for anew each time
        close(validate(3, 2.0)["nll"], 4.0)
