"""lm_eval's numbers for our decoder and for the same weights in its own torch backend, on tasks of all three kinds."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import lm_eval
import numpy as np
import pytest
from flax.core import meta

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from experiments.language import harness as experiment
from fm_jax.core.errors import DataError
from fm_jax.data.python_docs import docstrings
from fm_jax.data.text import tokenizer
from fm_jax.evals.scores import harness, harness_tasks
from fm_jax.hub import pretrained
from fm_jax.models.language import decoder
from tests.close import close

VOCAB, LENGTH = 280, 48
WORDS = "the cat sat on the mat and a dog saw the rat that ran over it to the barn where no one lives".split()
CONFIGS = {
    "gpt2": replace(decoder.gpt(2, 32, 4, vocab_size=VOCAB, max_length=LENGTH), init_std=0.1),
    "llama": replace(decoder.llama(2, 32, 4, 2, 48, vocab_size=VOCAB), max_length=LENGTH, init_std=0.1),
}


def sentence(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with choices, prompts to continue, and texts; of each some longer than the model's context."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    quiz = [
        # choices of several lengths, one of which begins with a space of its own
        {"text": sentence(rng, 2, high), "choices": [sentence(rng, 1, 6) for _ in range(3)], "label": index % 3}
        for index, high in enumerate([4, 8, 12, 60, 90, 5, 7])
    ]
    stories = [{"text": sentence(rng, 2, high), "answer": "the"} for high in (4, 20, 90, 6, 50)]
    texts = [{"text": sentence(rng, low, low + 9)} for low in (1, 5, 30, 60, 120)]
    # special tokens that a task spells out, within a text and at its beginning
    texts += [{"text": text} for text in ("the cat<|endoftext|>the dog", "<|endoftext|>the cat sat on", "<s> the cat")]
    quiz[1]["text"] += "<|endoftext|>the dog"
    stories[0]["text"] += "<|endoftext|>"
    write(folder, "quiz", quiz, {
        "output_type": "multiple_choice", "doc_to_text": "{{text}} ", "doc_to_choice": "choices",
        "doc_to_target": "label", "fewshot_split": "test", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    })  # fmt: skip
    write(folder, "stories", stories, {
        "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "answer",
        "generation_kwargs": {"until": ["z", "th"], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}],
    })  # fmt: skip
    write(folder, "texts", texts, {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    })  # fmt: skip
    return folder


def write(folder: Path, name: str, rows: list[dict[str, Any]], form: dict[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{name}.yaml").write_text(json.dumps(head | {"test_split": "test"} | form))


@pytest.fixture(scope="module", params=[*CONFIGS, "no_start"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `transformers` opens it; LLaMA's tokenizer puts a start token before every text.

    The last has a token <s>, and states that it is not the start token.
    """
    cfg = CONFIGS.get(request.param, CONFIGS["gpt2"])
    model, path = decoder.Decoder(cfg), tmp_path_factory.mktemp("models") / request.param
    rng = np.random.default_rng(1)
    size = VOCAB - (request.param == "no_start")
    trained = tokenizer.train((sentence(rng, 5, 20) for _ in range(300)), size)
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"])
    # at initialisation all gains are one and all biases zero, and the next token hardly matters
    leaves, kind = jax.tree.flatten(params)
    params = kind.unflatten(
        [np.asarray(leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)) for leaf in leaves]
    )
    pretrained.save(path, model, params, trained)
    if request.param == "llama":
        file = path / "tokenizer.json"
        data = json.loads(file.read_text())
        token = {"id": "<|endoftext|>", "ids": [trained.end_id], "tokens": ["<|endoftext|>"]}
        first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        text = [{"Sequence": {"id": which, "type_id": 0}} for which in "AB"]
        data["post_processor"] = {
            "type": "TemplateProcessing", "single": [first, text[0]], "pair": [first, *text],
            "special_tokens": {"<|endoftext|>": token},
        }  # fmt: skip
        file.write_text(json.dumps(data))
    if request.param == "no_start":
        file = path / "tokenizer.json"
        data = json.loads(file.read_text())
        data["added_tokens"].append(data["added_tokens"][0] | {"id": size, "content": "<s>"})
        file.write_text(json.dumps(data))
        names = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(names | {"bos_token": None}))
    return path


def ask(lm: Any, tasks: Path, shots: int, *names: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        lm,
        tasks=list(names or ("quiz", "stories", "texts")),
        num_fewshot=shots,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    numbers = {name: experiment._plain(entry) for name, entry in found["results"].items()}
    return numbers, {name: [sample["resps"] for sample in rows] for name, rows in found["samples"].items()}


def _choices(rows: list[Any]) -> tuple[list[list[float]], list[list[str]]]:
    """Return each choice's log-likelihood, question by question, and whether greedy text would be it."""
    scores = [[float(score) for ((score, _),) in row] for row in rows]
    return scores, [[str(greedy) for ((_, greedy),) in row] for row in rows]


@pytest.mark.parametrize("shots", [0, 2])
def test_the_same_weights_get_the_same_numbers(shots: int, folder: Path, tasks: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    found = pretrained.load(folder)
    assert found.tokenizer is not None
    model = harness.language_model(
        found.module, found.params, found.tokenizer, experiment.writer(found, 0), batch_size=4
    )
    mine, answers = ask(model, tasks, shots)
    theirs, wanted = ask(HFLM(pretrained=str(folder), device="cpu", batch_size=4, dtype="float32"), tasks, shots)
    for task, numbers in theirs.items():
        assert numbers.keys() == mine[task].keys() and len(numbers) > 0
        close(mine[task], numbers, 1e-4)
    (scores, greedy), (wanted_scores, wanted_greedy) = (_choices(found["quiz"]) for found in (answers, wanted))
    close(scores, wanted_scores, 1e-4)
    assert greedy == wanted_greedy
    close(np.array(answers["texts"], float).ravel(), np.array(wanted["texts"], float).ravel())
    assert answers["stories"] == wanted["stories"]
    assert len({str(text) for text in answers["stories"]}) > 1


@pytest.mark.parametrize("form", ["text", "letter"])
def test_questions_of_ones_own_get_the_same_numbers(form: harness_tasks.Form, folder: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    rng, source = np.random.default_rng(3), tmp_path / "in"
    source.mkdir()
    rows = [
        {
            "question": f"Which is {sentence(rng, 1, 3)}?", "passage": sentence(rng, 2, 5) if number % 2 else "",
            "choices": [sentence(rng, 1, 4) for _ in range(2 + number % 3)], "answer": number % 2,
        }
        for number in range(9)
    ]  # fmt: skip
    (source / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    harness_tasks.questions(source, tmp_path / "out", ["own"], form)
    found = pretrained.load(folder)
    assert found.tokenizer is not None
    model = harness.language_model(found.module, found.params, found.tokenizer, experiment.writer(found, 0))
    mine, answers = ask(model, tmp_path / "out", 1, "own")
    theirs, wanted = ask(HFLM(pretrained=str(folder), device="cpu", dtype="float32"), tmp_path / "out", 1, "own")
    assert mine == theirs and len(answers["own"]) == 7  # two are kept as examples
    close(_choices(answers["own"])[0], _choices(wanted["own"])[0], 1e-4)


def test_a_task_that_is_not_there_is_named(folder: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no task 'quizz' in .*; available: quiz, stories, texts"):
        experiment.run(experiment.Config(folder, ("quiz", "quizz"), tasks), tmp_path)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        experiment.run(experiment.Config(folder, ("quiz",), tmp_path / "nowhere"), tmp_path)


def test_the_experiment_writes_what_the_harness_measured(
    folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = experiment.Config(folder, ("texts", "quiz"), tasks, limit=3, batch_size=2)
    found = experiment.run(cfg, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert found["texts"].keys() == {"word_perplexity", "bits_per_byte"} and 0 <= found["quiz"]["acc"] <= 1
    examples = docstrings.Examples(("Read a file.", "Parse it."), np.array([3, 1]), ("", ""))
    monkeypatch.setattr(docstrings, "load", lambda split, data_dir: examples)
    own = experiment.run(replace(cfg, tasks=("docstrings",), include_path=None), tmp_path / "own")
    assert own["docstrings"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
