"""Download a public checkpoint by name: only tensors, JSON and vocabularies, of one commit.

Nothing is downloaded unless a name is given; a second download of the same commit comes from the cache on disk.
"""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.hub.files.stored import KINDS, Kind, listing

_NAME = re.compile(r"(?!.*(?:\.\.|--))\w[\w.\-]{0,95}(?:/\w[\w.\-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)\w[\w.\-/]{0,127}", re.ASCII)
_TEXTS = re.compile(r"(?!.*index\.json$)[\w.\-]+\.json|chat_template\.jinja|merges\.txt|vocab\.txt", re.ASCII)
_LOCAL = "or give the path of a local folder"


def fetch(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a public checkpoint; download it if it is not in the cache.

    The commit of a branch or tag is printed; give it as `revision` to repeat the run.

    Args:
        name: the checkpoint's OWNER/NAME.
        revision: commit, branch or tag; None is the branch "main".

    Raises:
        ConfigError: `name` or `revision` is malformed.
        CheckpointError: no such checkpoint, no permission to read it, no network, or its only weights are pickles.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a checkpoint name; give OWNER/NAME, {_LOCAL}")
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ConfigError(f"{revision!r} is not a revision; give a commit, a branch or a tag")
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    what = name if revision is None else f"{name} at {revision}"
    if constants.HF_HUB_OFFLINE:
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, FileNotFoundError):
            raise CheckpointError(
                f"{what} is not in the cache and HF_HUB_OFFLINE forbids downloading it; unset HF_HUB_OFFLINE, {_LOCAL}"
            ) from None
        return _told(name, revision, folder.name, folder)
    try:
        info = HfApi().model_info(name, revision=revision)

        def shards(index: str, kind: Kind) -> Iterable[str]:
            """Download an index and return the names in it."""
            beside = Path(snapshot_download(name, revision=info.sha, allow_patterns=[index]))
            return listing(beside / index, kind).values()

        files = chosen(what, [file.rfilename for file in info.siblings or ()], shards)
        folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=files))
    except (CheckpointError, KeyboardInterrupt):
        raise
    except Exception as error:  # errors of huggingface_hub, of its HTTP library and of the operating system
        raise _failure(what, error) from error
    return _told(name, revision, str(info.sha), folder)


def chosen(what: str, files: Iterable[str], shards: Callable[[str, Kind], Iterable[str]]) -> list[str]:
    """Return the files to download: one set of weights, and the JSON and vocabulary files beside it.

    Args:
        what: names the checkpoint in messages.
        files: all files of the checkpoint.
        shards: (index, its kind) -> the files that the index names.

    Raises:
        CheckpointError: there are no weights, or only pickles, or an index names a file that is not there.
    """
    top = sorted(name for name in files if "/" not in name)
    texts = [name for name in top if _TEXTS.fullmatch(name)]
    for kind in KINDS:
        index = f"{kind.single}.index.json"
        if kind.single in top:
            return [*texts, kind.single]
        if index in top:
            named = sorted(set(shards(index, kind)))
            if missing := [name for name in named if name not in top]:
                raise CheckpointError(f"{what}: {index} names {', '.join(missing[:5])}, which the checkpoint lacks")
            return [*texts, index, *named]
    pickles = [name for name in top if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles:
        raise CheckpointError(
            f"{what} has its weights only as pickles ({', '.join(pickles[:5])}), which can run code: nothing was "
            "downloaded; if you trust it, convert it with transformers' save_pretrained and give that folder"
        )
    hint = "; download one of its GGUF files and give its path" if any(name.endswith(".gguf") for name in top) else ""
    raise CheckpointError(f"{what} has no {KINDS[0].single}; it has {', '.join(top[:10]) or 'no files'}{hint}")


def _told(name: str, revision: str | None, commit: str, folder: Path) -> Path:
    """Print the commit, unless it was given as the revision."""
    if commit != revision:
        print(f"{name}: {revision or 'main'} is commit {commit}; give it as revision to repeat this", file=sys.stderr)
    return folder


def _failure(what: str, error: Exception) -> CheckpointError:
    """Return an error of one line for an exception of huggingface_hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(f"{what} is gated: request access on its page and log in with huggingface_hub, {_LOCAL}")
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{what}: there is no such commit, branch or tag; leave out the revision to use main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"there is no public checkpoint {what}; correct the name, log in if it is private, {_LOCAL}"
        )
    reason = " ".join(str(error).split())[:160]
    return CheckpointError(
        f"{what} could not be downloaded ({type(error).__name__}: {reason}); check the network and try again, set "
        f"HF_HUB_OFFLINE=1 to use the cache, {_LOCAL}"
    )
