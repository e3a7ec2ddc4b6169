"""SmolLM2-135M-Instruct as a local-model tool has it: a quantised GGUF file, equal to transformers token for token.

The reference reads the same file by itself, with the de-quantisation and the translation of transformers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from fm_jax.generate.text import text as write_text
from fm_jax.hub import pretrained
from fm_jax.hub.pretrained import Pretrained
from tests.close import close, small

pytestmark = pytest.mark.real
QUESTIONS = (
    "What is the capital of Italy?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "Give me three tips for a job interview.",
    "What is 17 plus 25?",
    "Translate 'good morning' into French.",
    "Write a Python function that reverses a string.",
    "Who wrote Pride and Prejudice?",
    "List the planets of the solar system.",
    "Why is the sky blue?",
)
TEXT = (
    "The Transformer is a neural network for sequences. It was introduced in 2017 for machine translation, where it "
    "replaced recurrent networks: every position attends to every other one, so that training runs in parallel over a "
    "whole sentence. An encoder reads the source, a decoder writes the target one token after another. Later models "
    "kept only one of the two halves. Encoders such as BERT are trained to fill in masked words, and decoders such as "
    "GPT to predict the next one. Both turned out to learn much that was never asked of them, so that a few examples, "
    "or none, are enough for a new task. The price is computation: the cost of attention grows with the square of the "
    "length, and the cost of training with the product of parameters and tokens."
)


@pytest.fixture(scope="module")
def file(fetched: Callable[[str], Path]) -> Path:
    (path,) = fetched("smollm2").glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def model(file: Path) -> Pretrained:
    return pretrained.load(file)


@pytest.fixture(scope="module")
def theirs(file: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype="float32", attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def their_tokenizer(file: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_the_chat_template_and_the_ids_are_those_of_transformers(model: Pretrained, their_tokenizer: Any) -> None:
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        want = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert model.tokenizer.chat(messages) == want
        ids = their_tokenizer(want, add_special_tokens=False)["input_ids"]
        assert list(model.tokenizer.encode(want, special=True)) == ids


def test_greedy_answers_are_those_of_transformers(model: Pretrained, theirs: Any, their_tokenizer: Any) -> None:
    prompts = [model.tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    with jax.default_matmul_precision("highest"):
        mine = write_text(model.module, model.params, model.tokenizer, prompts, max_new_tokens=64, special=True)
    for prompt, answer in zip(prompts, mine, strict=True):
        tokens = their_tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = theirs.generate(**tokens, max_new_tokens=64, do_sample=False, pad_token_id=2, eos_token_id=2)
        want = their_tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == want
    assert mine[0] == "The capital of Italy is Rome."


def nll(logits: np.ndarray, ids: np.ndarray) -> float:
    logits = logits[0, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), ids[0, 1:]]).mean())


def test_the_perplexity_is_that_of_transformers(model: Pretrained, theirs: Any) -> None:
    ids = model.tokenizer.encode(TEXT)[None]
    mine = np.asarray(jax.jit(model.module.apply)({"params": model.params}, jnp.asarray(ids)))
    with torch.no_grad():
        other = theirs(torch.tensor(np.asarray(ids, np.int64))).logits.numpy()
    close(np.exp(nll(mine, ids)), np.exp(nll(other, ids)), within=1e-4)
    assert 5 < np.exp(nll(mine, ids)) < 30


def exactly(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the model in float64 throughout: transformers computes norms and angles in float32, whatever the dtype."""
    llama = transformers.models.llama.modeling_llama

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width = self.inv_freq.shape[0] * 2
        powers = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles = position_ids[..., None].double() * self.config.rope_parameters["rope_theta"] ** -powers
        both = torch.cat([angles, angles], dim=-1)
        return both.cos(), both.sin()

    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(llama.LlamaRotaryEmbedding, "forward", rotary)
    return theirs.double()


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def test_our_error_against_float64_is_at_most_half_again_that_of_torch(
    model: Pretrained, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Massive activations: the residual's deviation jumps from 6 to 250 at layer 11, and float32 shows it."""
    ids = np.stack([model.tokenizer.encode(TEXT)[:32], np.random.default_rng(0).integers(3, 49152, 32)])
    with jax.default_matmul_precision("highest"):
        mine = np.asarray(jax.jit(model.module.apply)({"params": model.params}, jnp.asarray(ids, jnp.int32)))
    with torch.no_grad():
        other = theirs(torch.tensor(ids.astype(np.int64))).logits.numpy()
        exact = exactly(theirs, monkeypatch)(torch.tensor(ids.astype(np.int64))).logits.numpy()
    theirs.float()
    assert exact.dtype == np.float64
    print(f"error against float64: ours {rms(mine - exact):.3g}, torch's {rms(other - exact):.3g}")
    small(rms(mine - exact) / rms(other - exact), within=1.5)
    small(np.abs(mine - exact).max() / np.abs(other - exact).max(), within=2.0)
