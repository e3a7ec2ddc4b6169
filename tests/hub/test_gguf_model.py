"""GGUF files of every family beside the safetensors folders that they would be converted from."""

import json
import re
from functools import lru_cache

import jax
import numpy as np
import pytest

from experiments.hub import hub_convert, hub_verify
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.hub import gguf_model, pretrained
from fm_jax.hub.files import stored
from tests.close import close
from tests.hub import forms
from tests.hub.gguf_files import Typed, gguf, random_blocks

ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
FORMS = {
    **{name: forms.FORMS[name] for name in (
        "llama", "llama-tied", "llama-wide-heads", "llama-linear", "mistral", "qwen2", "qwen3", "gemma",
        "gpt2",
    )},
    "llama-yarn": forms.FORMS["llama-yarn"] | {"rope_parameters": {  # what the format can say of it
        name: value for name, value in forms.FORMS["llama-yarn"]["rope_parameters"].items()
        if name not in ("attention_factor", "truncate")
    }},
    "llama-3.1": forms.FORMS["llama"] | {"head_dim": 16, "rope_parameters": ROPE},
}  # fmt: skip
STEMS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def to_gguf(name, array, config):
    """Rename and change a tensor as llama.cpp's converter does."""
    layer, stem, ending = re.fullmatch(
        r"(?:(?:model\.layers|transformer\.h)\.(\d+)\.)?(.*)\.(weight|bias)", name
    ).groups()
    short = STEMS[stem]
    if config["model_type"] in ("llama", "mistral") and short in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if short == "attn_q" else "num_key_value_heads"]
        array = array.reshape(heads, 2, len(array) // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
    if config["model_type"] == "gemma" and short.endswith("norm"):
        array = array + np.float32(1)
    if stem.split(".")[-1].startswith("c_") and ending == "weight":
        array = array.T
    return f"{f'blk.{layer}.' if layer else ''}{short}.{ending}", array


def metadata(config):
    """Return what llama.cpp's converter writes of a config.json."""
    kind = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    if kind == "gpt2":
        data = {
            "context_length": config["n_positions"], "embedding_length": config["n_embd"],
            "block_count": config["n_layer"], "feed_forward_length": config.get("n_inner") or 4 * config["n_embd"],
            "attention.head_count": config["n_head"], "attention.layer_norm_epsilon": 1e-5,
        }  # fmt: skip
        return {"general.architecture": kind, **{f"{kind}.{key}": value for key, value in data.items()}}
    heads, rope = config["num_attention_heads"], config.get("rope_parameters", {})
    data = {
        "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads, "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": rope.get("rope_theta", 10_000.0),
    }  # fmt: skip
    if kind in ("llama", "qwen2"):
        data["rope.dimension_count"] = config.get("head_dim", config["hidden_size"] // heads)
    else:
        data["attention.key_length"] = data["attention.value_length"] = config["head_dim"]
    if kind == "llama":
        data["vocab_size"] = config["vocab_size"]
    if rope.get("rope_type") in ("linear", "yarn"):
        data |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope.get("rope_type") == "yarn":
        data["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        data |= {"rope.scaling.yarn_beta_fast": rope["beta_fast"], "rope.scaling.yarn_beta_slow": rope["beta_slow"]}
    if config.get("sliding_window"):
        data["attention.sliding_window"] = config["sliding_window"]
    return {"general.architecture": kind, **{f"{kind}.{key}": value for key, value in data.items()}}


def divisors(config):
    """Return LLaMA 3.1's divisors of the rotary frequencies, by the loop of llama.cpp's converter."""
    rope, size = config["rope_parameters"], config["head_dim"]
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    result = []
    for pair in range(0, size, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (pair / size)
        smooth = (length / wavelength - low) / (high - low)
        blended = 1 / ((1 - smooth) / rope["factor"] + smooth)
        result.append(1.0 if wavelength < length / high else rope["factor"] if wavelength > length / low else blended)
    assert len({1.0, rope["factor"]} & set(result)) == 2 and len(set(result)) > 2
    return np.array(result, np.float32)


@lru_cache
def drawn(name, **changed):
    """Return (module, parameters, tensors under the names of transformers) of a form."""
    module, _ = forms.build(FORMS[name] | changed)
    params = forms.draw(module)
    return module, params, forms.tensors(module, params)


def write(folder, name, change=None, more=None, **changed):
    """Write a form as a GGUF file; return its module, parameters and path."""
    config = FORMS[name] | changed
    module, params, arrays = drawn(name, **changed)
    tensors = dict(to_gguf(name, array, config) for name, array in arrays.items())
    if config.get("rope_parameters") == ROPE:
        tensors["rope_freqs.weight"] = divisors(config)
    data = metadata(config) | (more or {})
    if change:
        change(data, tensors)
    file = folder / "model.gguf"
    file.write_bytes(gguf({key: value for key, value in data.items() if value is not None}, tensors))
    return module, params, file


@pytest.mark.parametrize("name", FORMS)
def test_a_gguf_file_gives_the_module_and_the_numbers_that_it_was_made_of(tmp_path, name):
    module, params, file = write(tmp_path, name)
    found = pretrained.load(file)
    assert found.module == module and found.tokenizer is None
    if name == "gemma":  # one was added to the norms in float32
        close(found.params, params, 2e-6)
    else:
        forms.assert_equal(found.params, params)


def test_logits_agree_with_the_safetensors_form_and_not_without_the_rows_back(tmp_path, monkeypatch):
    module, _, file = write(tmp_path, "llama")
    folder = forms.write(tmp_path / "theirs", FORMS["llama"], drawn("llama")[2])
    tokens = np.random.default_rng(0).integers(0, 40, (2, 12), np.int32)
    apply = jax.jit(lambda params: module.apply({"params": params}, tokens))
    want = apply(pretrained.load(folder).params)
    close(apply(pretrained.load(file).params), want, 1e-6)
    monkeypatch.setattr(
        gguf_model.Translated, "_halves", lambda self, tensor, index: self._file.read(tensor.name, index)
    )
    wrong = apply(pretrained.load(file).params)
    assert np.abs(wrong - want).max() > 0.05 * want.std()


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_every_part_of_a_changed_tensor_is_what_numpy_cuts_out(tmp_path, name):
    weights = gguf_model.open_file(write(tmp_path, name)[2]).weights
    for tensor, spec in weights.specs.items():
        full = weights.read(tensor, tuple(slice(0, size) for size in spec.shape))
        assert (full.dtype.name, full.shape) == spec
        for start, stop in ((0, 1), (1, 3), (3, 8), (0, 0), (len(full) - 1, len(full))):
            index = (slice(start, stop), *(slice(size // 2, size) for size in spec.shape[1:]))
            out = np.zeros_like(full[index])
            assert weights.read(tensor, index, out) is out
            assert np.array_equal(out, full[index]) and np.array_equal(weights.read(tensor, index), full[index])


def test_biases_of_q_and_k_are_put_back_in_the_order_of_their_rows(tmp_path):
    biases = {f"model.layers.0.self_attn.{head}_proj.bias": np.arange(size, dtype=np.float32)
              for head, size in (("q", 16), ("k", 8), ("v", 8), ("o", 16))}  # fmt: skip
    moved = dict(to_gguf(name, bias, FORMS["llama"]) for name, bias in biases.items())
    assert moved["blk.0.attn_k.bias"].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    opened = gguf_model.open_file(write(tmp_path, "llama", lambda data, tensors: tensors.update(moved))[2])
    assert opened.config.data["attention_bias"] is True
    for name, bias in biases.items():
        assert opened.weights.read(name, (slice(0, len(bias)),)).tolist() == bias.tolist()


def test_quantised_tensors_are_read_through_the_same_changes(tmp_path):
    def pack(data, tensors):
        for name in ("token_embd", "blk.0.attn_q", "blk.1.attn_k"):
            tensors[f"{name}.weight"] = random_blocks(8, tensors[f"{name}.weight"].shape)

    wide = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    file = write(tmp_path, "llama", pack, **wide)[2]
    params = pretrained.load(file).params
    stored_q = stored.open_weights(file).read("blk.0.attn_q.weight", (slice(0, 32), slice(0, 32)))
    q = np.asarray(params["blocks"]["attn"]["q"]["kernel"][0]).reshape(32, 4, 8)  # [D, H, K]
    want = stored_q.reshape(4, 4, 2, 32)  # head, pair, side, D
    assert np.array_equal(q[:, :, :4].transpose(1, 2, 0), want[:, :, 0])
    assert np.array_equal(q[:, :, 4:].transpose(1, 2, 0), want[:, :, 1])


def test_float16_files_and_a_copy_of_gpt2s_tied_head(tmp_path):
    def halve(data, tensors):
        tensors["output.weight"] = tensors["token_embd.weight"]
        for name, array in tensors.items():
            if array.ndim > 1:
                tensors[name] = array.astype(np.float16)

    module, params, file = write(tmp_path, "gpt2", halve)
    found = pretrained.load(file)
    assert found.module == module
    close(found.params, params, 1e-3)


def test_a_folder_of_one_file_is_opened_and_a_revision_is_refused(tmp_path):
    _, params, file = write(tmp_path, "llama")
    forms.assert_equal(pretrained.load(tmp_path).params, params)
    for source, what in ((file, "a file"), (tmp_path, "a folder")):
        with pytest.raises(CheckpointError, match=f"is {what} and has no revision 'main'"):
            pretrained.load(source, revision="main")
    with pytest.raises(CheckpointError, match=r"absent\.gguf does not exist"):
        pretrained.load("absent.gguf")


def test_a_file_is_converted_to_a_folder_with_the_same_numbers(tmp_path):
    def halve(data, tensors):
        tensors.update({name: a.astype(np.float16) for name, a in tensors.items() if a.ndim > 1})

    module, params, file = write(tmp_path, "qwen3", halve)
    cfg = hub_convert.Config(source=file, target=tmp_path / "out")
    measured = hub_convert.run(cfg, tmp_path)
    assert (measured["model"], measured["dtype"]) == ("Qwen3ForCausalLM", "float16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 1e-6
    again = pretrained.load(tmp_path / "out")
    assert again.module == module
    forms.assert_equal(again.params, jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), params))


def test_the_comparison_with_transformers_asks_for_the_converted_folder(tmp_path):
    _, _, file = write(tmp_path, "llama")
    for source in (file, tmp_path):
        with pytest.raises(
            ConfigError, match=r"model\.gguf is not a folder of transformers; convert it with hub_convert"
        ):
            hub_verify.run(hub_verify.Config(folder=source), tmp_path)


def test_one_number_for_every_layer_is_a_number(tmp_path):
    more = {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [28, 28]}
    module, _, file = write(tmp_path, "llama", more=more)
    assert pretrained.load(file, shapes=True).module == module


def test_frequencies_divided_by_one_are_no_scaling(tmp_path):
    ones = {"rope_freqs.weight": np.ones(2, np.float32), "blk.0.attn_rot_embd.weight": np.ones(2, np.float32)}
    module, _, file = write(tmp_path, "llama", lambda data, tensors: tensors.update(ones))
    assert pretrained.load(file).module == module


def test_ids_of_special_tokens_reach_the_config(tmp_path):
    more = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 3}
    _, _, file = write(tmp_path, "llama", more=more)
    found = pretrained.load(file, shapes=True).generation
    assert found is not None and (found.start_id, found.end_ids, found.pad_id) == (1, (2, 3), None)


REFUSED = {
    "architecture": ({"general.architecture": "falcon"}, "architecture 'falcon' is not supported; supported are llama"),
    "no architecture": ({"general.architecture": None}, "general.architecture is missing"),
    "architecture of many": ({"general.architecture": ["llama"]}, "general.architecture is .* not str"),
    "architecture of numbers": ({"general.architecture": [1, 2]}, r"general.architecture is \[1, 2\], not str"),
    "adapter": ({"general.type": "adapter"}, "holds a 'adapter', not a model"),
    "a part": ({"split.count": 3}, "one of 3 parts; join them"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count is 8, but only 0"),
    "a part of the head turns": ({"llama.attention.key_length": 4, "llama.rope.dimension_count": 2},
                                 "rope.dimension_count is 2, but only 4"),
    "values of another width": ({"llama.attention.value_length": 8}, "value_length is 8, but only 4"),
    "layers differ": ({"llama.attention.head_count_kv": [2, 4]}, r"head_count_kv is \[2, 4\]; only one number"),
    "a text for a number": ({"llama.block_count": "2"}, "llama.block_count is '2', not int"),
    "a list for a number": ({"llama.block_count": [2, 2]}, "llama.block_count is .* not int"),
    "two billion layers": ({"llama.block_count": 2**31 - 1}, "is 2147483647, which is out of range"),
    "no heads": ({"llama.attention.head_count": 0, "llama.rope.dimension_count": None}, "heads"),
    "epsilon": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is NaN, not float"),
    "missing": ({"llama.context_length": None}, "llama.context_length is missing"),
    "unknown": ({"llama.logit_scale": 2.0}, r"llama.logit_scale \(2.0\) is unknown"),
    "unknown list": ({"llama.more": [1, 2]}, r"llama.more \(\[1, 2\]\) is unknown"),
    "unknown arrays": ({"llama.more": Typed(9, [Typed(9, [1], 4)], 9)}, r"llama.more \(\[\[1\]\]\) is unknown"),
    "scaling": ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' is not supported"),
    "attention factor": ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5, but only 1.0"),
    "scaling list": ({"llama.rope.scaling.attn_factor": [1.0, 1.0]}, "attn_factor is"),
    "base": ({"llama.rope.freq_base": 0.5}, "base > 1"),
    "vocabulary": ({"llama.vocab_size": 41}, "does not fit the model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, case):
    more, said = REFUSED[case]
    _, _, file = write(tmp_path, "llama", more=more)
    with pytest.raises(CheckpointError, match=said) as error:
        pretrained.load(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_key_is_ignored_when_it_is_named(tmp_path):
    module, _, file = write(tmp_path, "llama", more={"llama.note": 1, "general.name": "x", "other.key": Typed(8, "y")})
    with pytest.raises(CheckpointError, match=r"llama\.note"):
        pretrained.load(file)
    assert pretrained.load(file, ignore=("llama.note",), shapes=True).module == module


TENSORS = {
    "unknown": (lambda t: t.update({"blk.0.ffn_gate_inp.weight": np.ones(2, np.float32)}), "blk.0.ffn_gate_inp.weight"),
    "missing": (lambda t: t.pop("blk.1.ffn_up.weight"), "model.layers.1.mlp.up_proj.weight .* not stored"),
    "no matrix": (lambda t: t.update({"token_embd.weight": np.ones(4, np.float32)}), "has no matrix token_embd.weight"),
    "half a head": (
        lambda t: t.update({"blk.0.attn_q.weight": np.ones((14, 16), np.float32)}),
        "not rows of heads of 4",
    ),
    "a row of nothing": (
        lambda t: t.update({"blk.0.attn_k.weight": np.ones((), np.float32)}),
        "not rows of heads of 4",
    ),
    "no embedding": (lambda t: t.pop("token_embd.weight"), "has no matrix token_embd.weight"),
    "no layer": (lambda t: t.update({"attn_q.weight": np.ones(2, np.float32)}), "attn_q.weight: stored, but"),
    "a layer too many": (lambda t: t.update({"blk.0.output.weight": np.ones(2, np.float32)}), "blk.0.output.weight"),
    "two names": (lambda t: t.update({"model.norm.weight": np.ones(16, np.float32)}), "are both model.norm.weight"),
    "shape": (lambda t: t.update({"output_norm.weight": np.ones(8, np.float32)}), r"stored as \[8\]"),
    "bias": (lambda t: t.update({"blk.0.ffn_up.bias": np.ones(28, np.float32)}), "mlp_bias|mlp.up_proj.bias"),
    "frequencies": (lambda t: t.update({"rope_freqs.weight": np.array([1, 3], np.float32)}), "not LLaMA 3.1's"),
    "too many frequencies": (lambda t: t.update({"rope_freqs.weight": np.ones(3, np.float32)}), "not LLaMA 3.1's"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, case):
    change, said = TENSORS[case]
    _, _, file = write(tmp_path, "llama", lambda data, tensors: change(tensors))
    with pytest.raises(CheckpointError, match=said) as error:
        pretrained.load(file)
    assert "\n" not in str(error.value)


def test_llama_3_with_other_frequencies_is_refused(tmp_path):
    def stretch(data, tensors):
        tensors["rope_freqs.weight"][1:3] *= 1.01

    with pytest.raises(CheckpointError, match="not LLaMA 3"):
        pretrained.load(write(tmp_path, "llama-3.1", stretch)[2])
