import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fm_jax.core import provenance
from fm_jax.core.errors import ResourceError


def test_the_record_is_json_and_names_versions_and_devices(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_FAKEFAKEFAKE")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    record = provenance.record(experiment="e", preset="p", config={"a": 1}, argv=["--a", "1"], source=tmp_path)
    text = json.dumps(record)
    assert "FAKE" not in text
    assert record["environment"]["NCCL_DEBUG"] == "INFO"
    assert record["versions"]["jax"] == jax.__version__
    assert record["versions"]["numpy"] == np.__version__
    assert record["devices"] == {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "processes": 1,
    }


def test_fingerprint_ignores_order_and_nothing_else() -> None:
    one = provenance.fingerprint({"a": 1, "b": {"c": 0.1, "d": None}})
    assert one == provenance.fingerprint({"b": {"d": None, "c": 0.1}, "a": 1})
    assert one != provenance.fingerprint({"a": 1, "b": {"c": 0.1 + 2**-55, "d": None}})


def test_git_tells_revision_and_changes(tmp_path: Path) -> None:
    assert provenance.git(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init")
    (tmp_path / "f.py").write_text("a")
    git("add", ".")
    git("commit", "-m", "a")
    assert provenance.git(tmp_path / "f.py") == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "f.py").write_text("b")
    assert provenance.git(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": True}


def test_no_device_is_a_lack_of_resources(monkeypatch: Any) -> None:
    def fail() -> None:
        raise RuntimeError("Unable to initialize backend 'cuda'\nmore\nlines")

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(ResourceError, match=r"^no device to run on: Unable to initialize backend 'cuda'$"):
        provenance.devices()
