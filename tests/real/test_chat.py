"""SmolLM2 answers through its chat template: the texts of transformers, token for token."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fm_jax.generate.text import text
from fm_jax.hub import pretrained

pytestmark = pytest.mark.real
NEW = 64
PROMPTS = (
    "What is the capital of France?",
    "Write a sentence about cats.",
    "Explain why the sky is blue.",
    "List three fruits.",
    "Translate 'good morning' into German.",
    "What is 12 times 12?",
    "Write a Python function that adds two numbers.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "Naïve café: 漢字 😀?",
)


def test_greedy_answers_are_those_of_transformers(fetched: Callable[[str], Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch: pip install torch")
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install transformers")
    pytest.importorskip("jinja2", reason="renders the chat template: pip install jinja2")
    ours = pretrained.load(fetched("smollm2"))
    assert ours.tokenizer is not None
    pretrained.save(tmp_path / "hf", ours.module, ours.params, ours.tokenizer, generation=ours.generation)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    asked, wanted = [], []
    for prompt in PROMPTS:
        talk = [{"role": "user", "content": prompt}]
        ids = words.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        asked.append(ours.tokenizer.encode_chat(talk, add_generation_prompt=True))
        np.testing.assert_array_equal(asked[-1], ids)
        out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :]
        wanted.append(words.decode(out, skip_special_tokens=True))
    answers = text(
        ours.module, ours.params, ours.tokenizer, asked, max_new_tokens=NEW, generation=ours.generation, batch_size=5
    )
    assert answers == wanted and len(set(answers)) == len(PROMPTS)
