import json
import os
import re
import resource
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from safetensors.numpy import load_file, save_file

from fm_jax.core import sharding, statistics, tree
from fm_jax.core.config import precision, training
from fm_jax.core.errors import CheckpointError, ResourceError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.core.types import backbone
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.hub import families, pretrained
from fm_jax.hub.example import Size
from fm_jax.hub.files import tensor_file
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.decoder import Config, Decoder, tiny
from tests.hub.forms import FEW, FORMS, assert_equal, build, draw, make, tensors, write

REGISTERS = "dinov2_with_registers"
TEXTS = ["the cat sat on the mat", "a dog ran after the cat", "the mat is on the floor"] * 3


@pytest.mark.parametrize("name", FEW)
def test_a_folder_gives_what_was_put_in_and_is_given_back_the_same(name, tmp_path):
    module, params = make(tmp_path / "theirs", name)
    found = pretrained.load(tmp_path / "theirs")
    assert type(found.module) is type(module)
    assert backbone(found.module).cfg == backbone(module).cfg
    assert_equal(found.params, params)
    if name == "gpt2-labels":
        assert found.labels == ("bad", "good", "so so")
        return  # without a tokenizer it has no padding token, and is refused: see below
    pretrained.save(tmp_path / "ours", found.module, found.params)
    again = pretrained.load(tmp_path / "ours")
    assert backbone(again.module).cfg == backbone(module).cfg
    assert_equal(again.params, params)
    theirs, ours = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    blank = {key: ours.pop(key) for key in ours.keys() - theirs.keys()}
    counted = {key.replace("running_var", "num_batches_tracked") for key in theirs if key.endswith("running_var")}
    assert blank.keys() == (counted or ({f"{REGISTERS}.embeddings.mask_token"} if name == "registers" else set()))
    assert not any(tensor.any() for tensor in blank.values())
    assert all(np.array_equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_on_a_mesh_every_device_gets_its_share(name, tmp_path):
    _, params = make(tmp_path / "folder", name)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    found = pretrained.load(tmp_path / "folder", mesh=mesh)
    assert_equal(found.params, params)
    inputs = families.writing(found.module).example(found.module, np.random.default_rng(0), Size()).inputs
    boxed = jax.eval_shape(found.module.init, jax.random.key(0), **inputs)["params"]
    wanted = tree.flatten(sharding.shardings(boxed, mesh))
    split = 0
    for path, leaf in tree.flatten(found.params).items():
        assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path
        split += len({str(shard.index) for shard in leaf.addressable_shards}) > 1
    assert split > 5
    assert tree.flatten(meta.unbox(boxed)).keys() == wanted.keys()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_come_in_the_dtype_that_is_asked_for(stored, dtype, tmp_path):
    _, params = make(tmp_path / "folder", "gpt2", dtype=stored)
    found = pretrained.load(tmp_path / "folder", dtype=dtype)
    assert found.module.cfg.dtype == dtype
    assert_equal(found.params, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype(dtype)}


def test_weights_are_saved_in_the_dtype_that_is_asked_for(tmp_path):
    module, _ = build(FORMS["gpt2"])
    params = draw(module)
    pretrained.save(tmp_path / "half", module, params, dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {leaf.dtype for leaf in stored.values()} == {jnp.dtype("bfloat16")}
    assert_equal(
        pretrained.load(tmp_path / "half").params,
        jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), params),
    )


@pytest.mark.parametrize("name", ["resnet", "efficientnet"])
def test_running_statistics_are_float32_and_counters_whole_whatever_is_asked_for(name, tmp_path):
    module, params = make(tmp_path / "theirs", name)
    found = pretrained.load(tmp_path / "theirs", dtype="bfloat16")
    running = tree.flatten(statistics.split(params)[1])
    assert len(running) > 8
    for path, leaf in tree.flatten(found.params).items():
        want = tree.flatten(params)[path]
        assert leaf.dtype == (jnp.float32 if path in running else jnp.bfloat16), path
        np.testing.assert_array_equal(leaf, want if path in running else want.astype("bfloat16"), err_msg=path)
    for folder, given in (("cast", params), ("kept", found.params)):
        pretrained.save(tmp_path / folder, module, given, dtype="bfloat16" if folder == "cast" else None)
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == "bfloat16"
        for key, tensor in load_file(tmp_path / folder / "model.safetensors").items():
            kind = "float32" if "running_" in key else "int64" if "num_batches" in key else "bfloat16"
            assert tensor.dtype.name == kind, key
            assert "num_batches" not in key or tensor.shape == ()
        assert_equal(pretrained.load(tmp_path / folder, dtype="bfloat16").params, found.params)


def test_a_large_model_is_saved_as_several_files_and_read_from_them(tmp_path):
    module, _ = build(FORMS["gpt2"])
    params = draw(module)
    pretrained.save(tmp_path / "folder", module, params, shard_bytes=8_000)
    files = sorted(path.name for path in (tmp_path / "folder").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert_equal(pretrained.load(tmp_path / "folder").params, params)


# (form, lie, what the message must name)
LIES = [
    ("gpt2", {"n_layer": 4}, "transformer.h.3.ln_1.weight (for blocks/norm_attn/scale): not stored"),
    ("gpt2", {"n_layer": 2}, "transformer.h.2.ln_1.weight: stored, but the model has no such parameter"),
    ("gpt2", {"n_layer": 2_000}, "not stored"),
    ("gpt2", {"vocab_size": 41}, "transformer.wte.weight: stored as [40, 16], the config wants [41, 16]"),
    ("gpt2", {"vocab_size": 16_000_000}, "the config wants [16000000, 16]"),
    ("gpt2", {"n_embd": 20}, "the config wants [40, 20]"),
    ("gpt2", {"n_positions": 16}, "transformer.wpe.weight: stored as [32, 16]"),
    ("gpt2", {"n_inner": 12}, "mlp.c_fc.weight: stored as [16, 64], the config wants [16, 12]"),
    ("gpt2", {"model_type": "gpt_neo", **{k: FORMS["neo"][k] for k in (
        "hidden_size", "num_layers", "num_heads", "attention_types", "window_size", "max_position_embeddings")},
        "architectures": ["GPTNeoForCausalLM"], **dict.fromkeys(("n_embd", "n_layer", "n_head", "n_positions"))},
     "attn.attention.q_proj.weight"),
    ("gpt2", {"architectures": ["GPT2ForSequenceClassification"], "pad_token_id": 0}, "score.weight"),
    ("gpt2-labels", {"id2label": {"0": "a", "1": "b"}}, "score.weight: stored as [3, 16], the config wants [2, 16]"),
    ("llama", {"num_key_value_heads": 4}, "k_proj.weight: stored as [8, 16], the config wants [16, 16]"),
    ("llama", {"num_attention_heads": 2, "head_dim": 4}, "q_proj.weight: stored as [16, 16], the config wants [8, 16]"),
    ("llama", {"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    ("qwen2-windows", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "use_sliding_window": None,
                       "sliding_window": None, "max_window_layers": None}, "q_proj.bias: stored, but"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "lie", "word"), LIES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_config_that_lies_is_refused_before_a_number_is_read(name, lie, word, tmp_path, monkeypatch):
    make(tmp_path / "folder", name, **lie)
    if "tie_word_embeddings" not in lie:  # a copy is compared with its original
        monkeypatch.setattr(tensor_file.TensorFile, "read", lambda *_: pytest.fail("numbers were read"))
    with pytest.raises(CheckpointError, match=re.escape(word)) as caught:
        pretrained.load(tmp_path / "folder")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_what_is_missing_left_over_and_of_another_shape_stands_in_one_message(tmp_path):
    module, _ = build(FORMS["gpt2"])
    arrays = tensors(module, draw(module))
    arrays["transformer.h.0.extra.weight"] = arrays.pop("transformer.ln_f.weight")
    arrays["transformer.ln_f.bias"] = np.zeros(17, np.float32)
    write(tmp_path / "folder", FORMS["gpt2"], arrays)
    with pytest.raises(CheckpointError, match="3 problems") as caught:
        pretrained.load(tmp_path / "folder")
    for word in ("ln_f.weight (for norm_final/scale): not stored", "h.0.extra.weight: stored, but", "[17]"):
        assert word in str(caught.value)


def test_fields_that_are_unknown_are_refused_unless_told_to_be_without_effect(tmp_path):
    make(tmp_path / "folder", "gpt2", summary_of_training="long")
    with pytest.raises(CheckpointError, match="summary_of_training"):
        pretrained.load(tmp_path / "folder")
    assert pretrained.load(tmp_path / "folder", ignore=("summary_of_training",)).module.cfg.vocab_size == 40


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '{"model_type": ', "\x80\x02}q\x00."])
def test_a_config_that_is_no_object_is_refused(text, tmp_path):
    make(tmp_path / "folder", "gpt2")
    (tmp_path / "folder" / "config.json").write_text(text, "latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        pretrained.load(tmp_path / "folder")


@pytest.mark.parametrize("names", [{"a": "b"}, {"0": "a", "2": "b"}, [1], {"-1": "a"}])
def test_labels_that_are_not_numbered_are_refused(names, tmp_path):
    make(tmp_path / "folder", "gpt2", id2label=names)
    with pytest.raises(CheckpointError, match="id2label"):
        pretrained.load(tmp_path / "folder")


def test_sources_that_are_none_are_refused(tmp_path):
    make(tmp_path / "folder", "gpt2")
    for source, word in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "folder" / "config.json", "is a file, not a folder"),
        ("a/b/c", "does not exist"),
        ("../../nowhere", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=word):
            pretrained.load(source)
    with pytest.raises(CheckpointError, match="has no revision"):
        pretrained.load(tmp_path / "folder", revision="main")


def test_a_folder_with_pickles_only_is_refused_and_nothing_of_it_is_run(tmp_path):
    make(tmp_path / "folder", "gpt2")
    (tmp_path / "folder" / "model.safetensors").unlink()
    trap = b"cos\nmkdir\n(S'" + str(tmp_path / "run").encode() + b"'\ntR."  # os.mkdir when it is unpickled
    (tmp_path / "folder" / "pytorch_model.bin").write_bytes(trap)
    with pytest.raises(CheckpointError, match="pickle"):
        pretrained.load(tmp_path / "folder")
    assert not (tmp_path / "run").exists()


def test_the_tokenizer_comes_with_the_folder_and_is_given_back(tmp_path):
    tokenizer = tokenizers.train(TEXTS, 280)
    module = Decoder(replace(tiny(), vocab_size=288))
    params = draw(module)
    pretrained.save(tmp_path / "folder", module, params, tokenizer)
    found = pretrained.load(tmp_path / "folder")
    assert found.tokenizer.encode("the cat").tolist() == tokenizer.encode("the cat").tolist()
    data = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (data["eos_token_id"], data["pad_token_id"]) == (tokenizer.end_id, tokenizer.pad_id)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    make(tmp_path / "folder", "gpt2")
    tokenizers.train(TEXTS, 280).save(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="280 tokens, but the model's embedding has 40 rows"):
        pretrained.load(tmp_path / "folder")
    module, params = Decoder(tiny()), draw(Decoder(tiny()))
    with pytest.raises(CheckpointError, match="280 tokens, but the model's embedding has 96 rows"):
        pretrained.save(tmp_path / "ours", module, params, tokenizers.train(TEXTS, 280))
    assert not (tmp_path / "ours").exists()


def changed(cfg, **changes):
    """Return a decoder config with fields of its parts replaced: `attention__scale`."""
    for name, value in changes.items():
        part, _, field = name.partition("__")
        cfg = replace(cfg, **{part: replace(getattr(cfg, part), **{field: value}) if field else value})
    return cfg


LLAMA = backbone(build(FORMS["llama"])[0]).cfg
# (module, what the message must name)
NAMELESS = [
    (Decoder(changed(tiny(), tied=False)), "tie_word_embeddings is false"),
    (Decoder(changed(tiny(), attention__windows=(0, 8))), "attention.windows"),
    (Decoder(changed(tiny(), attention__scale=0.5)), "attention.scale 0.5"),
    (Decoder(changed(tiny(), attention__qkv_bias=False)), "attention.scale"),
    (Decoder(changed(tiny(), attention__out_bias=False)), "attention.out_bias False"),
    (Decoder(changed(tiny(), attention__num_kv_heads=2)), "attention.num_kv_heads 2"),
    (Decoder(changed(tiny(), attention__qk_norm=True)), "attention.qk_norm True"),
    (Decoder(changed(tiny(), norm__kind="rms")), "norm.kind rms"),
    (Decoder(changed(tiny(), mlp__gated=True)), "mlp.gated True"),
    (Decoder(changed(tiny(), mlp__activation="silu")), "activation_function 'silu'"),
    (Decoder(changed(LLAMA, norm__kind="layer")), "norm.kind layer"),
    (Decoder(changed(LLAMA, scale_embedding=True)), "scale_embedding True"),
    (Decoder(changed(LLAMA, mlp__bias=True)), "mlp.bias True"),
    (Decoder(changed(LLAMA, attention__windows=(0, 8))), "attention.windows"),
    (Classifier(Decoder(tiny()), 3), "pool mean"),
    (Classifier(Decoder(tiny()), 3, pool="last"), "bias True"),
    (Classifier(Decoder(LLAMA), 3, pool="first", bias=False), "pool first"),
    (Classifier(Decoder(tiny()), 3, pool="last", bias=False, hidden="tanh"), "hidden tanh"),
]


@pytest.mark.parametrize(("module", "word"), NAMELESS, ids=lambda x: x if isinstance(x, str) else "")
def test_what_no_class_of_transformers_computes_is_not_saved(module, word, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(word)) as caught:
        pretrained.save(tmp_path / "folder", module, draw(module), tokenizers.train(TEXTS, 280))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_on_a_decoder_needs_a_padding_token(tmp_path):
    module = Classifier(Decoder(tiny()), 3, pool="last", bias=False)
    with pytest.raises(CheckpointError, match="pad_token_id is missing"):
        pretrained.save(tmp_path / "folder", module, draw(module))
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_is_saved_with_its_labels(tmp_path):
    module = Classifier(Decoder(replace(tiny(), vocab_size=288)), 3, pool="last", bias=False)
    params = draw(module)
    pretrained.save(tmp_path / "folder", module, params, tokenizers.train(TEXTS, 280), labels=("no", "yes", "perhaps"))
    found = pretrained.load(tmp_path / "folder")
    assert found.labels == ("no", "yes", "perhaps")
    assert_equal(found.params, params)
    backbone, below = found.backbone()
    assert isinstance(backbone, Decoder)
    assert_equal(below, params["backbone"])
    with pytest.raises(CheckpointError, match="2 labels"):
        pretrained.save(tmp_path / "two", module, params, tokenizers.train(TEXTS, 280), labels=("no", "yes"))


def test_a_language_model_without_its_head_is_a_backbone(tmp_path):
    make(tmp_path / "folder", "llama")
    module, params = pretrained.load(tmp_path / "folder").backbone()
    assert "head" not in params
    tokens = np.zeros((1, 4), np.int32)
    assert module.apply({"params": params}, tokens, method="hidden").shape == (1, 4, 16)


@pytest.mark.parametrize("there", ["a file", "a folder with something in it"])
def test_what_is_there_already_is_not_touched(there, tmp_path):
    module, _ = build(FORMS["gpt2"])
    target = tmp_path / "target"
    if there == "a file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "config.json").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        pretrained.save(target, module, draw(module))
    assert (target if there == "a file" else target / "config.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@dataclass(frozen=True)
class Grown(Config):
    """A config that has learned more."""

    swirl: int = 0
    shaken: float = training(0.3)
    rounded: str = precision("to even")


def test_a_new_field_is_compared_unless_it_is_marked():
    module, family = build(FORMS["gpt2"])
    data = family.fields(module)
    pretrained.check_form(module.clone(cfg=replace(module.cfg, dropout=0.7, remat="full", init_std=0.5)), data)
    with pytest.raises(CheckpointError, match=r"does not support cfg\.swirl 0 \(it has None\)$"):
        pretrained.check_form(module.clone(cfg=Grown(**vars(module.cfg))), data)


def test_an_empty_folder_is_taken(tmp_path):
    module, _ = build(FORMS["gpt2"])
    (tmp_path / "folder").mkdir()
    pretrained.save(tmp_path / "folder", module, draw(module))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["weights", "tokenizer"])
def test_a_save_that_fails_or_is_stopped_leaves_nothing(kind, place, tmp_path, monkeypatch):
    module, params = Decoder(replace(tiny(), vocab_size=288)), draw(Decoder(replace(tiny(), vocab_size=288)))
    tokenizer = tokenizers.train(TEXTS, 280)

    def half(*args):
        yield from list(real(*args))[:5]
        raise kind("stopped")

    def stop(*_):
        raise kind("stopped")

    real = pretrained.table.write
    if place == "weights":
        monkeypatch.setattr(pretrained.table, "write", half)
    else:
        monkeypatch.setattr(tokenizers.Tokenizer, "save", stop)
    with pytest.raises(CheckpointError if kind is OSError else kind, match="stopped"):
        pretrained.save(tmp_path / "folder", module, params, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_ends_a_save_with_one_line_and_leaves_nothing(tmp_path):
    module, _ = build(FORMS["gpt2"])
    params = draw(module)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ResourceError, match=r"folder cannot be written: File too large; free some space"):
            pretrained.save(tmp_path / "folder", module, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["/proc/none/model", "file/below/model"])
def test_a_place_that_cannot_be_written_is_refused_before_the_parameters_are_read(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    module, _ = build(FORMS["gpt2"])
    with pytest.raises(CheckpointError, match=f"{place} cannot be written"):
        pretrained.save(place, module, draw(module))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


ODD = {  # name in the folder -> what the message must say of it
    "config.json": "is a pipe, not a file",
    "model.safetensors": "is a pipe, not a file",
    "tokenizer.json": "is a link to gone, which does not exist",
    "generation_config.json": "is a folder, not a file",
    "chat_template.jinja": "is a pipe, not a file",
    "tokenizer_config.json": "is a link to gone, which does not exist",
    "special_tokens_map.json": "is a folder, not a file",
    "preprocessor_config.json": "is a link to gone, which does not exist",
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_file_is_refused_by_name(name, tmp_path):
    make(tmp_path, "resnet" if name == "preprocessor_config.json" else "gpt2")
    if name.startswith(("chat", "tokenizer_c", "special")):
        tokenizers.train(TEXTS, 280).save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if "pipe" in ODD[name]:
        os.mkfifo(tmp_path / name)
    elif "link" in ODD[name]:
        (tmp_path / name).symlink_to("gone")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} {ODD[name]}"):
        pretrained.load(tmp_path)


def test_a_parameter_that_the_table_cannot_name_is_not_left_out(tmp_path):
    module, _ = build(FORMS["gpt2"])
    params = tree.flatten(draw(module)) | {"adapter/kernel": jnp.ones((2, 2))}
    with pytest.raises(CheckpointError, match="adapter/kernel is not one of its parameters"):
        pretrained.save(tmp_path / "folder", module, tree.unflatten(params))
    params["embed/tokens"] = jnp.ones((41, 16))
    with pytest.raises(CheckpointError, match=r"embed/tokens is \[41, 16\], not \[40, 16\]"):
        pretrained.save(tmp_path / "folder", module, tree.unflatten(params))
    del params["adapter/kernel"], params["norm_final/scale"]
    with pytest.raises(CheckpointError, match="norm_final/scale is missing"):
        pretrained.save(tmp_path / "folder", module, tree.unflatten(params))
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_is_none_is_refused_when_read(tmp_path):
    module, _ = build(FORMS["gpt2"])
    arrays = tensors(module, draw(module))
    arrays["transformer.h.1.ln_1.weight"] = np.full(16, np.nan, np.float32)
    folder = write(tmp_path / "folder", FORMS["gpt2"], arrays)
    with pytest.raises(CheckpointError, match=r"h\.1\.ln_1\.weight"):
        pretrained.load(folder)
    save_file({"a": np.zeros(2, np.int32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        pretrained.load(folder)
