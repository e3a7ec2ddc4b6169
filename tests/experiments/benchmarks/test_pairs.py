"""Sides take turns there and back; a ratio above 1 means that ours is faster; a busy machine gives no ratio."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

from experiments.benchmarks import _families, _ours, _pairs, decode
from experiments.benchmarks._pairs import Measured, Plan
from experiments.benchmarks._sides import Side, Start, Turn
from fm_jax.core.errors import ConfigError, NumericError, ResourceError
from tests.close import close

OURS = [Turn(wall, wall, 0.5, 7, {}) for wall in (1.0, 2.0, 3.0, 4.0, 5.0)]
PEER = [Turn(2 * turn.wall, 3 * turn.wall, 0.0, 9, {}) for turn in OURS]


def measured(others):
    return Measured({"ours": OURS, "eager": PEER}, others, 1.0, 2.0)


def test_the_order_is_reversed_in_every_second_pair(monkeypatch):
    monkeypatch.setattr(_pairs, "PAUSE", 0.0)
    order = []

    def side(name):
        def turn():
            order.append(name)
            return Turn(0.1, 0.1, 0.0, 0, {})

        return turn

    taken = _pairs.interleave({name: side(name) for name in "abc"}, 3, (0,))
    assert "".join(order) == "abccbaabc" and {name: len(turns) for name, turns in taken.turns.items()} == {
        "a": 3,
        "b": 3,
        "c": 3,
    }


def test_a_row_has_the_medians_and_the_ratios_of_neighbours():
    row = _pairs.row(Plan(), "gpt2", "eager", measured(0.01), ("ours", "eager"), bound=1.5)
    assert not row["busy"]
    close([row["ours"], row["peer"], row["ratio"], row["bound_fraction"]], [3.0, 6.0, 2.0, 0.5])
    close(row["ours_quartiles"], (2.0, 4.0))
    close([row["ours_cpu"], row["peer_cpu"]], [3.5, 9.0])
    close(row["cpu_ratio"], 9.0 / 3.5, 1e-4)
    assert (row["ours_faults"], row["peer_faults"]) == (7, 9)
    alone = _pairs.row(Plan(), "start", "nothing", measured(0.01), ("ours", None))
    assert alone["ours"] == 3.0 and alone["ratio"] is None and "peer_cpu" not in alone


def test_a_busy_machine_gives_no_ratio_unless_that_is_asked_for():
    hidden = _pairs.row(Plan(), "gpt2", "eager", measured(0.2), ("ours", "eager"), bound=1.5)
    assert hidden["busy"] and hidden["others"] == 0.2 and hidden["ours_cpu"] == 3.5
    assert [hidden[name] for name in ("ours", "peer", "ratio", "bound_fraction")] == [None] * 4
    marked = _pairs.row(Plan(allow_busy=True), "gpt2", "eager", measured(0.2), ("ours", "eager"))
    assert marked["busy"] and marked["ratio"] == 2.0
    assert _pairs.row(Plan(), "gpt2", "eager", None, ("ours", "eager"))["busy"]


@pytest.mark.parametrize(("others", "allowed", "lines"), [(0.01, False, 1), (0.2, False, 0), (0.2, True, 1)])
def test_the_history_gets_no_busy_line_unless_it_is_marked(others, allowed, lines, tmp_path, capsys):
    plan = Plan(history=tmp_path / "history.jsonl", allow_busy=allowed)
    row = _pairs.row(plan, "gpt2", "eager", measured(others), ("ours", "eager"))
    _pairs.finish(plan, tmp_path, "benchmarks.toy", [row], skipped=["gpt2 compiled: slow"])
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["ratio"] == row["ratio"]
    said = capsys.readouterr().out
    assert ("busy: other processes" in said) == (others > 0.1) and "skipped: gpt2 compiled: slow" in said
    written = plan.history.read_text().splitlines() if plan.history.exists() else []
    assert len(written) == lines
    for line in written:
        assert ("gpt2/eager/busy" in json.loads(line)["numbers"]) == allowed


def test_a_side_prepares_once_and_takes_turns(tmp_path):
    with Side("read", Start("_memory", "bandwidth", {"megabytes": 4}), (0,), tmp_path / "log") as side:
        assert side.facts == {"bytes": 4_000_000, "sum": 250_000.0}
        turns = [side.turn() for _ in range(2)]
    assert all(turn.found == side.facts and 0 < turn.wall < 60 and turn.cpu >= 0 for turn in turns)


def test_a_side_that_ends_says_why(tmp_path):
    with pytest.raises(ResourceError, match=r"torch ended with status 1: TypeError: .*unexpected"):
        Side("torch", Start("_torch", "save", {"unexpected": 1}), (0,), tmp_path / "log")


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_one_line_names_what_brings_it(tmp_path):
    with pytest.raises(
        ConfigError, match=r"torch cannot be measured: No module named 'torch'; install .*\.\[benchmarks"
    ):
        Side("torch", Start("_torch", "save", {"folder": "x", "shapes": [], "seed": 0}), (0,), tmp_path / "log")


def test_a_missing_library_is_named_before_anything_is_prepared(monkeypatch):
    monkeypatch.setattr(_pairs, "find_spec", lambda name: None)
    plan = Plan(threads=1, history=None)
    _pairs.check(plan, ["again"])
    with pytest.raises(
        ConfigError, match=r"^eager cannot be measured without torch and transformers; install .*\.\[bench"
    ):
        _pairs.check(plan, ["again", "eager"])


def test_other_losses_are_refused():
    _families.check_losses("gpt2", {"ours": 9.0, "eager": 9.00009})
    for other in (9.0002, float("nan")):
        with pytest.raises(NumericError, match=r"gpt2: .*9\.000000 in ours.*eager"):
            _families.check_losses("gpt2", {"ours": 9.0, "eager": other})


PROMPTS, TOKENS = np.array([[1, 2, 3, 4]]), [[5, 6, 7]]


def test_the_same_tokens_open_no_model(tmp_path):
    decode.agree(tmp_path / "nothing", PROMPTS, TOKENS, TOKENS, "dynamic")
    with pytest.raises(NumericError, match=r"dynamic gave tokens \[1, 2\] where ours gave \[1, 3\]"):
        decode.agree(tmp_path / "nothing", PROMPTS, TOKENS, [[5, 6]], "dynamic")


@pytest.mark.slow
def test_other_tokens_are_refused_unless_they_tie(tmp_path, monkeypatch):
    decode.write(decode.debug(), tmp_path / "model")
    with pytest.raises(NumericError, match=r"row 0 differs from ours at new token 1: 9 instead of 6"):
        decode.agree(tmp_path / "model", PROMPTS, TOKENS, [[5, 9, 7]], "dynamic")
    monkeypatch.setattr(decode, "_TIE", 100.0)
    decode.agree(tmp_path / "model", PROMPTS, TOKENS, [[5, 9, 7]], "dynamic")


def test_a_span_inside_another_counts_once():
    close(_ours.union([(0.0, 2.0), (0.5, 1.0), (1.5, 3.0), (5.0, 6.0)]), 4.0)
    assert _ours.union([]) == 0
