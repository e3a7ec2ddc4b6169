"""Checkpoints are taken over as they lie in their package."""

import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.packages import checkpoints


def put(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_json", ".json").replace("_gguf", ".gguf")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"toy": root}


def test_the_folder_with_the_config_moves_with_its_subfolders(tmp_path):
    (tmp_path / "out").mkdir()
    packages = put(tmp_path / "in", toy__model__config_json="{}", toy__model__1_Pooling__config_json="[]", other="x")
    (tmp_path / "in/toy/model/data_config.json").write_text("of the training")
    assert checkpoints.folder(packages, tmp_path / "out") == {"files": 2}
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.json"))
    assert found == ["1_Pooling/config.json", "config.json"]


def test_one_gguf_file_moves(tmp_path):
    (tmp_path / "out").mkdir()
    assert checkpoints.gguf(put(tmp_path / "in", deep__a_gguf="GGUF"), tmp_path / "out") == {"files": 1}
    assert (tmp_path / "out/a.gguf").read_text() == "GGUF"


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has no config\.json"):
        checkpoints.folder(put(tmp_path / "in", other="x"), tmp_path)
    with pytest.raises(DataError, match=r"has 0 \.gguf files"):
        checkpoints.gguf(put(tmp_path / "in", other="x"), tmp_path)
