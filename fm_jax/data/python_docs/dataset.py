"""The running Python's own documentation as a tensorflow-datasets builder: ArrayRecord files, without TensorFlow.

The corpus has two forms with the same split by module: "modules" (one record per module or reference topic, for
pretraining) and "docstrings" (one masked docstring with its package as the label; see `masking`).

Importing this module imports tensorflow-datasets (about a second): import it where it is used.
"""

import contextlib
import dataclasses
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tensorflow_datasets as tfds
from etils import epath

from fm_jax.core.errors import DataError
from fm_jax.data import files
from fm_jax.data.python_docs import library, masking

Content = Literal["modules", "docstrings"]


@dataclasses.dataclass(kw_only=True)
class Config(tfds.core.BuilderConfig):
    """Form and packages; the name contains a fingerprint of the sources, so each Python has its own data set."""

    content: Content = "modules"
    only: tuple[str, ...] = ()  # top-level packages and modules; empty: all


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """Docstrings, comments and reference topics of the running Python, split by module."""

    VERSION = tfds.core.Version("1.0.0")  # raise it when the extraction changes
    # TFDS 4.9.10 finds this path with importlib_resources, which it does not declare as a dependency.
    code_path = epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        if self.builder_config.content == "modules":
            kind = tfds.features.ClassLabel(names=["module", "topic"])
            features = {"text": text, "module": text, "package": text, "kind": kind}
        else:
            label = tfds.features.ClassLabel(names=list(masking.CLASSES))
            features = {"text": text, "module": text, "label": label}
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            license="Python Software Foundation License",
            disable_shuffling=True,  # records stay in the order of module names: the same files from the same sources
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        modules = library.read(self.builder_config.only)
        examples = list(_texts(modules) if self.builder_config.content == "modules" else _labelled(modules))
        rows = {split: [row for where, row in examples if where == split] for split in library.SPLITS}
        return {split: self._generate_examples(mine) for split, mine in rows.items() if mine}

    def _generate_examples(self, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(rows)


def build(data_dir: Path, content: Content = "modules", *, only: Sequence[str] = ()) -> PythonDocs:
    """Return the builder of this Python's corpus under `data_dir`; prepare it first if missing.

    Several processes may call this at once.

    Raises:
        DataError: the Python has no sources, or the folder cannot be written.
        ResourceError: no space, or a limit of the system.
    """
    name = f"{content}-{library.fingerprint(tuple(only))}"
    config = Config(name=name, description=f"CPython {name}", content=content, only=tuple(only))
    failed: Exception | None = None
    with _quiet():
        builder = PythonDocs(config=config, data_dir=data_dir, file_format="array_record")
        if not builder.is_prepared():
            library.read(tuple(only))  # a Python without sources fails here, before anything is written
            try:
                builder.download_and_prepare()
            except (OSError, RuntimeError) as error:  # RuntimeError: from the writer's C++
                failed = error
        # Another process may have finished the same folder after this builder looked for it and before our rename.
        if failed or not builder.info.splits:
            builder = PythonDocs(config=config, data_dir=data_dir, file_format="array_record")
    if not builder.info.splits:
        doing = f"cannot build {name} under {data_dir}"
        raise files.failed(failed or RuntimeError("it has no records"), doing) from failed
    return builder


def rows(builder: PythonDocs, split: str) -> Sequence[Mapping[str, Any]]:
    """Return a split's records by random access; strings are UTF-8 bytes.

    Raises:
        DataError: the builder has no such split (a corpus of few modules may lack one).
    """
    if split not in builder.info.splits or not builder.info.splits[split].num_examples:
        raise DataError(f"{builder.info.full_name} has no examples in split {split!r}")
    return builder.as_data_source(split)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence TFDS's progress bars, and its warning about a folder that does not exist yet."""
    tfds.disable_progress_bar()
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.setLevel(level)


def _texts(modules: Sequence[library.Module]) -> Iterator[tuple[str, dict[str, Any]]]:
    for module in modules:
        kind = "topic" if module.name == library.TOPICS else "module"
        yield module.split, {"text": module.text, "module": module.name, "package": module.package, "kind": kind}


def _labelled(modules: Sequence[library.Module]) -> Iterator[tuple[str, dict[str, Any]]]:
    for split, module, text, label in masking.generate(modules):
        yield split, {"text": text, "module": module, "label": label}
