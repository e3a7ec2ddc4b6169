"""Data sets of tensorflow-datasets by name, read as ArrayRecord without TensorFlow; every failure is one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fm_jax.core.errors import DataError


def open_split(
    name: str, split: str, data_dir: Path, *, fields: Sequence[str], download: bool = False, encoded: Sequence[str] = ()
) -> tuple[Any, Sequence[Any]]:
    """Open a split of a data set that is prepared as ArrayRecord; with `download`, prepare it first.

    Args:
        name: name in tensorflow-datasets, such as lm1b, wiki40b/en or imagenet2012.
        split: name of the split in the data set; slices such as train[:99%] are allowed.
        data_dir: directory of prepared data sets.
        fields: fields that the records must have.
        download: let tensorflow-datasets download and prepare a missing data set.
        encoded: fields returned as the bytes of their files, not decoded.

    Returns:
        The builder's info, and records by random access.

    Raises:
        DataError: unknown data set, split or field, not prepared, or empty.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except Exception as error:  # for an unknown name, TFDS lists every data set over hundreds of lines
        raise DataError(f"tensorflow-datasets has no data set {name!r}: {line(error)}") from error
    if not builder.is_prepared():
        if not download:
            raise DataError(
                f"{name} is not prepared under {data_dir}; set download to true, or prepare it on another machine "
                f"with file_format array_record and copy {builder.data_path} here"
            )
        try:
            builder.download_and_prepare()
        except Exception as error:
            raise DataError(f"tensorflow-datasets cannot prepare {name}: {line(error)}") from error
    if missing := [field for field in fields if field not in builder.info.features]:
        raise DataError(f"{name} has no field {missing[0]!r}; it has {', '.join(builder.info.features)}")
    decoders = {field: tfds.decode.SkipDecoding() for field in encoded} or None
    try:
        rows = builder.as_data_source(split, decoders=decoders)
    except Exception as error:
        known = ", ".join(builder.info.splits)
        raise DataError(f"cannot open split {split!r} of {name} (it has {known}): {line(error)}") from error
    if not len(rows):
        raise DataError(f"split {split!r} of {name} is empty")
    return builder.info, rows


def line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
