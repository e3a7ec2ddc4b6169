import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.hub import adapter, families
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.decoder import Decoder, tiny
from fm_jax.peft import lora
from tests.close import close
from tests.hub.forms import FORMS, assert_equal, build, draw, tensors

QV = (r"(?:.*/)?attn/(?:q|v)/kernel",)
ALL = (r"(?:.*/)?(?:attn|mlp)/.*/kernel",)


def train(module, *, seed=3, **words):
    """Return (trained, frozen, config), every trained leaf moved."""
    cfg = lora.Config(**{"rank": 2, "alpha": 6.0, "targets": QV, **words})
    trained, frozen = lora.split(jax.random.key(0), draw(module), cfg)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), trained), frozen, cfg


def save(folder, module, trained, cfg, **more):
    adapter.save(folder, module, trained, rank=cfg.rank, alpha=cfg.alpha, **more)
    return folder


def config_of(found):
    return lora.Config(found.rank, found.alpha, found.targets, found.trainable)


def merged(module, found):
    """Return the whole model with what a folder holds."""
    _, frozen = tree.partition(draw(module), found.trainable)
    return lora.merge(found.trained, frozen, config_of(found))


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file)


@pytest.mark.parametrize("name", ["gpt2", "neo", "llama", "qwen3", "bert-words", "t5"])
@pytest.mark.parametrize("targets", [QV, ALL])
def test_adapters_come_back_bit_by_bit(name, targets, tmp_path):
    module, _ = build(FORMS[name])
    if name == "t5":
        targets = (r"decoder/blocks/.*/(q|v)/kernel",)
    trained, _, cfg = train(module, targets=targets)
    found = adapter.load(save(tmp_path / "adapter", module, trained, cfg), module)
    assert_equal(found.trained, trained)
    assert (found.rank, found.alpha, found.trainable, found.base) == (2, 6.0, (), "")
    assert {path for target in found.targets for path in tree.select(draw(module), [target])} == {
        path.rpartition("/")[0] for path in tree.flatten(trained["lora"])
    }
    lora.check(found.trained, draw(module))


def test_names_shapes_and_numbers_are_those_that_peft_writes(tmp_path):
    module, _ = build(FORMS["llama"])
    trained, _, cfg = train(module)
    arrays = load_file(save(tmp_path / "adapter", module, trained, cfg) / "adapter_model.safetensors")
    pair = trained["lora"]["blocks"]["attn"]["v"]["kernel"]
    name = "base_model.model.model.layers.1.self_attn.v_proj"
    np.testing.assert_array_equal(arrays[f"{name}.lora_A.weight"], pair["a"][1].T)
    np.testing.assert_array_equal(arrays[f"{name}.lora_B.weight"], pair["b"][1].T)
    assert len(arrays) == 2 * 2 * 2
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert data["target_modules"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert (data["r"], data["lora_alpha"], data["fan_in_fan_out"], data["task_type"]) == (2, 6, False, "CAUSAL_LM")
    assert data["rank_pattern"] == {} and data["modules_to_save"] is None


def test_the_parts_of_a_fused_matrix_are_one_adapter_of_all_their_ranks(tmp_path):
    module, _ = build(FORMS["gpt2"])
    trained, frozen, cfg = train(module, targets=ALL)
    folder = save(tmp_path / "adapter", module, trained, cfg)
    arrays, attn = load_file(folder / "adapter_model.safetensors"), trained["lora"]["blocks"]["attn"]
    name = "base_model.model.transformer.h.1.attn.c_attn"
    a, b = arrays[f"{name}.lora_A.weight"].T, arrays[f"{name}.lora_B.weight"].T
    assert (a.shape, b.shape) == ((16, 6), (6, 48))
    whole = np.concatenate([attn[h]["kernel"]["a"][1] @ attn[h]["kernel"]["b"][1] for h in "qkv"], axis=1)
    close(a @ b, whole)
    data = json.loads((folder / "adapter_config.json").read_text())
    assert data["rank_pattern"] == {"attn.c_attn": 6} and data["alpha_pattern"] == {"attn.c_attn": 18}
    assert data["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert data["fan_in_fan_out"]
    close(merged(module, adapter.load(folder, module)), lora.merge(trained, frozen, cfg))


def test_a_fused_matrix_of_which_q_and_v_are_adapted_comes_back_as_q_and_v(tmp_path):
    module, _ = build(FORMS["gpt2"])
    trained, _, cfg = train(module)
    found = adapter.load(save(tmp_path / "adapter", module, trained, cfg), module)
    assert found.targets == ("blocks/attn/q/kernel", "blocks/attn/v/kernel")
    assert_equal(found.trained, trained)


def fused(folder, seed=1):
    """Write what peft trains on GPT-2's c_attn: one full pair a layer."""
    folder.mkdir()
    rng, arrays = np.random.default_rng(seed), {}
    for layer in range(3):
        name = f"base_model.model.transformer.h.{layer}.attn.c_attn"
        arrays[f"{name}.lora_A.weight"] = rng.normal(size=(4, 16)).astype(np.float32)
        arrays[f"{name}.lora_B.weight"] = rng.normal(size=(48, 4)).astype(np.float32)
    save_file(arrays, folder / "adapter_model.safetensors")
    data = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(data))
    return arrays


def test_a_fused_adapter_gives_each_part_all_of_a_and_its_columns_of_b(tmp_path):
    module, _ = build(FORMS["gpt2"])
    arrays = fused(tmp_path / "peft")
    found = adapter.load(tmp_path / "peft", module)
    assert (found.rank, found.alpha) == (4, 8.0)
    attn = found.trained["lora"]["blocks"]["attn"]
    for layer in range(3):
        name = f"base_model.model.transformer.h.{layer}.attn.c_attn"
        for part, head in enumerate("qkv"):
            pair = attn[head]["kernel"]
            np.testing.assert_array_equal(pair["a"][layer].T, arrays[f"{name}.lora_A.weight"])
            cut = arrays[f"{name}.lora_B.weight"][16 * part : 16 * (part + 1)]
            np.testing.assert_array_equal(pair["b"][layer].T, cut)
    adapter.save(tmp_path / "again", module, found.trained, rank=4, alpha=8.0)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["rank_pattern"] == {}


def test_the_base_is_named_with_its_revision(tmp_path):
    module, _ = build(FORMS["gpt2"])
    trained, _, cfg = train(module)
    said = json.loads(
        (save(tmp_path / "a", module, trained, cfg, base="a/b", revision="f00") / adapter.CONFIG).read_text()
    )
    assert (said["base_model_name_or_path"], said["revision"]) == ("a/b", "f00")


def test_a_fresh_fused_adapter_keeps_its_rank(tmp_path):
    module, _ = build(FORMS["gpt2"])
    fused(tmp_path / "peft")
    rewrite(tmp_path / "peft", lambda arrays: arrays.update({n: x * 0 for n, x in arrays.items() if "lora_B" in n}))
    found = adapter.load(tmp_path / "peft", module)
    assert found.trained["lora"]["blocks"]["attn"]["k"]["kernel"]["a"].shape == (3, 16, 4)


def test_a_head_that_was_trained_in_full_goes_with_the_adapters(tmp_path):
    backbone = replace(tiny(), vocab_size=40)
    module = Classifier(Decoder(backbone), 3, pool="last", bias=False)
    trained, frozen, cfg = train(module, trainable=("head/.*",))
    folder = save(tmp_path / "adapter", module, trained, cfg, base="owner/name")
    arrays = load_file(folder / "adapter_model.safetensors")
    np.testing.assert_array_equal(arrays["base_model.model.score.weight"], trained["head"]["kernel"].T)
    data = json.loads((folder / "adapter_config.json").read_text())
    assert (data["modules_to_save"], data["task_type"]) == (["score"], "SEQ_CLS")
    found = adapter.load(folder, module)
    assert_equal(found.trained, trained)
    assert (found.trainable, found.base) == (("head/kernel",), "owner/name")
    close(merged(module, found), lora.merge(trained, frozen, cfg))


def test_norms_of_all_layers_that_were_trained_in_full_go_with_the_adapters(tmp_path):
    module, _ = build(FORMS["gpt2"])
    trained, _, cfg = train(module, trainable=("blocks/norm_mlp/.*", "norm_final/scale"))
    found = adapter.load(save(tmp_path / "adapter", module, trained, cfg), module)
    assert_equal(found.trained, trained)
    rewrite(tmp_path / "adapter", lambda arrays: arrays.pop("base_model.model.transformer.h.1.ln_2.bias"))
    with pytest.raises(CheckpointError, match=r"h\.1\.ln_2\.bias .* not stored"):
        adapter.load(tmp_path / "adapter", module)


def test_other_ranks_and_scales_give_the_same_function(tmp_path):
    module, _ = build(FORMS["llama"])
    trained, _, cfg = train(module)
    folder = save(tmp_path / "adapter", module, trained, cfg)
    pair = trained["lora"]["blocks"]["attn"]

    def shorten(arrays):  # layer 0 has no adapter of q, layer 1 one of rank 1; v has another alpha
        for part in "AB":
            arrays.pop(f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight")
            name = f"base_model.model.model.layers.1.self_attn.q_proj.lora_{part}.weight"
            arrays[name] = np.ascontiguousarray(arrays[name][:1] if part == "A" else arrays[name][:, :1])

    rewrite(folder, shorten)
    edit(folder, rank_pattern={"layers.1.self_attn.q_proj": 1}, alpha_pattern={"v_proj": 1})
    found = adapter.load(folder, module)
    assert (found.rank, found.alpha) == (2, 6.0)
    wanted = tree.flatten(draw(module))
    q, v = pair["q"]["kernel"], pair["v"]["kernel"]
    got = tree.flatten(merged(module, found))
    np.testing.assert_array_equal(got["blocks/attn/q/kernel"][0], wanted["blocks/attn/q/kernel"][0])
    delta = q["a"][1][:, :1] @ q["b"][1][:1] * 6.0  # alpha / rank 1
    close(got["blocks/attn/q/kernel"][1], wanted["blocks/attn/q/kernel"][1] + delta)
    delta = v["a"] @ v["b"] * 0.5
    close(got["blocks/attn/v/kernel"], wanted["blocks/attn/v/kernel"] + delta)

    edit(folder, rank_pattern={"q_proj": 1}, alpha_pattern={}, use_rslora=True)
    found = adapter.load(folder, module)
    close(found.alpha, 6.0 * 2**0.5)  # alpha / sqrt(rank), in our alpha / rank
    got = tree.flatten(merged(module, found))
    delta = v["a"] @ v["b"] * 6.0 / 2**0.5
    close(got["blocks/attn/v/kernel"], wanted["blocks/attn/v/kernel"] + delta)
    delta = q["a"][1][:, :1] @ q["b"][1][:1] * 6.0
    close(got["blocks/attn/q/kernel"][1], wanted["blocks/attn/q/kernel"][1] + delta)


def test_matrices_are_named_so_that_no_other_is_meant(tmp_path):
    module, _ = build(FORMS["bert-words"])
    trained, _, cfg = train(module, targets=(r".*mlp/down/kernel",))
    folder = save(tmp_path / "adapter", module, trained, cfg)
    # "output.dense" would be the attention's too
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == [
        f"bert.encoder.layer.{layer}.output.dense" for layer in range(2)
    ]


def test_a_model_without_a_head_has_names_without_a_prefix(tmp_path):
    module, _ = build(FORMS["bert-base"])
    trained, _, cfg = train(module)
    folder = save(tmp_path / "adapter", module, trained, cfg)
    names = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight" in names
    assert_equal(adapter.load(folder, module).trained, trained)


# (change of adapter_config.json, what the message must name)
REFUSED = [
    ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
    ({"use_dora": True}, "use_dora is true"),
    ({"bias": "all"}, 'bias is "all"'),
    ({"lora_bias": True}, "lora_bias is true"),
    ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"'),
    ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"target_parameters": ["experts.weight"]}, "target_parameters"),
    ({"use_something_new": True}, "use_something_new (true) is unknown"),
    ({"r": 0}, "r 0"),
    ({"r": 3}, "A (2, 16), B (16, 2), not A (3, 16), B (16, 3)"),
    ({"rank_pattern": {"(q|v)_proj": 4}}, "A (2, 16), B (16, 2), not A (4, 16), B (16, 4)"),
    ({"rank_pattern": {"(q|v_proj": 2}}, "'(q|v_proj' is not a regular expression"),
    ({"alpha_pattern": {"(a+)+": 2}}, "'(a+)+' is not supported: it repeats a group"),
    ({"alpha_pattern": {"x" * 201: 2}}, "or is longer than 200"),
    ({"enable_lora": [True, False, True]}, "enable_lora is"),
    ({"alpha_pattern": {"q_proj": "many"}}, "'q_proj' has the value 'many'"),
    ({"lora_alpha": -1}, "lora_alpha -1"),
]


@pytest.mark.parametrize(("change", "word"), REFUSED, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_another_kind_of_adapter_is_refused_by_name(change, word, tmp_path):
    module, _ = build(FORMS["llama-tied"])
    trained, _, cfg = train(module)
    folder = save(tmp_path / "adapter", module, trained, cfg)
    edit(folder, **change)
    with pytest.raises(CheckpointError, match=re.escape(word)):
        adapter.load(folder, module)
    if word.endswith("is unknown"):
        assert_equal(adapter.load(folder, module, ignore=tuple(change)).trained, trained)


# what folders of early and recent versions of peft, and of other tools, also hold
BOOKKEEPING = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}, "corda_config": None,
    "enable_lora": None, "eva_config": {"rho": 2.0}, "exclude_modules": None, "layer_replication": [],
    "layers_pattern": None, "layers_to_transform": [0, 1], "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.05,
    "megatron_config": None, "megatron_core": "megatron.core", "merge_weights": False, "peft_version": "0.18.0",
    "qalora_group_size": 16, "rank_pattern": None, "target_modules": r".*\.(q|v)_proj", "trainable_token_indices": None,
    "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def test_bookkeeping_of_other_versions_and_tools_changes_nothing(tmp_path):
    module, _ = build(FORMS["llama-tied"])
    trained, _, cfg = train(module)
    folder = save(tmp_path / "adapter", module, trained, cfg)
    edit(folder, **BOOKKEEPING)
    assert_equal(adapter.load(folder, module).trained, trained)


def test_scales_are_given_by_patterns_as_peft_matches_them(tmp_path):
    module, _ = build(FORMS["llama"])
    trained, _, cfg = train(module)
    folder = save(tmp_path / "adapter", module, trained, cfg)
    edit(folder, alpha_pattern={r".*layers\.[01]\.self_attn\.q_proj": 3, "self_attn.(q|v)_proj": 12, "proj": 1})
    found, whole = adapter.load(folder, module), tree.flatten(draw(module))
    got = tree.flatten(merged(module, found))
    for head, alpha in (("q", 3), ("v", 12)):  # the first pattern that matches a whole name, or its end after a dot
        pair = trained["lora"]["blocks"]["attn"][head]["kernel"]
        path = f"blocks/attn/{head}/kernel"
        close(got[path], whole[path] + pair["a"] @ pair["b"] * alpha / 2)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
# (change of the tensors, what the message must name)
UNFIT = [
    (lambda a: a.pop(f"{Q}.lora_A.weight"), "q_proj: lora_A or lora_B is missing"),
    (
        lambda a: a.update({f"{Q}.lora_magnitude_vector": np.ones(16, np.float32)}),
        "this kind of adapter",
    ),
    (lambda a: a.update({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones(2)}), "this kind of adapter"),
    (lambda a: a.update({"model.norm.weight": np.ones(16)}), "does not begin with base_model.model."),
    (lambda a: a.update({"base_model.model.score.weight": np.ones((2, 16))}), "score.weight: stored, but"),
    (lambda a: a.update({f"{Q}.weight": np.ones((16, 16), np.float32)}), "q_proj.weight"),
    (lambda a: a.update({"base_model.model.model.embed_tokens.weight": np.ones((40, 16))}), "is tied to the head"),
    (
        lambda a: a.update({f"{Q.replace('layers.0', 'layers.7')}.lora_{p}.weight": np.ones((2, 2)) for p in "AB"}),
        "layers.7.self_attn.q_proj: the model has no such matrix",
    ),
]


@pytest.mark.parametrize(("change", "word"), UNFIT, ids=lambda x: x if isinstance(x, str) else "")
def test_tensors_that_do_not_fit_are_refused_by_name(change, word, tmp_path):
    module, _ = build(FORMS["llama-tied"])
    trained, _, cfg = train(module)
    folder = save(tmp_path / "adapter", module, trained, cfg)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=re.escape(word)) as caught:
        adapter.load(folder, module)
    assert "\n" not in str(caught.value)


def test_what_peft_cannot_say_is_not_written(tmp_path):
    module, _ = build(FORMS["gpt2"])
    for words, message in (
        ({"targets": ("embed/tokens",)}, "embed/tokens has an adapter, but peft supports LoRA only on matrices"),
        ({"trainable": ("embed/tokens",)}, "transformer.wte.weight was fully trained and is tied"),
        ({"trainable": ("blocks/attn/q/bias",)}, "blocks/attn/q/bias was fully trained and blocks/attn/k/bias"),
        ({"trainable": ("blocks/attn/.*/bias",)}, "was fully trained and has an adapter"),
    ):
        trained, _, cfg = train(module, **words)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            save(tmp_path / "adapter", module, trained, cfg)
    mean = Classifier(Decoder(tiny()), 3)
    trained, _, cfg = train(mean)
    with pytest.raises(CheckpointError, match="pool mean"):
        save(tmp_path / "adapter", mean, trained, cfg)
    trained, _, cfg = train(module)
    small, _ = build({**FORMS["gpt2"], "n_embd": 8})
    with pytest.raises(CheckpointError, match="its adapter has another shape"):
        save(tmp_path / "adapter", small, trained, cfg)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_not_touched(tmp_path):
    module, _ = build(FORMS["llama"])
    trained, _, cfg = train(module)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path / "adapter", module, trained, cfg)
    assert (tmp_path / "adapter" / "adapter_config.json").read_text() == "mine"


def test_adapters_of_half_precision_are_read(tmp_path):
    module, _ = build(FORMS["llama"])
    trained, _, cfg = train(module)
    folder = save(tmp_path / "adapter", module, trained, cfg)
    rewrite(folder, lambda arrays: arrays.update({n: x.astype(jnp.bfloat16) for n, x in arrays.items()}))
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), trained)
    assert_equal(adapter.load(folder, module).trained, wanted)


def test_the_file_holds_all_that_was_trained_and_nothing_else(tmp_path):
    module, _ = build(FORMS["bert-labels"])
    trained, _, cfg = train(module, trainable=("head/.*",))
    arrays = load_file(save(tmp_path / "adapter", module, trained, cfg) / "adapter_model.safetensors")
    assert sum(x.size for x in arrays.values()) == tree.count(trained)
    assert not {name.removeprefix("base_model.model.") for name in arrays if "lora" not in name} - set(
        tensors(module, draw(module))
    )
    assert families.writing(module).fields(module)["architectures"] == ["BertForSequenceClassification"]
