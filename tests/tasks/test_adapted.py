"""Adapters of a folder on a loaded model; that peft computes the same is in tests/parity/test_adapters.py."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.hub import adapter
from fm_jax.hub.pretrained import Pretrained
from fm_jax.peft import lora
from fm_jax.tasks import adapted
from tests.close import close
from tests.hub.forms import FORMS, assert_equal, build, draw

HEAD = "base_model.model.lm_head"
QV = (r"(?:.*/)?attn/(?:q|v)/kernel",)


def trained_on(module, params, folder, **words):
    """Write the folder of a LoRA training; return (trained, frozen, config)."""
    cfg = lora.Config(**{"rank": 2, "alpha": 6.0, "targets": QV, **words})
    trained, frozen = lora.split(jax.random.key(0), params, cfg)
    rng = np.random.default_rng(1)
    trained = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), trained)
    adapter.save(folder, module, trained, rank=2, alpha=6.0, base="owner/base")
    return trained, frozen, cfg


def extend(folder, tensors):
    file = folder / adapter.TENSORS
    save_file(load_file(file) | tensors, file)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-labels"])
def test_adapters_are_beside_the_weights_or_merged_into_them(name, tmp_path):
    module, _ = build(FORMS[name])
    words = {"trainable": ("head/.*",)} if name == "bert-labels" else {}
    trained, frozen, cfg = trained_on(module, draw(module), tmp_path / "lora", **words)
    model = Pretrained(module, draw(module), None, ("a", "b"))
    found = adapted.attach(model, tmp_path / "lora")
    assert_equal(found.trained, trained)
    assert_equal(found.frozen, frozen)
    assert found.module == module and (found.cfg.rank, found.base) == (cfg.rank, "owner/base")
    whole = adapted.merged(model, tmp_path / "lora")
    assert_equal(whole.params, lora.merge(trained, frozen, cfg))
    assert whole.labels == ("a", "b")
    half = replace(model, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(adapted.merged(half, tmp_path / "lora").params)} == {"bfloat16"}


@pytest.mark.parametrize("form", ["llama", "llama-tied"])
@pytest.mark.parametrize("stored", [True, False])
def test_a_head_with_an_adapter_changes_alone(form, stored, tmp_path):
    """Peft also saves the base weights of a head and an embedding if the head is among the targets."""
    module, _ = build(FORMS[form])
    params = draw(module)
    trained, frozen, cfg = trained_on(module, params, tmp_path / "lora")
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 16)).astype(np.float32), rng.normal(size=(40, 2)).astype(np.float32)
    embedding = np.asarray(params["embed"]["tokens"])
    head = embedding if form == "llama-tied" else np.asarray(params["head"]["kernel"]).T
    extend(tmp_path / "lora", {f"{HEAD}.lora_A.weight": a, f"{HEAD}.lora_B.weight": b})
    if stored:
        head = np.ascontiguousarray(head + np.float32(0.5))
        base = {f"{HEAD}.base_layer.weight": head, "base_model.model.model.embed_tokens.weight": embedding + 1}
        extend(tmp_path / "lora", base)
    whole = adapted.merged(Pretrained(module, params, None), tmp_path / "lora")
    assert not whole.module.cfg.tied
    flat, want = tree.flatten(whole.params), tree.flatten(lora.merge(trained, frozen, cfg))
    close(flat["head/kernel"], (head + 3.0 * b @ a).T)
    close(flat["embed/tokens"], embedding + 1 if stored else embedding)
    others = flat.keys() - {"head/kernel", "embed/tokens"}
    assert all(np.array_equal(flat[path], want[path]) for path in others)


def test_an_embedding_that_was_trained_leaves_the_tied_head_as_it_was(tmp_path):
    module, _ = build(FORMS["llama-tied"])
    params = draw(module)
    trained_on(module, params, tmp_path / "lora")
    moved = np.asarray(params["embed"]["tokens"]) * 2
    extend(tmp_path / "lora", {"base_model.model.model.embed_tokens.weight": moved})
    whole = adapted.merged(Pretrained(module, params, None), tmp_path / "lora")
    close(whole.params["embed"]["tokens"], moved)
    close(whole.params["head"]["kernel"], params["embed"]["tokens"].T)


def test_a_matrix_that_is_trained_in_full_and_adapted_is_refused(tmp_path):
    module, _ = build(FORMS["llama"])
    params = draw(module)
    trained_on(module, params, tmp_path / "lora", targets=("head/kernel",))
    extend(tmp_path / "lora", {f"{HEAD}.weight": np.ones((40, 16), np.float32)})
    with pytest.raises(CheckpointError, match="head/kernel has an adapter and is also saved in full"):
        adapted.merged(Pretrained(module, params, None), tmp_path / "lora")


def test_a_folder_that_is_none_is_refused_in_one_line(tmp_path):
    module, _ = build(FORMS["llama"])
    model = Pretrained(module, draw(module), None)
    with pytest.raises(CheckpointError, match=f"there is no .*{adapter.CONFIG}"):
        adapted.merged(model, tmp_path)
    (tmp_path / adapter.CONFIG).symlink_to("gone")
    with pytest.raises(CheckpointError, match=f"{adapter.CONFIG} is a link to gone, which does not exist"):
        adapted.merged(model, tmp_path)
