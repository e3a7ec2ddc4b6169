import json

import pytest

from fm_jax.core.errors import CheckpointError, shown
from fm_jax.hub import bookkeeping
from fm_jax.hub.fields import Fields


def fields(**data):
    return Fields(data, "folder/config.json")


def refused(call, *said):
    with pytest.raises(CheckpointError) as error:
        call()
    text = str(error.value)
    assert text.startswith("folder/config.json")
    assert "\n" not in text
    for part in said:
        assert part in text, part
    return text


def test_a_config_whose_every_field_is_accounted_for_closes_in_silence():
    config = fields(model_type="gpt2", n_layer=2, scale=None, dtype="float32", is_decoder=False, act="gelu_new")
    assert config.take("n_layer", int) == 2
    assert config.choose("act", {"gelu_new": "gelu_tanh"}) == "gelu_tanh"
    config.expect("scale", True)
    config.close()


def test_a_field_that_nobody_read_is_named_with_its_value():
    text = refused(
        fields(n_layer=2, rope_scaling={"factor": 8.0}).close, "rope_scaling", '{"factor": 8.0}', "n_layer (2)"
    )
    assert "are unknown; ignore them only if they change no result" in text


def test_an_unknown_field_that_is_null_says_nothing():
    fields(rope_scaling=None).close()


def test_ignored_and_skipped_fields_are_accounted_for():
    config = fields(summary_type="cls", mystery=1)
    config.skip("summary_type")
    refused(config.close, "mystery")
    config.close(ignore=["mystery"])
    config.close(ignore=iter(["mystery"]))


def test_ignoring_does_not_excuse_a_value_that_is_not_supported():
    config = fields(scale=False)
    config.expect("scale", True)
    refused(lambda: config.close(ignore=["scale"]), "scale is false, but only true is supported")


@pytest.mark.parametrize("name", sorted(bookkeeping.ONLY))
def test_a_switch_that_changes_the_computation_is_refused_unless_a_family_reads_it(name):
    off = bookkeeping.ONLY[name]
    on = {bool: True, dict: {"0": [1]}, int: 7}[type(off)]
    fields(**{name: off}).close()
    refused(fields(**{name: on}).close, f"{name} is ")
    refused(lambda: fields(**{name: on}).close([name]), f"{name} is ")
    config = fields(**{name: on})
    assert config.take(name, type(on)) == on
    config.close()


def test_no_field_is_both_harmless_and_a_switch_and_none_stands_twice():
    names = [name for kind in bookkeeping.ANY for name in kind.names.split()]
    assert not bookkeeping.NAMES & bookkeeping.ONLY.keys()
    assert len(names) == len(bookkeeping.NAMES) and all(kind.why for kind in bookkeeping.ANY)


def test_all_problems_come_in_one_message():
    config = fields(scale=False, tie=3, mystery=[1], riddle="x", is_decoder=True)
    config.expect("scale", True)
    config.expect("tie", True, False)
    config.refuse("its windows do not fit")
    refused(
        config.close,
        "scale is false, but only true",
        "tie is 3, but only true or false is supported",
        "its windows do not fit",
        'mystery ([1]), riddle ("x") are unknown',
        "is_decoder is true, but only false",
    )


@pytest.mark.parametrize(("value", "kind", "found"), [(3, int, 3), (3, float, 3.0), (2.5, float, 2.5), ("a", str, "a")])
def test_a_field_is_taken_as_what_it_is_and_a_whole_number_for_a_float(value, kind, found):
    taken = fields(x=value).take("x", kind)
    assert taken == found
    assert type(taken) is kind


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("3", int),
        (3.0, int),
        (True, int),
        (True, float),
        (1, bool),
        ([1], dict),
        ({}, list),
        (3, str),
        ("x" * 999, float),
    ],
)
def test_a_field_of_another_type_is_refused_at_once(value, kind):
    text = refused(lambda: fields(x=value).take("x", kind, None), f"x is {shown(value)}, not {kind.__name__}")
    assert len(text) < 150


@pytest.mark.parametrize("data", [{}, {"x": None}])
def test_null_counts_as_absent(data):
    config = fields(**data)
    assert not config.has("x")
    assert config.take("x", int, 7) == 7
    refused(lambda: config.take("x", int), "x is missing")
    assert config.choose("x", {"a": 1}, "a") == 1
    refused(lambda: config.choose("x", {"a": 1}), "x is missing")
    config.expect("x", 1)
    config.close()


def test_a_default_may_be_none_or_zero_and_zero_is_not_absent():
    assert fields().take("x", int, None) is None
    assert fields(x=0).take("x", int, 5) == 0
    assert fields(x=False).take("x", bool, True) is False
    assert fields(x=0).has("x")


def test_a_word_that_is_not_supported_is_refused_with_those_that_are():
    refused(
        lambda: fields(act="mish").choose("act", {"gelu": 1, "relu": 2}), "act 'mish' is not supported", "gelu, relu"
    )
    refused(lambda: fields(act=["gelu"]).choose("act", {"gelu": 1}), "not str")


def test_a_whole_number_stands_for_the_float_that_is_expected():
    config = fields(embd_pdrop=0, factor=1)
    config.expect("embd_pdrop", 0.0)
    config.expect("factor", 1.0)
    config.close()


@pytest.mark.parametrize(
    ("value", "wanted"), [(1, True), (0, False), (True, 1), (True, 1.0), (1.0, 1), ("1", 1), ([], False)]
)
def test_an_expected_value_is_compared_with_its_type(value, wanted):
    config = fields(x=value)
    config.expect("x", wanted)
    refused(config.close, "x is ")


def test_a_long_value_is_cut_in_the_message():
    assert len(refused(fields(x=list(range(1000))).close, "x (")) < 250
    assert len(refused(fields(**{f"{i}" * 40: "y" * 999 for i in range(100)}).close, "80 more fields")) < 4000


def test_kind_and_architecture_are_words_even_where_the_file_has_none():
    config = fields(model_type="bert", architectures=["BertModel", "Other"])
    assert (config.kind, config.architecture) == ("bert", "BertModel")
    for data in ({}, {"architectures": []}, {"architectures": None}, {"architectures": "BertModel"}):
        assert fields(**data).architecture == ""
    assert fields().kind == ""
    config = fields(model_type=["bert"], architectures=[{"a": 1}, "x"])
    assert (config.kind, config.architecture) == ('["bert"]', '{"a": 1}')


@pytest.mark.parametrize(
    ("value", "good"), [([1, 2], True), ([], True), ([1, 2.0], False), ([1] * 4, False), (3, False)]
)
def test_a_list_is_of_one_type_and_not_endless(value, good):
    config = fields(x=value)
    if good:
        assert config.many("x", int, [7], longest=3) == value
    else:
        refused(lambda: config.many("x", int, [7], longest=3), "x ", "list")
    assert fields().many("x", int, [7]) == [7]


def test_a_file_is_read_and_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"n": 1, "ünïcode": "ß"}), "utf-8")
    config = Fields.open(tmp_path / "config.json")
    assert config.take("n", int) == 1
    with pytest.raises(CheckpointError, match=f"{tmp_path}/config.json is not supported: ünïcode"):
        config.close()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds a list, not a JSON object"),
        (b"3", "holds a int"),
        (b"null", "holds a NoneType"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "is not JSON"),
        (b'{"n_layer": 2, "n_layer": 3}', "'n_layer' occurs twice"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_its_name(tmp_path, content, said):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as error:
        Fields.open(tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(tmp_path, number):
    (tmp_path / "config.json").write_text(f'{{"epsilon": {number}}}')
    with pytest.raises(CheckpointError, match=f"config.json is not JSON: .*{number}"):
        Fields.open(tmp_path / "config.json")
    refused(lambda: fields(x=float(number)).take("x", float), "x is ")


def test_a_whole_number_that_no_float_can_hold_is_refused():
    refused(lambda: fields(x=10**400).take("x", float), "x is 1000", "not float")


@pytest.mark.parametrize(("name", "most"), [("num_layers", 2_000), ("vocab_size", 1 << 24)])
def test_a_size_that_no_model_has_is_refused_before_anything_is_made_of_it(name, most):
    assert fields(**{name: most}).take(name, int) == most
    assert fields(**{name: -1}).take(name, int) == -1
    for value in (most + 1, -2, 10**100):
        refused(
            lambda value=value: fields(**{name: value}).take(name, int),
            f"{name} is {shown(value)}, which is out of range (at most {most})",
        )
    refused(lambda: fields(**{name: 9}).take(name, int, most=8), "at most 8")


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no .*config\.json; a model folder holds config.json beside"):
        Fields.open(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, not a file"):
        Fields.open(tmp_path / "config.json")
