import io
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, ResourceError
from fm_jax.train.log import Console, JsonLines, Tee, TensorBoard, curves, read, writers


def write(path: Path, steps: range, resume_step: int | None = None) -> None:
    log = JsonLines(path, resume_step=resume_step)
    for step in steps:
        log.write(step, {"train/loss": 1.0 / step})
    log.close()


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read(path)]


def test_floats_are_exact_and_every_line_is_strict_json(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": float(np.float32(1 / 3)), "c": 5e-324, "d": math.nan, "e": -math.inf, "f": 3}
    log, begun = JsonLines(tmp_path / "new" / "m.jsonl"), time.time()
    log.write(7, values)
    (line,) = read(tmp_path / "new" / "m.jsonl")  # readable before it is closed
    log.close()
    assert line.pop("step") == 7
    assert begun - 0.001 <= line.pop("time") <= time.time() + 0.001  # it is rounded to a millisecond
    np.testing.assert_array_equal(list(line.values()), list(values.values()))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    json.loads((tmp_path / "new" / "m.jsonl").read_text(), parse_constant=refuse)


def test_curves_are_read_back_by_their_titles(tmp_path: Path) -> None:
    writer = JsonLines(tmp_path / "metrics.jsonl")
    writer.write(1, {"train/nll": 3.0})
    writer.write(2, {"train/nll": 2.5, "validation/nll": 2.75})
    writer.close()
    found = curves(tmp_path / "metrics.jsonl", {"training": "train/nll", "held out": "validation/nll", "none": "x"})
    assert found == {"training": ([1, 2], [3.0, 2.5]), "held out": ([2], [2.75])}


def test_takes_jax_scalars(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m")
    log.write(1, {"loss": jax.numpy.float32(0.5)})  # type: ignore[dict-item]
    assert read(tmp_path / "m")[0]["loss"] == 0.5


@pytest.mark.parametrize("name", ["step", "time"])
def test_a_metric_cannot_take_the_name_of_a_column(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"may not be called {name}"):
        JsonLines(tmp_path / "m").write(1, {name: 0.0})


def test_a_resumed_file_reads_as_one_run_and_nothing_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, removed = tmp_path / "m.jsonl", tmp_path / "m.jsonl.removed"
    write(path, range(1, 8))
    first = path.read_text().splitlines()
    write(path, range(5, 10), resume_step=4)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert removed.read_text().splitlines() == first[4:]
    second = path.read_text().splitlines()
    write(path, range(1, 3), resume_step=0)
    assert steps_of(path) == [1, 2]
    assert removed.read_text().splitlines() == first[4:] + second
    assert "moved 9 lines after step 0 to m.jsonl.removed" in caplog.text


def test_many_kills_do_not_multiply_the_file(tmp_path: Path) -> None:
    path, removed = tmp_path / "m.jsonl", tmp_path / "m.jsonl.removed"
    write(path, range(1, 1001))
    for kill in range(20):
        write(path, range(1001 + kill, 1003 + kill), resume_step=1000 + kill)  # one step is saved, one is not
    assert steps_of(path) == list(range(1, 1022))
    assert steps_of(removed) == list(range(1002, 1021))  # each line once, in one of the two files
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("written", [0, 1, 40])
def test_a_kill_while_lines_are_moved_loses_none(tmp_path: Path, monkeypatch: Any, written: int) -> None:
    """The append is cut off after some bytes (0: just before the log is replaced), and the run is started again."""
    path, removed = tmp_path / "m.jsonl", tmp_path / "m.jsonl.removed"
    write(path, range(1, 8))
    lines = path.read_text().splitlines()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fm_jax.train.log.write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        write(path, range(5, 7), resume_step=4)
    assert path.read_text().splitlines() == lines
    monkeypatch.undo()
    if written:
        removed.write_bytes(removed.read_bytes()[:written])
    write(path, range(5, 7), resume_step=4)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    assert [line for line in removed.read_text().splitlines() if line in lines] == lines[4:]


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/m\.jsonl cannot be written: "):
        write(tmp_path / "file" / "m.jsonl", range(1, 2))
    log = JsonLines(tmp_path / "m.jsonl")
    log.write(1, {"x": 0.0})
    assert log._file is not None
    os.dup2(os.open("/dev/full", os.O_WRONLY), log._file.fileno())
    with pytest.raises(ResourceError, match=r"/m\.jsonl cannot be written: No space left on device; free space"):
        log.write(2, {"x": 0.0})
    assert steps_of(tmp_path / "m.jsonl") == [1]


def test_a_clean_resume_makes_no_copy(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 5))
    write(path, range(5, 7), resume_step=4)
    write(path, range(7, 8))
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}\n{', b"[1]\n", b"\0\0\0", b'{"step": 3, "\xc3'])
@pytest.mark.parametrize("resume_step", [None, 3])
def test_a_line_torn_by_a_crash_does_not_spoil_the_next(tmp_path: Path, torn: bytes, resume_step: int | None) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 3))
    path.write_bytes(path.read_bytes() + torn)
    write(path, range(4, 5), resume_step=resume_step)
    assert [step for step in steps_of(path) if step != 3] == [1, 2, 4]
    lost = (tmp_path / "m.jsonl.removed").read_bytes()
    assert torn.split(b"\n")[-1] in lost and (torn.split(b"\n")[0] in lost or 3 in steps_of(path))
    for line in path.read_text().splitlines():
        json.loads(line)


def test_the_directory_is_untouched_until_the_first_write_and_by_other_processes(
    tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5))
    before = path.read_text()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = writers(tmp_path, step=2, num_steps=9, tensorboard=True)
    log.write(3, {"train/loss": 1.0})
    log.close()
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tee_writes_everywhere(tmp_path: Path) -> None:
    tee = Tee([JsonLines(tmp_path / "a"), JsonLines(tmp_path / "b")])
    tee.write(1, {"x": 2.0})
    tee.close()
    assert [line["x"] for name in "ab" for line in read(tmp_path / name)] == [2.0, 2.0]


def test_a_place_for_tensorboard_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/tensorboard cannot be written: "):
        TensorBoard(tmp_path / "file" / "tensorboard").write(1, {"x": 0.0})


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    log = TensorBoard(tmp_path / "tb")
    log.write(1, {"train/loss": 0.25})
    log.write(2, {"train/loss": 0.125})
    log.close()
    (file,) = (tmp_path / "tb").iterdir()
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401  (proves that the package is the real one)
    from tensorboardX.proto.event_pb2 import Event

    data, seen = file.read_bytes(), []
    while data:  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        seen += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    assert seen == [(1, "train/loss", 0.25), (2, "train/loss", 0.125)]


def test_tensorboard_without_the_package_is_said_at_the_start(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match="tensorboardX"):
        TensorBoard(tmp_path)


class Clock:
    def __init__(self, monkeypatch: Any) -> None:
        self.now = 0.0
        monkeypatch.setattr("fm_jax.train.log.time.monotonic", lambda: self.now)


def test_plain_lines_come_now_and_then_with_the_time_left(monkeypatch: Any) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    console = Console(100, every_seconds=10, file=out)
    for step in range(1, 101):
        clock.now += 2.0
        console.write(step, {"train/loss": 1.0 / step, "rate/tokens_per_second": 12345.0})
        if step == 50:
            console.write(step, {"eval/loss": 0.5})
    console.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 1/100  train/loss 1  rate/tokens_per_second 1.234e+04"
    assert lines[1] == "step 6/100  train/loss 0.1667  rate/tokens_per_second 1.234e+04  left 0:03:08"
    assert "step 50/100  eval/loss 0.5" in lines
    assert lines[-1].startswith("step 100/100")
    assert lines[-1].endswith("left 0:00:00")
    assert len(lines) == 22  # every fifth from 1 to 96, the evaluation, the last


def test_a_terminal_gets_a_bar_and_evaluations_above_it() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    console = Console(10, file=out)
    console.write(4, {"train/loss": 0.25})
    console.write(4, {"eval/[x]": 0.5})
    console.close()
    assert "4/10" in out.getvalue()
    assert "train/loss 0.25" in out.getvalue()
    assert "step 4  eval/[x] 0.5" in out.getvalue()
