"""Folders of transformers and of peft, read and written: the same numbers on both sides, and no name missed.

Every tensor is moved away from its initial value first: biases of 0 and gains of 1 would hide that two were swapped.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from experiments.hub import hub_convert, hub_verify
from fm_jax.core import tree
from fm_jax.core.errors import DataError, NumericError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.hub import adapter, pretrained, table
from fm_jax.hub.language import gpt2, llama
from fm_jax.models.language import decoder
from fm_jax.models.language.classifier import Classifier
from fm_jax.peft import lora
from tests.close import small
from tests.parity import torch_models
from tests.parity.all_families import FAMILIES, FAMILY

TOLERANCE = 1e-4  # of the peer's standard deviation, in float32 on CPU
ROWS = hub_verify.Config()
TEXT = [case for name in ("gpt2", "llama", "bert", "t5") for case in FAMILIES[name].CASES]


def build(name):
    """Return a peer with every tensor moved."""
    if name.endswith("-classifier"):
        case = name.removesuffix("-classifier")
        family, options = FAMILY[case].CASES[case]
        torch.manual_seed(0)
        cfg = getattr(transformers, f"{family}Config")(**options, num_labels=5, pad_token_id=39)
        model = torch_models.perturb(getattr(transformers, f"{family}ForSequenceClassification")(cfg).eval())
    else:
        model = FAMILY[name].peer(name)
    return model.requires_grad_(False)


def largest(module, params, *models, pad=0):
    """Return the largest difference of any layer or output from any of the peers."""
    rows = hub_verify.draw(module, ROWS, pad)
    mine = hub_verify.ours(module, params, rows)
    others = [hub_verify.theirs(peer, rows) for peer in models]
    lines = [hub_verify.compare(mine, other, other, rows, TOLERANCE) for other in others]
    assert all(len(each) > 3 for each in lines)
    return max(line["error"] for each in lines for line in each)


def opened(kind, folder, **options):
    """Return a folder opened by transformers, which must find each of its weights there and nothing else."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"} | options
    peer, notes = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(notes.values()), notes
    return peer.eval().requires_grad_(False)


def assert_same_weights(one, two):
    first, second = dict(one.named_parameters()), dict(two.named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", [*TEXT, "gpt2-classifier", "neo-classifier", "llama-classifier", "qwen3-classifier"])
def test_a_folder_is_read_and_given_back(name, tmp_path):
    peer = build(name)
    peer.save_pretrained(tmp_path / "theirs")
    found = pretrained.load(tmp_path / "theirs")
    # a classifier on a decoder needs a tokenizer's padding to find each row's last token
    words = OnlyPadding() if name.endswith("-classifier") else None
    pretrained.save(tmp_path / "ours", found.module, found.params, words)
    again = opened(getattr(transformers, architecture(tmp_path / "ours")), tmp_path / "ours")
    pad = getattr(peer.config, "pad_token_id", None) or 0
    small(largest(found.module, found.params, peer, again, pad=pad), TOLERANCE)
    if name == "electra-wide-words":  # with embeddings as wide as its layers it is a BERT, and written as one
        assert isinstance(again, transformers.BertForMaskedLM)
    elif name == "mt5":  # T5 v1.1 by another name
        assert isinstance(again, transformers.T5ForConditionalGeneration)
    else:
        assert_same_weights(peer, again)


def architecture(folder):
    return json.loads((folder / "config.json").read_text())["architectures"][0]


class OnlyPadding:
    """A tokenizer that knows its padding and nothing else."""

    vocab_size = 40

    def special(self, role):
        if role != "pad":
            raise DataError(f"no token for {role}")
        return 39

    def save(self, folder):
        pass


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-labels", "t5-uneven"])
def test_shards_are_read_and_written(name, tmp_path):
    peer = build(name)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    found = pretrained.load(tmp_path / "theirs", mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    pretrained.save(tmp_path / "ours", found.module, found.params, shard_bytes=8_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert_same_weights(peer, opened(type(peer), tmp_path / "ours"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-words", "t5"])
def test_half_precision_is_read_and_written(name, tmp_path):
    build(name).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    peer = opened(getattr(transformers, architecture(tmp_path / "theirs")), tmp_path / "theirs")
    found = pretrained.load(tmp_path / "theirs")
    small(largest(found.module, found.params, peer), TOLERANCE)
    pretrained.save(tmp_path / "ours", found.module, found.params, dtype="bfloat16")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    again = opened(type(peer), tmp_path / "ours", dtype="auto")
    assert next(again.parameters()).dtype == torch.bfloat16
    assert_same_weights(peer, again.float())


@pytest.mark.parametrize("model", [decoder.tiny(), decoder.llama(2, 16, 4, 2, 28, vocab_size=96)])
def test_a_classifier_that_was_finetuned_here_opens_there(model, tmp_path):
    tokenizer = tokenizers.train(["the cat sat on the mat"] * 3, 264)
    module = Classifier(decoder.Decoder(replace(model, vocab_size=264)), 3, pool="last", bias=False)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32), np.ones(1, np.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), _plain(shapes))
    pretrained.save(tmp_path / "ours", module, params, tokenizer, labels=("bad", "so so", "good"))
    peer = opened(transformers.AutoModelForSequenceClassification, tmp_path / "ours")
    assert peer.config.id2label == {0: "bad", 1: "so so", 2: "good"}
    small(largest(module, params, peer, pad=tokenizer.pad_id), TOLERANCE)
    text = "the cat sat"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()


def _plain(boxed):
    return jax.tree.map(lambda x: getattr(x, "value", x), boxed, is_leaf=lambda x: hasattr(x, "value"))


def test_a_conversion_is_proved_by_the_comparison(tmp_path):
    build("gpt2").save_pretrained(tmp_path / "theirs")
    hub_convert.run(hub_convert.Config(tmp_path / "theirs", tmp_path / "ours"), tmp_path / "convert")
    measured = hub_verify.run(hub_verify.Config(folder=tmp_path / "ours"), tmp_path / "verify")
    assert measured["model"] == "GPT2LMHeadModel" and measured["first_wrong"] == ""
    small(measured["largest"], TOLERANCE)
    assert list(measured["errors"]) == ["embed", "layer 0", "layer 1", "layer 2", "final", "logits"]


def test_a_bare_encoder_is_proved_layer_by_layer(tmp_path):
    build("bert-labels").base_model.save_pretrained(tmp_path / "theirs")
    measured = hub_verify.run(hub_verify.Config(folder=tmp_path / "theirs"), tmp_path / "verify")
    assert measured["model"] == "BertModel" and measured["first_wrong"] == ""
    assert list(measured["errors"]) == ["embed", "layer 0", "layer 1", "final"]
    small(measured["largest"], TOLERANCE)


BARE = {  # form -> outputs that are compared; their order is ours
    "gpt2": ["embed", "layer 0", "layer 1", "layer 2", "final"],
    "neo": ["embed", "layer 0", "layer 1", "layer 2", "layer 3", "final"],
    "llama-tied-full-heads": ["embed", "layer 0", "layer 1", "final"],
    "gemma": ["embed", "layer 0", "layer 1", "final"],
    "roberta-labels": ["embed", "layer 0", "layer 1", "final"],
    "distilbert-labels": ["embed", "layer 0", "layer 1", "final"],
    "electra-labels": ["embed", "layer 0", "layer 1", "final"],
    "albert-labels": ["embed", "layer 0", "layer 1", "layer 2", "final"],
    "vit-labels": ["embed", "layer 0", "layer 1", "final"],
    "dinov2-labels": ["embed", "layer 0", "layer 1", "final"],
    "resnet-basic": ["embed", "layer 0", "layer 1", "final"],
    "efficientnet-odd": ["embed", "layer 0", "layer 2", "layer 4", "final"],
}


@pytest.mark.parametrize("name", BARE)
def test_any_base_model_without_its_head_is_proved_layer_by_layer(name, tmp_path):
    base = build(name).base_model
    base.save_pretrained(tmp_path / "theirs")
    measured = hub_verify.run(hub_verify.Config(folder=tmp_path / "theirs"), tmp_path / "verify")
    assert measured["model"] == type(base).__name__ and measured["first_wrong"] == ""
    assert list(measured["errors"]) == BARE[name]
    small(measured["largest"], TOLERANCE)


def _swapped(params, layer):
    """Swap q and k in one layer."""
    flat = tree.flatten(params)
    for leaf in ("kernel", "bias"):
        q, k = (flat[f"blocks/attn/{head}/{leaf}"] for head in "qk")
        flat[f"blocks/attn/q/{leaf}"] = q.at[layer].set(k[layer])
        flat[f"blocks/attn/k/{leaf}"] = k.at[layer].set(q[layer])
    return tree.unflatten(flat)


def _defect(monkeypatch, defect):
    """Plant a mistake in the hub that no shape betrays."""
    real = table.read
    if defect == "q and k of one layer swapped":
        monkeypatch.setattr(table, "read", lambda *given: _swapped(real(*given), layer=1))
    elif defect == "q and k swapped in the table":
        parts = {"q": "k", "k": "q"}
        swapped = tuple(
            replace(e, path=f"blocks/attn/{parts[e.path[12]]}{e.path[13:]}") if e.path[12:13] in ("q", "k") else e
            for e in gpt2._GPT2
        )
        assert swapped != gpt2._GPT2
        monkeypatch.setattr(gpt2, "_GPT2", swapped)
    elif defect == "a square kernel not transposed":
        flat = tuple(replace(e, axes=()) if e.path == "blocks/attn/o/kernel" else e for e in llama._ENTRIES)
        monkeypatch.setattr(llama, "_ENTRIES", flat)
    elif defect == "the other GELU":
        monkeypatch.setitem(gpt2.ACTIVATIONS, "gelu_new", "gelu")
    else:
        real_norm = gpt2.NormConfig
        monkeypatch.setattr(gpt2, "NormConfig", lambda kind, epsilon: real_norm(kind, 1e-6))


@pytest.mark.parametrize(
    ("defect", "name", "first"),
    [
        ("q and k of one layer swapped", "gpt2", "layer 1"),
        ("q and k swapped in the table", "gpt2", "layer 0"),
        ("a square kernel not transposed", "llama", "layer 0"),
        ("the other GELU", "gpt2", "layer 0"),
        ("the other epsilon", "gpt2", "layer 0"),
    ],
)
def test_a_planted_defect_is_seen_and_its_first_layer_named(defect, name, first, tmp_path, monkeypatch, capsys):
    build(name).save_pretrained(tmp_path / "theirs")
    _defect(monkeypatch, defect)
    with pytest.raises(NumericError, match=f"{first} is the first to differ"):
        hub_verify.run(hub_verify.Config(folder=tmp_path / "theirs"), tmp_path / "work")
    table_ = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| embed", f"| {first}"))]
    assert "ok" in table_[0] and "differs" in table_[1]
    assert json.loads((tmp_path / "work" / "results.json").read_text())["first_wrong"] == first


def _trained(module, params, **words):
    cfg = lora.Config(**{"rank": 2, "alpha": 6.0, **words})
    trained, frozen = lora.split(jax.random.key(0), params, cfg)
    rng = np.random.default_rng(3)
    moved = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), trained)
    return moved, frozen, cfg


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt2", r".*attn/(q|v)/kernel"),
        ("gpt2", r".*(attn|mlp)/.*/kernel"),
        ("llama", r".*(attn|mlp)/.*/kernel|head/kernel"),
        ("neo", r".*attn/o/kernel"),
        ("bert-words", r".*mlp/down/kernel"),
        ("t5", r"decoder/.*/cross/(q|v)/kernel"),
    ],
)
def test_adapters_made_here_open_in_peft(name, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    peer = build(name)
    peer.save_pretrained(tmp_path / "base")
    found = pretrained.load(tmp_path / "base")
    trained, frozen, cfg = _trained(found.module, found.params, targets=(targets,))
    adapter.save(tmp_path / "ours", found.module, trained, rank=cfg.rank, alpha=cfg.alpha, base=tmp_path / "base")
    before = largest(found.module, lora.merge(trained, frozen, cfg), peer)
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "ours").merge_and_unload().eval()
    assert before > 100 * TOLERANCE  # the adapters do something
    small(largest(found.module, lora.merge(trained, frozen, cfg), theirs), TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2-classifier", "llama-classifier", "bert-labels", "roberta-labels"])
def test_a_head_and_its_adapters_open_in_peft(name, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    peer = build(name)
    peer.save_pretrained(tmp_path / "base")
    found = pretrained.load(tmp_path / "base")
    trained, frozen, cfg = _trained(
        found.module, found.params, targets=(r".*attn/(q|v)/kernel",), trainable=("head/.*",)
    )
    adapter.save(tmp_path / "ours", found.module, trained, rank=cfg.rank, alpha=cfg.alpha)
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "ours").merge_and_unload().eval()
    pad = peer.config.pad_token_id or 0
    small(largest(found.module, lora.merge(trained, frozen, cfg), theirs, pad=pad), TOLERANCE)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2-classifier", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "SEQ_CLS"}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("qwen2", {"target_modules": ["q_proj"], "layers_to_transform": [1], "lora_dropout": 0.1}),
        ("bert-labels", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
        ("roberta-labels", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
        ("t5", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    ],
)
def test_adapters_of_peft_open_here(name, words, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    peer = build(name)
    peer.save_pretrained(tmp_path / "base")
    found = pretrained.load(tmp_path / "base")
    with_adapters = peft.get_peft_model(peer, peft.LoraConfig(r=4, lora_alpha=10, **words))
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in with_adapters.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.from_numpy(rng.normal(0, 0.1, tuple(parameter.shape)).astype(np.float32)))
    with_adapters.save_pretrained(tmp_path / "theirs")
    read = adapter.load(tmp_path / "theirs", found.module)
    cfg = lora.Config(read.rank, read.alpha, read.targets, read.trainable)
    _, frozen = tree.partition(found.params, read.trainable)
    lora.check(read.trained, found.params)
    merged = with_adapters.merge_and_unload().eval().requires_grad_(False)
    pad = peer.config.pad_token_id or 0
    small(largest(found.module, lora.merge(read.trained, frozen, cfg), merged, pad=pad), TOLERANCE)


def saved(name, folder):
    """Save a peer with every tensor moved."""
    FAMILY[name].peer(name).save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("resnet-basic", ["embed", "layer 0", "layer 1", "logits"]),
        ("efficientnet-odd", ["embed", "layer 0", "layer 2", "layer 4", "logits"]),
        ("vit-oblong", ["embed", "layer 0", "layer 1", "logits"]),
        ("dinov2", ["embed", "layer 0", "layer 1", "final"]),
        ("registers-labels", ["embed", "layer 0", "layer 1", "logits"]),
        ("mae", [*(f"encoder {place}" for place in ("embed", "layer 0", "layer 1")), "embed", "layer 0", "layer 1",
                 "logits"]),
    ],
)  # fmt: skip
def test_a_model_of_images_is_proved_layer_by_layer(name, places, tmp_path):
    saved(name, tmp_path / "theirs")
    measured = hub_verify.run(hub_verify.Config(folder=tmp_path / "theirs"), tmp_path / "work")
    assert list(measured["errors"]) == places
    assert measured["largest"] > 0 and measured["first_wrong"] == ""
    small(measured["largest"], TOLERANCE)


@pytest.mark.parametrize(
    ("name", "wrong", "first"),
    [
        ("vit-labels", "blocks/attn/q/kernel", "layer 0"),
        ("resnet-basic", "stage2/block0/conv1/kernel", "layer 1"),
        ("efficientnet-even", "stage2_block1/filter/kernel", "layer 2"),
        ("mae", "decoder/blocks/mlp/up/kernel", "layer 0"),
    ],
)
def test_a_defect_in_a_model_of_images_is_named(name, wrong, first, tmp_path, monkeypatch):
    saved(name, tmp_path / "theirs")
    real = table.read

    def moved(*given):
        found = tree.flatten(real(*given))
        (path,) = (path for path in found if path.endswith(wrong))
        return tree.unflatten({**found, path: found[path] * 1.01})

    monkeypatch.setattr(table, "read", moved)
    with pytest.raises(NumericError, match=f": {first} is the first to differ"):
        hub_verify.run(hub_verify.Config(folder=tmp_path / "theirs"), tmp_path / "work")
