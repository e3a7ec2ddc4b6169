import numpy as np
import pytest

from fm_jax.hub import pretrained
from fm_jax.hub.language import llama
from fm_jax.ops.positions import Rope
from tests.hub.forms import FORMS, assert_equal, build, draw, tensors, write


def rope(**change):
    return build({**FORMS["llama"], **change})[0].cfg.attention.rope


def test_kernels_are_stored_transposed_and_the_head_is_its_own():
    module, _ = build(FORMS["llama"])
    params = draw(module)
    arrays = tensors(module, params)
    for ours, theirs in (("attn/k", "self_attn.k_proj"), ("attn/o", "self_attn.o_proj"), ("mlp/down", "mlp.down_proj")):
        half, name = ours.split("/")
        kernel = params["blocks"][half][name]["kernel"][1]
        np.testing.assert_array_equal(arrays[f"model.layers.1.{theirs}.weight"].T, kernel)
    np.testing.assert_array_equal(arrays["lm_head.weight"].T, params["head"]["kernel"])


def test_base_models_and_old_buffers_are_read(tmp_path):
    module, _ = build(FORMS["llama-tied"])
    params = draw(module)
    old = {name.removeprefix("model."): leaf for name, leaf in tensors(module, params).items()}
    buffers = ("layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")
    old |= {f"{prefix}{name}": np.ones(2, np.float32) for name in buffers for prefix in ("", "model.")}
    config = {**FORMS["llama-tied"], "architectures": ["LlamaModel"]}
    assert_equal(pretrained.load(write(tmp_path / "folder", config, old)).params, params)


def test_rotary_positions_are_read_in_their_old_and_their_new_words():
    assert rope() == Rope(10_000.0)
    assert rope(rope_theta=5e5) == Rope(5e5)
    assert rope(rope_parameters={"rope_type": "default", "rope_theta": 5e5}) == Rope(5e5)
    for kind in ("type", "rope_type"):
        assert rope(rope_theta=5e5, rope_scaling={kind: "linear", "factor": 2}) == Rope(5e5, "linear", 2.0)
    words = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    assert rope(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **words}) == Rope(5e5, "llama3", 8.0, 32, 1.0, 4.0)
    assert rope(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}) == Rope(
        1e4, "yarn", 2.0, 64, 1.0, 32.0
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "llama"), ("llama-tied", "llama"), ("mistral", "mistral"), ("mistral-no-window", "llama"),
     ("qwen2", "qwen2"), ("qwen2-windows", "qwen2"), ("qwen3", "qwen3"), ("gemma", "gemma")],
)  # fmt: skip
def test_a_module_is_written_as_the_family_that_has_its_form(name, kind):
    module, _ = build(FORMS[name])
    assert llama.kind(module.cfg) == kind
    data = llama.fields(module)
    assert data["model_type"] == kind
    assert data["architectures"] == [f"{llama.KINDS[kind]}ForCausalLM"]


def test_windows_are_on_the_layers_that_have_them():
    assert build(FORMS["mistral"])[0].cfg.attention.windows == (5,)
    assert build(FORMS["mistral-no-window"])[0].cfg.attention.windows == (0,)
    assert build(FORMS["qwen2-windows"])[0].cfg.attention.windows == (0, 4, 4)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert build({**FORMS["qwen2-windows"], "layer_types": kinds})[0].cfg.attention.windows == (4, 0, 4)


def test_gemma_scales_its_embedding_and_offsets_its_norms():
    cfg = build(FORMS["gemma"])[0].cfg
    assert (cfg.norm.offset, cfg.scale_embedding, cfg.tied, cfg.mlp.activation) == (1.0, True, True, "gelu_tanh")
    exact = build({**FORMS["gemma"], "hidden_act": "gelu"})[0].cfg  # so the first files say, and mean the tanh form
    assert exact.mlp.activation == "gelu_tanh"
