import json
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.hub import download, preprocessing

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = "model.safetensors.index.json"
FILES = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "README.md", "modeling.py"]


def http(kind):
    """An error as the library makes it, whatever its version wants to be given."""
    error = kind.__new__(kind)
    OSError.__init__(error, "the server said so")
    return error


@pytest.fixture
def hub(monkeypatch, tmp_path):
    state = SimpleNamespace(files=FILES, asked=[], fetched=[], error=None, cached={COMMIT, "main"}, listed={})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def model_info(self, name, *, revision=None):
        state.asked.append((name, revision))
        if state.error:
            raise state.error
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in state.files])

    def snapshot(name, *, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only and (revision or "main") not in state.cached:
            raise errors.LocalEntryNotFoundError("not there")
        state.fetched.append((name, revision, allow_patterns))
        folder = tmp_path / COMMIT
        folder.mkdir(exist_ok=True)
        if INDEX in (allow_patterns or ()):
            (folder / INDEX).write_text(json.dumps({"weight_map": state.listed}))
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return state


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/3"])
def test_a_branch_is_resolved_to_a_commit_that_is_fetched_and_printed(hub, tmp_path, capsys, revision):
    assert download.fetch("owner/name", revision) == tmp_path / COMMIT
    assert hub.asked == [("owner/name", revision)]
    assert hub.fetched == [("owner/name", COMMIT, ["config.json", "tokenizer.json", "model.safetensors"])]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"owner/name: {revision or 'main'} is commit {COMMIT}; give it as revision to repeat this\n"


def test_shards_of_any_name_are_fetched_as_the_index_names_them(hub):
    shards = ["model-00001-of-000002.safetensors", "second.safetensors"]
    hub.files = ["config.json", INDEX, *shards, "model-00003-of-00003.safetensors"]
    hub.listed = {"a": shards[1], "b": shards[0], "c": shards[1]}
    download.fetch("owner/name")
    assert [what for _, _, what in hub.fetched] == [[INDEX], ["config.json", INDEX, *shards]]
    assert {commit for _, commit, _ in hub.fetched} == {COMMIT}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("third.safetensors", "names third.safetensors, which the checkpoint lacks"),
        ("../up.safetensors", "which is not a file beside it"),
        ("sub/model.safetensors", "which is not a file beside it"),
        ("*.safetensors", "which is not a file beside it"),
        (7, "which is not a file beside it"),
    ],
)
def test_an_index_that_names_what_is_no_file_beside_it_is_refused(hub, name, said):
    hub.files, hub.listed = ["config.json", INDEX, "sub/model.safetensors"], {"a": name}
    with pytest.raises(CheckpointError, match=re.escape(said)):
        download.fetch("owner/name")
    assert [what for _, _, what in hub.fetched] == [[INDEX]]


def test_what_a_model_wants_to_see_of_an_image_is_fetched_too(hub):
    hub.files = [*FILES, preprocessing.FILE]
    download.fetch("owner/name")
    assert preprocessing.FILE in hub.fetched[0][2]


def test_a_commit_is_nothing_to_be_told(hub, capsys):
    download.fetch("gpt2", COMMIT)
    assert hub.fetched[0][1] == COMMIT
    assert capsys.readouterr().err == ""


def chosen(files, shards=()):
    return download.chosen("x", files, lambda index, kind: shards)


def test_only_one_set_of_weights_and_no_pickle_nor_code_is_chosen():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    flax = ["flax_model.msgpack", "config.json", "vocab.txt", "merges.txt"]
    other = [
        "pytorch_model.bin.index.json",
        "onnx/model.onnx",
        "sub/model.safetensors",
        "run.py",
        "tf_model.h5",
        "spiece.model",
        "training_args.bin",
        "a*.json",
        "../up.json",
    ]
    texts = ["config.json", "merges.txt", "vocab.txt"]
    assert chosen([*shards, *flax, *other], shards[:2]) == [*texts, shards[2], *shards[:2]]
    assert chosen([*shards, *flax, *other, "model.safetensors"]) == [*texts, "model.safetensors"]
    assert chosen([*flax, *other]) == [*texts, "flax_model.msgpack"]
    sharded = ["flax_model.msgpack.index.json", "flax_model-00001-of-00001.msgpack"]
    assert chosen([*sharded, *other], sharded[1:]) == sharded
    assert chosen(["chat_template.jinja", "model.safetensors"]) == ["chat_template.jinja", "model.safetensors"]


def test_every_chosen_name_means_itself_as_a_pattern():
    names = chosen(["config.json", "model.safetensors", "a[b].json", "?.json"])
    assert not any(re.search(r"[*?\[]", name) for name in names)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["config.json", "pytorch_model.bin"],
            r"only as pickles \(pytorch_model.bin\), which can run code: nothing was downloaded.*save_pretr",
        ),
        (["config.json", "tf_model.h5"], "has no model.safetensors; it has config.json, tf_model.h5"),
        (
            ["README.md", "a.Q4_0.gguf"],
            "it has README.md, a.Q4_0.gguf; download one of its GGUF files and give its path",
        ),
        ([], "it has no files"),
    ],
)
def test_a_checkpoint_without_safe_weights_is_told_before_anything_is_fetched(hub, files, said):
    hub.files = files
    with pytest.raises(CheckpointError, match=said):
        download.fetch("owner/name")
    assert not hub.fetched


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (http(errors.GatedRepoError), "owner/name at v1 is gated: request access"),
        (http(errors.RepositoryNotFoundError), "there is no public checkpoint owner/name at v1; correct the name"),
        (http(errors.RevisionNotFoundError), "there is no such commit, branch or tag"),
        (http(errors.HfHubHTTPError), "could not be downloaded.*the server said so"),
        (errors.LocalEntryNotFoundError("gone"), "could not be downloaded"),
        (ConnectionError("no\n route to host"), "no route to host.*check the network.*HF_HUB_OFFLINE=1"),
        (TimeoutError(), "TimeoutError"),
        (RuntimeError("anything " * 100), "RuntimeError"),
    ],
)
def test_every_failure_is_one_line_that_says_what_to_do(hub, error, said):
    hub.error = error
    with pytest.raises(CheckpointError, match=said) as raised:
        download.fetch("owner/name", "v1")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 450


def test_an_interrupt_stays_one(hub):
    hub.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        download.fetch("owner/name")


def test_offline_takes_what_the_cache_has_and_asks_nobody(hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download.fetch("owner/name") == tmp_path / COMMIT
    assert not hub.asked
    assert COMMIT in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="owner/name at v2 is not in the cache and HF_HUB_OFFLINE"):
        download.fetch("owner/name", "v2")


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "../x", "/etc", "a b", "a/", "https://x/y", "a/..", "a--b", "a\n", "x" * 97]
)
def test_what_cannot_be_a_name_is_refused_before_the_library_sees_it(hub, name):
    with pytest.raises(ConfigError, match="not a checkpoint name"):
        download.fetch(name)
    assert not hub.asked


@pytest.mark.parametrize("revision", ["", "../main", "a b", "-x", "a\n"])
def test_what_cannot_be_a_revision_is_refused_before_the_library_sees_it(hub, revision):
    with pytest.raises(ConfigError, match="not a revision"):
        download.fetch("owner/name", revision)
    assert not hub.asked


def test_the_real_library_reads_its_cache_offline_and_the_snapshot_opens(monkeypatch, tmp_path):
    import numpy as np

    from fm_jax.hub.files import safetensors, stored
    from fm_jax.hub.files.weights import Spec

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--owner--name"
    blobs, snapshot = root / "blobs", root / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    safetensors.write(blobs, {"a": Spec("float32", (2,))}, [("a", np.ones(2, np.float32))])
    (blobs / "model.safetensors").rename(blobs / "beef")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/beef"))
    (snapshot / "config.json").write_text(json.dumps({}))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    folder = download.fetch("owner/name")
    assert folder.name == COMMIT
    assert stored.open_weights(folder).read("a", (slice(0, 2),)).sum() == 2
    with pytest.raises(CheckpointError, match="not in the cache"):
        download.fetch("owner/other")
