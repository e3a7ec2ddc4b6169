"""CLIP and SigLIP beyond what every family is compared on: folders and tokenizers, in both directions."""

import json

import numpy as np
import pytest
import torch
import transformers

from experiments.hub import hub_verify
from fm_jax.core.errors import ConfigError
from fm_jax.data.text import captions, tokenizer
from fm_jax.hub import pretrained
from tests.close import small
from tests.parity.comparison import expected, program
from tests.parity.distances import distances
from tests.parity.multimodal import clip

TEXTS = [f"A big red ring, number {i}; it's on the left of a blue square" for i in range(50)]
SAMPLES = ["A BIG  red\nring.", "naïve 漢字 😀 isn't 42%", "", " leading", "x" * 300]


@pytest.mark.parametrize("case", clip.CASES)
def test_folders_go_both_ways(case, tmp_path):
    """What transformers saved opens here, and what is saved here opens there, with equal numbers."""
    peer = clip.peer(case)
    peer.save_pretrained(tmp_path / "theirs")
    found = pretrained.load(tmp_path / "theirs")
    model, _, answer = expected(case)
    assert found.module == model
    mine = {"gradients": {}, **program(case, found.module)(found.params)}
    small(max(distances(mine, answer).values()), clip.TOLERANCE)
    pretrained.save(tmp_path / "ours", found.module, found.params)
    again, notes = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(notes.values()), notes
    for name, want in peer.state_dict().items():
        assert torch.equal(again.state_dict()[name], want), name


def test_a_text_tower_without_projection_goes_both_ways(tmp_path):
    """As in Stable Diffusion's folders."""
    options = {name: value for name, value in clip.FORMS["clip-text-bare"].items() if name != "model_type"}
    peer = transformers.CLIPTextModel(transformers.CLIPTextConfig(**options)).eval()
    peer.save_pretrained(tmp_path / "theirs")
    found = pretrained.load(tmp_path / "theirs")
    tokens = clip.batch("clip-text")["tokens"]
    want = peer(torch.from_numpy(tokens).long()).pooler_output.detach().numpy()
    got = found.module.apply({"params": found.params}, tokens)
    small(float(np.abs(got - want).max() / want.std()), clip.TOLERANCE)
    pretrained.save(tmp_path / "ours", found.module, found.params)
    again, notes = transformers.CLIPTextModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(notes.values()), notes
    for name, tensor in peer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_command_that_compares_one_tower_says_so(tmp_path):
    clip.peer("clip").save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="is a CLIPModel; models of images and texts cannot be compared yet"):
        hub_verify.run(hub_verify.Config(folder=tmp_path / "theirs"), tmp_path)


def same(ours, theirs):
    """Compare ids with the frame, rows of 77 and decoded text."""
    for text in SAMPLES:
        assert ours.encode_pair(text).ids.tolist() == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text).tolist())
    want = theirs(SAMPLES, padding="max_length", truncation=True, max_length=77)["input_ids"]
    found = captions.rows(ours, SAMPLES)
    assert found.tokens.tolist() == want and found.cut == 1


def test_our_tokenizer_opens_in_transformers(tmp_path):
    made = captions.train(TEXTS, 540)
    made.save(tmp_path)
    for theirs in (
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        transformers.CLIPTokenizer.from_pretrained(tmp_path),
    ):
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (538, 539, 539)
        same(made, theirs)


def test_its_tokenizer_opens_here(tmp_path):
    made = captions.train(TEXTS, 540)
    vocab = {made.token(index): index for index in range(540)}
    merges = [tuple(pair) for pair in json.loads(made.files()["tokenizer.json"])["model"]["merges"]]
    transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77).save_pretrained(tmp_path)
    found = tokenizer.load(tmp_path)
    assert [found.special(role) for role in ("start", "end", "pad")] == [538, 539, 539]
    same(found, transformers.CLIPTokenizer.from_pretrained(tmp_path))
