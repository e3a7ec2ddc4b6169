import numpy as np
import pytest

from fm_jax.core.errors import CheckpointError
from fm_jax.hub import pretrained
from tests.hub.forms import FORMS, assert_equal, build, draw, tensors, write


def stored(name, seed=0):
    module, _ = build(FORMS[name])
    params = draw(module, seed)
    return tensors(module, params), params


def test_the_fused_projection_holds_q_k_and_v_side_by_side_and_is_not_transposed():
    arrays, params = stored("gpt2")
    attn = params["blocks"]["attn"]
    for part, head in enumerate("qkv"):
        cut = slice(16 * part, 16 * (part + 1))
        for layer in range(3):
            name = f"transformer.h.{layer}.attn.c_attn"
            np.testing.assert_array_equal(arrays[f"{name}.weight"][:, cut], attn[head]["kernel"][layer])
            np.testing.assert_array_equal(arrays[f"{name}.bias"][cut], attn[head]["bias"][layer])
    np.testing.assert_array_equal(arrays["transformer.h.1.attn.c_proj.weight"], attn["o"]["kernel"][1])
    assert "lm_head.weight" not in arrays


def test_neo_keeps_its_projections_apart_and_transposed():
    arrays, params = stored("neo")
    attn = params["blocks"]["attn"]
    for head, name in (("q", "attention.q_proj"), ("v", "attention.v_proj"), ("o", "attention.out_proj")):
        np.testing.assert_array_equal(arrays[f"transformer.h.2.attn.{name}.weight"].T, attn[head]["kernel"][2])


@pytest.mark.parametrize("name", ["gpt2", "neo"])
def test_the_first_published_files_are_read(name, tmp_path):
    arrays, params = stored(name)
    old = {key.removeprefix("transformer."): leaf for key, leaf in arrays.items()}
    masks = "attn.bias" if name == "gpt2" else "attn.attention.bias"
    old |= {f"h.{layer}.{masks}": np.ones((1, 1, 32, 32), np.float32) for layer in range(3)}
    old["lm_head.weight"] = old["wte.weight"].copy()
    assert_equal(pretrained.load(write(tmp_path / "old", FORMS[name], old)).params, params)


def test_a_head_of_its_own_is_refused_where_the_config_ties_it(tmp_path):
    arrays, _ = stored("gpt2")
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"] * 1.001
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        pretrained.load(write(tmp_path / "folder", FORMS["gpt2"], arrays))


def test_a_name_in_its_old_and_its_new_form_is_refused(tmp_path):
    arrays, _ = stored("gpt2")
    arrays["ln_f.weight"] = arrays["transformer.ln_f.weight"]
    with pytest.raises(CheckpointError, match="stored twice"):
        pretrained.load(write(tmp_path / "folder", FORMS["gpt2"], arrays))


def test_neo_s_kinds_of_attention_become_windows():
    module, _ = build({**FORMS["neo"], "attention_types": [[["global"], 1], [["local", "global"], 1], [["local"], 1]]})
    assert module.cfg.attention.windows == (0, 5, 0, 5)
    assert module.cfg.attention.scale == 1.0  # it does not divide by the root of the width of a head
    assert not module.cfg.attention.qkv_bias


def test_a_head_of_its_own_is_read_and_written_where_the_config_frees_it():
    arrays, params = stored("gpt2-by-depth")
    np.testing.assert_array_equal(arrays["lm_head.weight"].T, params["head"]["kernel"])


def test_scores_are_scaled_as_the_config_says():
    cfg = build(FORMS["gpt2-by-depth"])[0].cfg
    assert (cfg.scale_by_depth, cfg.attention.scale, cfg.tied) == (True, 0.0, False)
    unscaled, family = build({**FORMS["gpt2"], "scale_attn_weights": False})
    assert (unscaled.cfg.scale_by_depth, unscaled.cfg.attention.scale) == (False, 1.0)
    assert family.fields(unscaled)["scale_attn_weights"] is False


def test_dropout_and_epsilon_are_those_of_the_config():
    cfg = build(FORMS["gpt2-erf-wide"])[0].cfg
    assert (cfg.dropout, cfg.attention.dropout, cfg.norm.epsilon) == (0.25, 0.0, 1e-6)
    assert (cfg.mlp.d_ff, cfg.mlp.activation) == (24, "gelu")
    assert build(FORMS["gpt2"])[0].cfg.mlp.activation == "gelu_tanh"
