import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.stream import loader
from fm_jax.data.text import layout, records
from fm_jax.data.text.corpus import Corpus


@pytest.fixture
def written(small: Corpus, tmp_path: Path) -> records.RecordBlocks:
    return records.write(small.tokens("test"), tmp_path / "test", length=48, per_file=100)


def test_they_are_the_blocks_of_the_stream(written: records.RecordBlocks, small: Corpus) -> None:
    wanted = layout.Blocks(small.tokens("test"), 48)
    assert len(written) == len(wanted) > 200 and written.fingerprint == wanted.fingerprint
    assert written.num_bytes == small.tokens("test").num_bytes
    for index in (0, 1, 99, 100, 101, len(wanted) - 1):
        assert all((written[index][name] == value).all() for name, value in wanted[index].items())


def test_they_pickle_after_use(written: records.RecordBlocks) -> None:
    first = written[3]
    again = pickle.loads(pickle.dumps(written))  # noqa: S301  (pickled in the same expression)
    assert (again[3]["tokens"] == first["tokens"]).all()


def test_a_flipped_bit_is_named_with_its_row(written: records.RecordBlocks, tmp_path: Path) -> None:
    file = tmp_path / "test" / "blocks-00000.array_record"
    data = bytearray(file.read_bytes())
    for position in range(2000, 2100):
        data[position] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"blocks of .*test: row \d+: "):
        for batch in loader.Epoch(records.load(tmp_path / "test"), 16):
            assert np.isfinite(batch["weights"]).all()


def test_a_missing_file_and_a_wrong_index_are_named(
    written: records.RecordBlocks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "test"
    told = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(told | {"num_records": 5}))
    with pytest.raises(DataError, match=r"index.json is damaged: its content differs from its seal"):
        records.load(folder)
    plain = {name: value for name, value in told.items() if name not in ("seal", "digests")}
    (folder / "index.json").write_text(json.dumps(plain))
    assert records.load(folder).fingerprint == written.fingerprint
    assert "was written without a seal" in caplog.text
    (folder / "index.json").write_text(json.dumps(plain | {"num_records": 5}))
    with pytest.raises(DataError, match=rf"has {told['num_records']} records, but index.json lists 5"):
        records.load(folder)
    for wrong in ({"length": "48"}, {"files": ["../x"]}, {"dtype": "<f4"}, {"length": 0}, {"more": 1}):
        (folder / "index.json").write_text(json.dumps(plain | wrong))
        with pytest.raises(DataError, match=r"index.json is damaged: it is not an index of token records"):
            records.load(folder)
    (folder / "index.json").write_text(json.dumps(plain))
    (folder / "blocks-00001.array_record").unlink()
    with pytest.raises(DataError, match=r"is missing blocks-00001.array_record"):
        records.load(folder)
    (folder / "index.json").write_text("[]")
    with pytest.raises(DataError, match=r"index.json is damaged: it holds list, not an object"):
        records.load(folder)
    with pytest.raises(DataError, match=r"has no index.json"):
        records.load(tmp_path)


def test_a_folder_that_is_there_is_not_overwritten(
    written: records.RecordBlocks, small: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="exists; remove it first"):
        records.write(small.tokens("test"), tmp_path / "test", length=8)
