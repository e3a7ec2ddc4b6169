"""GGUF files beside two other readers: the gguf package decodes every block, transformers opens whole models."""

from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from experiments.hub import hub_convert
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.hub import pretrained
from fm_jax.hub.files import gguf as ours
from fm_jax.hub.files.gguf_blocks import KINDS
from tests.close import small
from tests.data.text.test_tokenizer_families import TEXTS
from tests.hub.gguf_files import BLOCKS, Packed, random_blocks
from tests.hub.gguf_files import gguf as made
from tests.hub.test_gguf_model import write
from tests.hub.test_gguf_tokenizer import SAMPLES, byte_level, pieces

WRITTEN = [2, 3, 6, 7, 8]  # the package writes these and only reads the others


def read(tmp_path, tensors):
    path = tmp_path / "model.gguf"
    path.write_bytes(made({}, tensors))
    file = ours.open_file(path, allow_nonfinite=True)
    return {name: file.read(name, tuple(slice(0, size) for size in spec.shape)) for name, spec in file.specs.items()}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_any_bytes_decode_to_the_same_bits(tmp_path, kind):
    size, count = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    assert (size, count) == (KINDS[kind].size, KINDS[kind].bytes)
    rng = np.random.default_rng(kind)
    wild = rng.integers(0, 256, (64, 4 * count), np.uint8)  # scales too: infinities, NaN and denormals
    tensors = {"wild": Packed(kind, (64, 4 * size), wild.tobytes()), "tame": random_blocks(kind, (64, 4 * size))}
    got = read(tmp_path, tensors)
    for name, tensor in tensors.items():
        stored = np.frombuffer(tensor.data, np.uint8).reshape(64, -1)
        with np.errstate(all="ignore"):
            want = gguf.dequantize(stored, gguf.GGMLQuantizationType(kind))
        assert np.array_equal(np.isnan(got[name]), np.isnan(want))
        known = ~np.isnan(want)  # which NaN it is depends on the order of an addition's arguments
        assert np.array_equal(got[name][known].view(np.uint32), want[known].view(np.uint32))


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_the_package_quantises_comes_back_near(tmp_path, kind):
    array = np.random.default_rng(0).normal(size=(16, 256)).astype(np.float32)
    data = gguf.quantize(array, gguf.GGMLQuantizationType(kind))
    got = read(tmp_path, {"x": Packed(kind, array.shape, data.tobytes())})["x"]
    spread = np.abs(array.reshape(-1, 32)).max(1).repeat(32).reshape(array.shape)
    assert (np.abs(got - array) <= spread / {8: 127, 6: 16, 7: 16}.get(kind, 7)).all()


def test_a_file_of_the_packages_writer_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "ö", b"<0x0A>"])
    writer.add_token_scores([0.5, -1.0, 0.0])
    writer.add_token_types([1, 3, 6])
    writer.add_chat_template("{{ x }}")
    arrays = {"a.weight": np.ones((3, 5), np.float32), "b.weight": np.arange(64, dtype=np.float16).reshape(2, 32)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = ours.open_file(tmp_path / "a.gguf")
    assert file.metadata["llama.context_length"] == 64 and file.metadata["general.alignment"] == 64
    assert file.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "ö", "<0x0A>"]
    assert file.metadata["tokenizer.ggml.scores"].tolist() == [0.5, -1.0, 0.0]
    for name, array in arrays.items():
        got = file.read(name, tuple(slice(0, size) for size in array.shape))
        assert got.dtype == array.dtype and np.array_equal(got, array)


def theirs_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()


def alike(loaded, model, tokens):
    with jax.default_matmul_precision("highest"):
        got = jax.jit(loaded.module.apply)({"params": loaded.params}, jnp.asarray(tokens))
    want = theirs_of(model, tokens)
    small(np.abs(np.asarray(got) - want).max() / want.std(), 5e-5)


TOKENS = np.random.default_rng(0).integers(0, 40, (2, 20))


# what transformers does not read of the file has its default there
SIZES = {"gpt2": {"n_positions": 1024, "vocab_size": 50257}, "qwen3": {"head_dim": 128}}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_transformers_reads_the_same_model_from_the_file(tmp_path, name):
    more = {} if name == "gpt2" else {f"{name}.vocab_size": 40}
    file = write(tmp_path, name, more=more, **SIZES.get(name, {}))[2]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    alike(pretrained.load(file), model, TOKENS)


@pytest.mark.parametrize("name", ["llama", "llama-3.1", "gemma"])
def test_transformers_opens_the_folder_that_a_file_is_converted_to(tmp_path, name):
    def pack(data, tensors):
        if name == "llama":
            tensors["blk.0.ffn_down.weight"] = random_blocks(2, tensors["blk.0.ffn_down.weight"].shape)

    file = write(tmp_path, name, pack, intermediate_size=32)[2]
    hub_convert.run(hub_convert.Config(source=file, target=tmp_path / "out"), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    alike(pretrained.load(file), model, TOKENS)


def with_tokenizer(folder: Path, data: dict, rows: int) -> Path:
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in data.items()}
    return write(folder, "llama", more=plain, vocab_size=rows)[2]


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "tekken", "pieces"])
def test_tokenizers_give_the_ids_of_transformers_and_are_written_for_it(tmp_path, kind):
    trained = tokenizers.train(TEXTS, 340)
    data, rows = (pieces(), 266) if kind == "pieces" else (byte_level(trained, pre=kind), 340)
    file = with_tokenizer(tmp_path, data, rows)
    found = pretrained.load(file, shapes=True).tokenizer
    assert found is not None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    found.save(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*SAMPLES, "I'LL pay 12345 €!\n\n  x'll CamelCase"]:
        ids = found.encode(text).tolist()
        assert again.encode(text, add_special_tokens=False) == ids
        assert again.encode(text) == found.encode_pair(text).ids.tolist()
        if not (
            kind == "pieces" and text.startswith(" ")
        ):  # their form adds no space before a space, SentencePiece does
            assert theirs.encode(text, add_special_tokens=False) == ids
