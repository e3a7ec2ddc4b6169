import numpy as np
import pytest

from fm_jax.hub import pretrained
from fm_jax.hub.language import llama
from tests.hub.forms import FORMS, assert_equal, build, draw, tensors, write


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "llama"), ("llama-tied", "llama"), ("llama-longrope-biases", "llama"), ("mistral", "mistral"),
     ("mistral-no-window", "llama"),
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


def without(name, *fields):
    return build({key: value for key, value in FORMS[name].items() if key not in fields})[0].cfg.attention.windows


def test_an_absent_window_is_the_classes_default_and_null_is_none():
    assert without("mistral", "sliding_window") == (4096,)
    assert without("qwen2-windows", "sliding_window") == (0, 4096, 4096)
    assert build({**FORMS["qwen2-windows"], "sliding_window": None})[0].cfg.attention.windows == (0, 0, 0)
    assert without("qwen2-windows", "max_window_layers") == (0, 0, 0)  # from layer 28 on
    assert without("llama", "sliding_window") == (0,)


def test_biases_are_of_all_projections_except_qwen_2s():
    def biases(name, **change):
        cfg = build({**FORMS[name], **change})[0].cfg
        return cfg.attention.qkv_bias, cfg.attention.out_bias, cfg.mlp.bias

    assert biases("llama-longrope-biases") == (True, True, True)
    assert biases("llama", attention_bias=True) == (True, True, False)
    assert biases("qwen3", attention_bias=True) == biases("gemma", attention_bias=True) == (True, True, False)
    assert biases("qwen2") == (True, False, False)
    assert biases("mistral") == (False, False, False)


def test_gemma_scales_its_embedding_and_offsets_its_norms():
    cfg = build(FORMS["gemma"])[0].cfg
    assert (cfg.norm.offset, cfg.scale_embedding, cfg.tied, cfg.mlp.activation) == (1.0, True, True, "gelu_tanh")
    exact = build({**FORMS["gemma"], "hidden_act": "gelu"})[0].cfg  # so the first files say, and mean the tanh form
    assert exact.mlp.activation == "gelu_tanh"
