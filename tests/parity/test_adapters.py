"""Adapters that peft trained, put on our model: heads among the targets, and patterns as peft documents them."""

import json

import numpy as np
import pytest
import torch

from fm_jax.hub import adapter, pretrained
from fm_jax.tasks import adapted
from tests.close import small
from tests.parity.test_hub import TOLERANCE, build, largest

peft = pytest.importorskip("peft", reason="needs peft: pip install peft")


def moved(model, seed=0):
    """Move everything that is trained away from its initial value."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.from_numpy(rng.normal(0, 0.1, tuple(parameter.shape)).astype(np.float32)))
    return model


WORDS = {
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied head": ("llama-tied-full-heads", {"target_modules": ["v_proj", "lm_head"]}),
    "tied embedding and head in full": (
        "llama-tied-full-heads", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "expression": ("llama", {"target_modules": r".*\.(q|v)_proj"}),
    "patterns": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {r".*layers\.0\..*(q|k)_proj": 2, "^model.layers.1.mlp.*": 3},
         "alpha_pattern": {"(gate|up)_proj": 3, "mlp.down_proj": 5}},
    ),
    "layers": ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [0, 2], "layers_pattern": "h",
                        "fan_in_fan_out": True}),
    "excluded": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.1.*"}),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_a_folder_of_peft_is_put_on_a_model_in_one_call(case, tmp_path):
    name, words = WORDS[case]
    peer = build(name)
    peer.save_pretrained(tmp_path / "base")
    theirs = moved(peft.get_peft_model(peer, peft.LoraConfig(r=4, lora_alpha=10, **words)))
    theirs.save_pretrained(tmp_path / "lora")
    whole = adapted.merged(pretrained.load(tmp_path / "base"), tmp_path / "lora")
    peer = theirs.eval().requires_grad_(False).base_model.model  # not merged: peft would merge a tied head twice
    small(largest(whole.module, whole.params, peer), TOLERANCE)


def test_every_field_of_this_peft_is_known_at_its_default(tmp_path):
    peer = build("llama")
    peer.save_pretrained(tmp_path / "base")
    peft.get_peft_model(peer, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    data = json.loads((tmp_path / "lora" / adapter.CONFIG).read_text())
    assert len(data) > 30
    assert adapter.load(tmp_path / "lora", pretrained.load(tmp_path / "base").module).rank == 8
