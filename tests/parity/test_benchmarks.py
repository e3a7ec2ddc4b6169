"""Both sides of a benchmark compute the same: what is timed is the same work."""

import numpy as np
import pytest

from experiments.benchmarks import _families, _ours, _torch, decode
from tests.close import close

RATE = {"learning_rate": _families.LEARNING_RATE}


@pytest.mark.parametrize("name", _families.FAMILIES)
def test_the_first_steps_agree(name, tmp_path):
    given, family = _families.write(name, tmp_path, small=True), _families.FAMILIES[name]
    mine, _ = _ours.train(given["folder"], name, given["batch"], **RATE)
    theirs, turn = _torch.train(given["folder"], family.theirs, given["inputs"], **RATE)
    _families.check_losses(name, {"ours": mine["loss"], "theirs": theirs["loss"]})
    close(mine["grad_norm"], theirs["grad_norm"], 1e-3, scale=theirs["grad_norm"])
    assert mine["flops"] > 0 and turn()["loss"] != theirs["loss"]


@pytest.mark.parametrize("static", [False, True])
def test_both_sides_generate_the_same_tokens(static, tmp_path):
    decode.write(decode.debug(), tmp_path / "model")
    prompts = np.arange(8, dtype=np.int32).reshape(2, 4)
    np.save(tmp_path / "prompts.npy", prompts)
    given = (str(tmp_path / "model"), str(tmp_path / "prompts.npy"))
    mine, _ = _ours.decode(*given, new_tokens=6)
    theirs, turn = _torch.decode(*given, new_tokens=6, static=static)
    decode.agree(tmp_path / "model", prompts, mine["tokens"], theirs["tokens"], "theirs")
    assert np.shape(theirs["tokens"]) == (2, 6) and turn() == {"tokens": 6}


def test_both_sides_save_as_many_bytes_and_get_them_back(tmp_path):
    shapes = [[3, 4], [5]]
    mine, _ = _ours.save(str(tmp_path / "ours"), shapes, 0)
    theirs, turn = _torch.save(str(tmp_path / "theirs"), shapes, 0)
    assert mine["bytes"] == theirs["bytes"] == 4 * 17 and mine["same"] and theirs["same"]
    assert turn()["stall_s"] > 0 and not list((tmp_path / "theirs").iterdir())


def test_both_sides_start(tmp_path):
    given = _families.write("gpt2", tmp_path, small=True)
    theirs = _torch.first_step(given["folder"], "GPT2LMHeadModel", given["inputs"], import_s=0.5, **RATE)
    more = {"cache": str(tmp_path / "cache"), "import_s": 0.5}
    mine = _ours.first_step(given["folder"], "gpt2", given["batch"], **RATE, **more)
    _families.check_losses("gpt2", {"ours": mine["loss"], "theirs": theirs["loss"]})
    assert min(mine["compile_s"], mine["trace_s"], mine["lower_s"]) > 0 and theirs["import_s"] > 0.5
