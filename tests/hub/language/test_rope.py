"""Rotary positions in config.json: both forms in and out, and what each version of transformers makes of them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fm_jax.core.errors import CheckpointError
from fm_jax.hub import families, pretrained
from fm_jax.models.language.decoder import Decoder
from fm_jax.ops.positions import Rope, magnitude
from tests.close import close
from tests.hub.forms import FORMS, build, draw

DIVISORS = {"short_factor": [1, 1.5], "long_factor": [2.0, 4.0]}
FACTORS = {"short_factors": (1.0, 1.5), "long_factors": (2.0, 4.0)}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# of a LLaMA with heads of 4 and 64 positions
ROPES = {
    "none": Rope(5e5),
    "linear": Rope(5e5, "linear", 2.0),
    "dynamic": Rope(5e5, "dynamic", 2.0, 64),
    "llama3": Rope(5e5, "llama3", 8.0, 32, 1.0, 4.0),
    "yarn": Rope(5e5, "yarn", 2.0, 32, 1.0, 32.0),
    "yarn, given": Rope(5e5, "yarn", 2.0, 32, 1.0, 8.0, truncate=False, attention_factor=1.3),
    "longrope": Rope(5e5, "longrope", 4.0, 16, **FACTORS),
    "longrope, given": Rope(5e5, "longrope", 3.0, 16, attention_factor=0.9, **FACTORS),
}
# what the 4.57 documentation of `rope_scaling` asks for and what else it knows; a key beyond them is warned about
NEEDED = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
    "longrope": {"short_factor", "long_factor"},
}
KNOWN = {
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "truncate"},
    "longrope": {"attention_factor", "factor", "original_max_position_embeddings"},
}


def rope(**change):
    return build({**FORMS["llama"], **change})[0].cfg.attention.rope


def module(name):
    cfg = build(FORMS["llama"])[0].cfg
    longest = 128 if name == "dynamic" else 64
    return Decoder(replace(cfg, max_length=longest, attention=replace(cfg.attention, rope=ROPES[name])))


def written(name):
    return families.writing(module(name)).fields(module(name))


def test_both_forms_are_read():
    assert rope() == Rope(10_000.0)
    assert rope(rope_theta=5e5) == Rope(5e5)
    assert rope(rope_parameters={"rope_type": "default", "rope_theta": 5e5}) == Rope(5e5)
    assert rope(rope_parameters={"rope_type": "default"}, rope_theta=5e5) == Rope(5e5)
    for kind in ("type", "rope_type"):
        assert rope(rope_theta=5e5, rope_scaling={kind: "linear", "factor": 2}) == ROPES["linear"]
    assert rope(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}) == ROPES["llama3"]
    assert rope(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}) == Rope(
        1e4, "yarn", 2.0, 64, 1.0, 32.0
    )


def test_the_original_length_may_stand_outside_as_in_phi_3():
    scaling = {"type": "longrope", **DIVISORS}
    found = rope(rope_theta=5e5, original_max_position_embeddings=16, rope_scaling=scaling)
    assert found == ROPES["longrope"]  # its factor is the ratio of the lengths
    close(magnitude(found), np.sqrt(1 + np.log(4) / np.log(16)), 1e-12)
    assert rope(rope_scaling={**scaling, "factor": 2.0}).original_length == 64  # as long as the context, if not given


def test_yarns_mscale_is_an_attention_factor_if_both_are_given():
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 16}
    both = rope(rope_parameters={**yarn, "mscale": 2.0, "mscale_all_dim": 0.5})
    close(both.attention_factor, (0.2 * np.log(4) + 1) / (0.05 * np.log(4) + 1), 1e-12)
    assert rope(rope_parameters={**yarn, "mscale": 2.0}).attention_factor == 0
    given = rope(rope_parameters={**yarn, "mscale": 2.0, "mscale_all_dim": 0.5, "attention_factor": 1.5})
    assert given.attention_factor == 1.5


def test_a_dynamic_model_reads_texts_as_long_as_its_factor_says():
    cfg = build(FORMS["llama-dynamic"])[0].cfg
    assert (cfg.max_length, cfg.attention.rope.original_length) == (64, 32)


@pytest.mark.parametrize("name", ROPES)
def test_both_forms_are_written_and_each_alone_says_all(name):
    data = written(name)
    assert build(data)[0] == module(name)
    later = {key: value for key, value in data.items() if key not in ("rope_theta", "rope_scaling")}
    former = {key: value for key, value in data.items() if key != "rope_parameters"}
    assert build(later)[0] == build(former)[0] == module(name)


@pytest.mark.parametrize("name", ROPES)
def test_transformers_4_finds_what_it_documents(name):
    data = json.loads(json.dumps(written(name)))
    cfg = ROPES[name]
    assert data["rope_theta"] == 5e5
    if name == "none":
        assert data["rope_scaling"] is None
        return
    kind, found = cfg.scaling, set(data["rope_scaling"])
    assert data["rope_scaling"]["rope_type"] == data["rope_scaling"]["type"] == kind
    assert NEEDED[kind] <= found - {"rope_type", "type"} <= NEEDED[kind] | KNOWN.get(kind, set())
    # dynamic stretches from max_position_embeddings, and longrope from a field outside
    assert data["max_position_embeddings"] == 64
    assert data.get("original_max_position_embeddings") == (16 if kind == "longrope" else None)
    if kind == "longrope":  # 4 takes the ratio of the lengths for the factor, 5 the factor
        close(data["rope_scaling"]["attention_factor"], magnitude(cfg), 1e-12)


def test_a_folder_names_the_dtype_as_both_do(tmp_path):
    model, _ = build(FORMS["llama"])
    pretrained.save(tmp_path / "folder", model, draw(model), dtype="bfloat16")
    data = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert data["dtype"] == data["torch_dtype"] == "bfloat16"


LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 16, **DIVISORS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 4.0}}, "contradict each other"),
        ({"rope_parameters": LINEAR, "rope_theta": 1e4}, "rope_theta 10000.0 contradicts 500000.0 in rope_parameters"),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "type is .linear."),
        ({"rope_parameters": LONG, "original_max_position_embeddings": 32}, "original_max_position_embeddings 32"),
        ({"rope_parameters": {**LONG, "short_factor": [1.0, "1.5"]}}, "short_factor .* is not a list of positive"),
        ({"rope_parameters": {**LONG, "long_factor": [1.0, 0.0]}}, "long_factor .* is not a list of positive"),
        ({"rope_parameters": {**LONG, "long_factor": [1.0]}}, "2 short_factors and 1 long_factors; heads of 4 need 2"),
        ({"rope_parameters": {**LONG, "attention_factor": 0.0}}, "the attention factor is 0.0"),
        ({"rope_parameters": {**LONG, "beta_fast": 32.0}}, "beta_fast .* is unknown"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}}, "only 64"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e30}}, "stretches 64 positions beyond"),
    ],
)
def test_what_contradicts_itself_or_is_out_of_range_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        build({**FORMS["llama"], **change})
    assert "\n" not in str(caught.value)
