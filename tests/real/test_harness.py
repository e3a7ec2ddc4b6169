"""lm-evaluation-harness on SmolLM2 and four sets of questions: our numbers and those of its torch backend."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.language import harness as experiment
from fm_jax.evals.scores import harness, harness_tasks
from fm_jax.hub import pretrained
from tests.close import close

pytestmark = pytest.mark.real
NAMES = ("openbookqa", "commonsenseqa", "piqa", "mmlu")
DOCUMENTS, SHOTS = 4, 2  # of each set; every document is read once for each of its choices


@pytest.fixture(scope="module")
def tasks(fetched: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    harness_tasks.questions(fetched("language_tests"), folder, NAMES)
    return folder


@pytest.fixture(scope="module")
def smollm2(fetched: Callable[[str], Path]) -> pretrained.Pretrained:
    return pretrained.load(fetched("smollm2"))


def ask(lm: Any, tasks: Path) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return each task's accuracy, and the log-likelihoods of all choices."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # the libraries read these on import
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options: dict[str, Any] = {"num_fewshot": SHOTS, "limit": DOCUMENTS, "bootstrap_iters": 0, "task_manager": manager}
    found = lm_eval.simple_evaluate(lm, tasks=list(NAMES), **options)
    scores = {
        name: [float(score) for row in rows for ((score, _),) in row["resps"]]
        for name, rows in found["samples"].items()
    }
    return {name: found["results"][name]["acc,none"] for name in NAMES}, scores


def test_the_same_weights_get_the_same_numbers(smollm2: pretrained.Pretrained, tasks: Path, tmp_path: Path) -> None:
    for name in ("torch", "transformers", "lm_eval"):
        pytest.importorskip(name, reason=f"compares with the hf backend: pip install {name}")
    from lm_eval.models.huggingface import HFLM

    assert smollm2.tokenizer is not None
    write = experiment.writer(smollm2, 0)
    model = harness.language_model(smollm2.module, smollm2.params, smollm2.tokenizer, write, batch_size=4)
    mine, scores = ask(model, tasks)
    pretrained.save(tmp_path / "hf", smollm2.module, smollm2.params, smollm2.tokenizer, generation=smollm2.generation)
    theirs, wanted = ask(HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=4, dtype="float32"), tasks)
    assert mine == theirs
    for name in NAMES:
        assert len(scores[name]) >= 2 * DOCUMENTS
        close(scores[name], wanted[name], 1e-4)
