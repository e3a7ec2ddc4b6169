"""The conversion's and the comparison's own parts, without torch; what they prove together is in tests/parity."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.core import meta
from safetensors.numpy import load_file

from experiments.hub import hub_convert, hub_verify
from fm_jax.checkpoint import model as models
from fm_jax.checkpoint.store import Store
from fm_jax.core import statistics, tree
from fm_jax.core.config import to_dict
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.data.images import pictures
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.hub import adapter, generation, pretrained
from fm_jax.hub.example import Example
from fm_jax.models.language import decoder
from fm_jax.models.language.encoder_decoder import EncoderDecoder
from fm_jax.models.language.encoder_decoder import tiny as tiny_t5
from fm_jax.models.vision import mae, resnet, vit
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.mae import MAE
from fm_jax.models.vision.resnet import ResNet
from fm_jax.models.vision.simclr import SimCLR
from fm_jax.models.vision.vit import ViT
from fm_jax.peft import lora
from fm_jax.train import state
from tests.close import close
from tests.hub.forms import FORMS, assert_equal, build, draw, make, tensors, write

TEXTS = ["the cat sat on the mat", "a dog ran after the cat", "the mat is on the floor"] * 3


def convert(source, target, workdir, **more):
    return hub_convert.run(hub_convert.Config(Path(source), Path(target), **more), workdir)


def left_by_a_run(workdir, model, vocabulary):
    """Write what a run leaves: a checkpoint with its model, and a tokenizer."""
    import optax

    params = draw(model)
    with Store(workdir / "checkpoints", metric="loss", meta={"config": {}, "model": models.describe(model)}) as store:
        store.save(1, state.create(params, optax.sgd(0.1), ema=False), {}, metrics={"loss": 1.0})
    tokenizers.train(TEXTS, vocabulary).save(workdir / "tokenizer")
    return params


def test_one_conversion_after_another_needs_no_directory_of_its_own(tmp_path, monkeypatch):
    make(tmp_path / "theirs", "gpt2")
    monkeypatch.chdir(tmp_path)
    for target in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["hub_convert", "--source", "theirs", "--target", target])
        runpy.run_module("experiments.hub.hub_convert", run_name="__main__")
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


def test_a_public_folder_is_written_anew_to_the_bit(tmp_path, capsys):
    make(tmp_path / "theirs", "bert-labels")
    measured = convert(tmp_path / "theirs", tmp_path / "ours", tmp_path / "work")
    theirs, ours = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in ours)
    assert pretrained.load(tmp_path / "ours").labels == ("bad", "good", "so so")
    assert measured["parameters"] == sum(x.size for x in ours.values())
    assert (measured["tensors"], measured["bytes"]) == (len(ours), sum(x.nbytes for x in ours.values()))
    assert (measured["model"], measured["family"]) == ("BertForSequenceClassification", "bert")
    assert json.loads((tmp_path / "work" / "results.json").read_text())["dtype"] == "float32"
    assert "BertForSequenceClassification" in capsys.readouterr().out


def test_what_is_left_behind_is_said(tmp_path, capsys):
    """What belongs to the model is carried, and a conversion names the rest."""
    module = decoder.Decoder(replace(decoder.tiny(), vocab_size=288))
    tokenizer = tokenizers.train(TEXTS, 280)
    ids = {"eos_token_id": [1, 2], "bos_token_id": None, "pad_token_id": 3}
    ends = generation.Generation(ids, {"eos_token_id": [1, 2], "top_k": 4})
    pretrained.save(tmp_path / "theirs", module, draw(module), tokenizer, generation=ends)
    (tmp_path / "theirs" / "chat_template.jinja").write_text("{{ messages }}")
    convert(tmp_path / "theirs", tmp_path / "all", tmp_path / "work")
    assert "left behind" not in capsys.readouterr().out
    found = pretrained.load(tmp_path / "all")
    assert found.generation == ends
    written = json.loads((tmp_path / "all" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == "{{ messages }}"
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config |= {"task_specific_params": {"a": 1}, "prefix": None, "_name_or_path": "x"}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs" / "README.md").write_text("about")
    (tmp_path / "theirs" / "1_Pooling").mkdir()
    convert(tmp_path / "theirs", tmp_path / "most", tmp_path / "more")
    assert "left behind: 1_Pooling, README.md, config.json: task_specific_params\n" in capsys.readouterr().out
    left = json.loads((tmp_path / "more" / "results.json").read_text())["left_behind"]
    assert left == ["1_Pooling", "README.md", "config.json: task_specific_params"]


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_weights_that_are_left_behind_are_named(prefix, tmp_path):
    """A pooler that the model has no use for, but neither buffers nor copies."""
    module, _ = build(FORMS["bert-base"])
    arrays = {f"{prefix}{name.removeprefix('bert.')}": x for name, x in tensors(module, draw(module)).items()}
    pooler = {f"{prefix}pooler.dense.weight": np.ones((16, 16)), f"{prefix}pooler.dense.bias": np.ones(16)}
    arrays |= {name: x.astype(np.float32) for name, x in pooler.items()}
    arrays[f"{prefix}embeddings.position_ids"] = np.arange(4)
    write(tmp_path / "theirs", FORMS["bert-base"], arrays)
    convert(tmp_path / "theirs", tmp_path / "ours", tmp_path / "work")
    left = json.loads((tmp_path / "work" / "results.json").read_text())["left_behind"]
    assert [name for name in left if "config" not in name] == sorted(pooler)


@pytest.mark.parametrize(("dtype", "wanted"), [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_numbers_stay_as_the_source_has_them_or_as_is_asked_for(dtype, wanted, tmp_path):
    _, params = make(tmp_path / "theirs", "llama", dtype="bfloat16")
    convert(tmp_path / "theirs", tmp_path / "ours", tmp_path / "work", dtype=dtype)
    assert {str(x.dtype) for x in load_file(tmp_path / "ours" / "model.safetensors").values()} == {wanted}
    assert_equal(pretrained.load(tmp_path / "ours").params, jax.tree.map(lambda x: x.astype("float32"), params))


@pytest.mark.parametrize("form", ["resnet", "registers"])
def test_half_precision_is_of_what_is_trained(form, tmp_path):
    """Running statistics stay in float32, and the folder is still one of bfloat16 when it is converted again."""
    make(tmp_path / "theirs", form)
    measured = convert(tmp_path / "theirs", tmp_path / "half", tmp_path / "work", dtype="bfloat16")
    again = convert(tmp_path / "half", tmp_path / "again", tmp_path / "work")
    assert again["dtype"] == "bfloat16" and again["bytes"] == measured["bytes"]
    half, anew = (load_file(tmp_path / side / "model.safetensors") for side in ("half", "again"))
    assert all(np.array_equal(half[name], anew[name]) for name in half)
    others = {name.rpartition(".")[2] for name, array in half.items() if str(array.dtype) != "bfloat16"}
    assert others == ({"running_mean", "running_var", "num_batches_tracked"} if form == "resnet" else set())


def test_an_adapter_is_merged_into_the_folder_that_is_written(tmp_path):
    module, params = make(tmp_path / "theirs", "llama")
    cfg = lora.Config(2, 6.0)
    trained, frozen = lora.split(jax.random.key(0), params, cfg)
    trained = jax.tree.map(lambda leaf: leaf + 0.1, trained)
    adapter.save(tmp_path / "lora", module, trained, rank=2, alpha=6.0)
    convert(tmp_path / "theirs", tmp_path / "ours", tmp_path / "work", adapter=tmp_path / "lora")
    assert_equal(pretrained.load(tmp_path / "ours").params, lora.merge(trained, frozen, cfg))


def test_a_large_model_comes_in_shards(tmp_path):
    make(tmp_path / "theirs", "gpt2")
    convert(tmp_path / "theirs", tmp_path / "ours", tmp_path / "work", shard_bytes=8_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    assert_equal(pretrained.load(tmp_path / "ours").params, pretrained.load(tmp_path / "theirs").params)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_run_of_ours_becomes_a_public_folder(kind, tmp_path):
    cfg = replace(decoder.tiny(), vocab_size=288) if kind == "decoder" else replace(tiny_t5(), vocab_size=288)
    model = decoder.Decoder(cfg) if kind == "decoder" else EncoderDecoder(cfg)
    params = left_by_a_run(tmp_path / "run", model, 280)
    for step in ("best", "last", "1"):
        convert(tmp_path / "run", tmp_path / step, tmp_path / "work", step=step)
        found = pretrained.load(tmp_path / step)
        assert_equal(found.params, params)
        assert found.tokenizer.decode(found.tokenizer.encode("the cat")) == "the cat"
    with pytest.raises(CheckpointError, match="7"):
        convert(tmp_path / "run", tmp_path / "seven", tmp_path / "work", step="7")


IMAGES = {
    "classifier": ImageClassifier(ResNet(resnet.Config((1, 1), (8, 16), "basic", stem_width=8)), 3),
    "by contrast": SimCLR(ResNet(resnet.Config((1, 1), (8, 16), "basic", stem_width=8)), 4),
    "masked": MAE(mae.decoder(1, 16, 2), ViT(mae.encoder(vit.tiny()))),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_run_on_images_becomes_a_public_folder(kind, tmp_path):
    module = IMAGES[kind]
    image = np.zeros((2, 32, 32, 3) if kind != "masked" else (2, 8, 8, 3), np.float32)
    made = module.init({"params": jax.random.key(0), "mask": jax.random.key(1)}, image, mutable=["params"])["params"]
    trained, running = statistics.split(meta.unbox(made))
    about = {"config": {"data": to_dict(pictures.Config(size=image.shape[1]))}, "model": models.describe(module)}
    names = {"classes": ["cat", "dog", "cow"]} if kind == "classifier" else {}
    with Store(tmp_path / "run" / "checkpoints", meta={**about, **names}) as store:
        store.save(1, {"params": trained, "frozen": running}, {})
    convert(tmp_path / "run", tmp_path / "public", tmp_path / "work")
    found, params = pretrained.load(tmp_path / "public"), tree.merge(trained, running)
    assert_equal(found.params, params["backbone"] if kind == "by contrast" else params)
    assert type(found.module) is (ResNet if kind == "by contrast" else type(module))
    assert found.labels == tuple(names.get("classes", ()))
    assert found.preprocessing is not None and found.preprocessing.mean == (0.5, 0.5, 0.5)


def test_what_cannot_be_converted_is_refused_before_anything_is_written(tmp_path):
    make(tmp_path / "theirs", "gpt2")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(tmp_path / "theirs", tmp_path / "theirs", tmp_path / "work")
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "a" / "b" / "nowhere", tmp_path / "ours", tmp_path / "work")
    tiny = decoder.tiny()
    cfg = replace(tiny, vocab_size=288, attention=replace(tiny.attention, qk_norm=True))
    left_by_a_run(tmp_path / "run", decoder.Decoder(cfg), 280)
    with pytest.raises(CheckpointError, match="qk_norm"):
        convert(tmp_path / "run", tmp_path / "ours", tmp_path / "work")
    with pytest.raises(CheckpointError, match="is a run, which has no revision"):
        convert(tmp_path / "run", tmp_path / "ours", tmp_path / "work", revision="main")
    assert not (tmp_path / "ours").exists()


def test_a_disk_that_loses_a_number_is_seen(tmp_path):
    module, params = make(tmp_path / "theirs", "gpt2")
    assert hub_convert.check(tmp_path / "theirs", module, params, "float32") == (40, 44_096)
    params["blocks"]["mlp"]["up"]["bias"] = params["blocks"]["mlp"]["up"]["bias"].at[1, 3].add(1e-3)
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.bias differs from what was written"):
        hub_convert.check(tmp_path / "theirs", module, params, "float32")


def test_a_comparison_without_torch_says_what_to_install(tmp_path, monkeypatch):
    make(tmp_path / "theirs", "gpt2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install torch transformers"):
        hub_verify.run(hub_verify.Config(folder=str(tmp_path / "theirs")), tmp_path / "work")


def test_rows_are_padded_and_use_the_whole_vocabulary_but_the_padding():
    module, _ = build(FORMS["bert-words"])
    rows = hub_verify.draw(module, hub_verify.Config(rows=4, length=32), pad=3)
    tokens, types = rows.inputs["tokens"], rows.inputs["types"]
    assert rows.inside.sum(axis=1).tolist() == [32, 24, 16, 8]
    assert (tokens[~rows.inside] == 3).all() and (tokens[rows.inside] != 3).all()
    many = hub_verify.draw(build(FORMS["t5"])[0], hub_verify.Config(rows=40, length=32), pad=3)
    assert set(many.inputs["tokens"].ravel()) | {3} == set(range(40))
    assert types[rows.inside].any() and not types[~rows.inside].any()
    assert hub_verify.draw(build(FORMS["gpt2"])[0], hub_verify.Config(length=99)).inputs["tokens"].shape == (3, 32)


BLOCKS = ["embed", "layer 0", "layer 1"]


@pytest.mark.parametrize(
    ("form", "places"),
    [
        ("gpt2", [*BLOCKS, "layer 2", "final", "logits"]),
        ("bert-pretraining", [*BLOCKS, "logits", "pair"]),
        ("bert-base", [*BLOCKS, "final"]),
        ("bert-span", [*BLOCKS, "start", "end"]),
        ("electra-replaced", [*BLOCKS, "logits"]),
        ("t5", [*(f"encoder {name}" for name in (*BLOCKS, "final")), *BLOCKS, "final", "logits"]),
        ("resnet-v1", [*BLOCKS, "final"]),
        ("vit", [*BLOCKS, "logits"]),
        ("mae", [*(f"encoder {name}" for name in BLOCKS), "embed", "layer 0", "logits"]),
    ],
)
def test_our_side_has_every_layer_and_every_output(form, places):
    module, _ = build(FORMS[form])
    given = hub_verify.draw(module, hub_verify.Config(rows=2, length=6))
    params = tree.map_with_path(lambda path, leaf: abs(leaf) if path.endswith("/var") else leaf, draw(module))
    mine = hub_verify.ours(module, params, given)
    assert list(mine) == places and all(np.isfinite(x).all() for x in mine.values())
    if form == "electra-replaced":
        assert mine["logits"].shape == (2, 6)
    lines = hub_verify.compare(mine, mine, mine, given, 5e-5)
    assert [line["what"] for line in lines] == places and {line["error"] for line in lines} == {0.0}


def test_a_difference_counts_in_deviations_and_at_real_tokens_only():
    rows = Example({}, np.arange(3) < np.array([[3], [1]]))
    layer = np.random.default_rng(0).normal(0, 7, (2, 3, 4)).astype(np.float32)
    wrong = layer.copy()
    wrong[1, 2] = np.nan  # padding
    pooled = layer[:, 0]
    right = {"logits": pooled, "embed": layer}
    lines = hub_verify.compare({"embed": wrong, "logits": pooled}, right, right, rows, 5e-5)
    assert [(line["what"], line["error"], line[""]) for line in lines] == [
        ("embed", 0.0, "ok"),
        ("logits", 0.0, "ok"),
    ]
    for place, value in (((1, 0, 0), np.nan), ((0, 2, 1), 1e9), ((0, 2, 1), layer[0, 2, 1] + 1e-3)):
        wrong = layer.copy()
        wrong[place] = value
        (line,) = hub_verify.compare({"embed": wrong}, {"embed": layer}, {"embed": layer}, rows, 5e-5)
        assert line[""] == "differs"
    moved = layer + 0.5
    (line,) = hub_verify.compare({"embed": moved}, {"embed": layer}, {"embed": layer}, rows, 5e-5)
    close(line["error"], 0.5 / layer[rows.inside].std(axis=-1).min(), 1e-4)
    with pytest.raises(CheckpointError, match="different layers or shapes"):
        hub_verify.compare({"embed": layer}, right, right, rows, 5e-5)


def test_rounding_is_judged_by_how_much_the_other_side_has():
    """Massive activations: the error of one huge value stays in the residual stream after it is taken away."""
    exact = np.random.default_rng(0).normal(0, 1, (3, 5, 64))
    exact /= exact.std(axis=-1, keepdims=True)
    rows = Example({}, np.ones((3, 5), bool))
    sizes = {"layer 0": 250.0, "layer 1": 5.0, "final": 1.0}

    def side(*errors):
        moved = {name: exact * size for name, size in sizes.items()}
        for name, error in zip(sizes, errors, strict=True):
            moved[name][1, 2, 3] += error
        return moved

    truth, other = side(0, 0, 0), side(0.02, 0.001, 1e-6)

    def verdicts(*errors):
        return [line[""] for line in hub_verify.compare(side(*errors), other, truth, rows, 5e-5)]

    assert verdicts(0.07, 0.07, 4e-5) == ["ok", "ok", "ok"]
    assert verdicts(0.09, 0.07, 4e-5) == ["differs", "ok", "ok"]
    assert verdicts(0.07, 0.09, 4e-5) == ["ok", "differs", "ok"]
    assert verdicts(0.07, 0.07, 1e-4) == ["ok", "ok", "differs"]  # a norm's output carries nothing


def test_a_token_with_massive_activations_does_not_hide_an_error_of_the_others():
    exact = np.random.default_rng(0).normal(0, 5, (2, 5, 64))
    exact[0, 0] *= 200
    rows = Example({}, np.ones((2, 5), bool))
    other = exact.copy()
    other[0, 0, 7] *= 1 + 1e-6  # rounding of the massive token
    for token, verdict in (((0, 0, 7), "ok"), ((1, 2, 3), "differs")):
        mine = exact.copy()
        mine[token] += 1e-3
        (line,) = hub_verify.compare({"layer 0": mine}, {"layer 0": other}, {"layer 0": exact}, rows, 5e-5)
        assert line[""] == verdict
