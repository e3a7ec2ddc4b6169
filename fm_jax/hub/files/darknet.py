"""Read and write Darknet's model files: a .cfg, which lists the layers, and a .weights, which holds their numbers.

A .cfg has sections "[kind]" with lines "option=value"; a kind repeats. A .weights has a header (three numbers of the
version, and how many images were seen) and then float32 numbers without names or shapes, layer after layer: which
number is which, only the .cfg says. So the bytes that it asks for are added up and compared with the file's before
anything is read. Layers are numbered as Darknet does, from 0, without [net].
Source: https://github.com/pjreddie/darknet, src/parser.c; of its layers those of YOLOv3.
"""

import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fm_jax.core import files
from fm_jax.core.errors import CheckpointError, shown
from fm_jax.hub.files.tensor_file import Place, TensorFile
from fm_jax.hub.files.weights import Spec

CFG, WEIGHTS, NAMES = ".cfg", ".weights", ".names"
MAX_TEXT = 1_000_000  # bytes of a .cfg or .names file; YOLOv3's has 8,342
MAX_SECTIONS = 1_000  # YOLOv3 has 108
MAX_CHANNELS = 1 << 16
_ALIASES = {"network": "net", "conv": "convolutional", "max": "maxpool"}
_NUMBER = re.compile(r"[-+]?\d{1,9}")
_DECIMAL = re.compile(r"[-+]?(?:\d{1,9}\.?\d{0,9}|\.\d{1,9})")


class Section(NamedTuple):
    """A section as the file has it; spaces in values are dropped, as in Darknet."""

    kind: str
    options: Mapping[str, str]


class Layer(NamedTuple):
    """A layer with all the options that its output depends on, defaults included, and layers by their numbers."""

    kind: str
    options: Mapping[str, Any]


class Convolution(NamedTuple):
    """A layer that has numbers in the .weights."""

    number: int  # of the layer
    shape: tuple[int, int, int, int]  # of its kernel [out, in / groups, height, width]
    normalised: bool  # by batch normalisation

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of its tensors in the order of the file."""
        words = ("biases", "scales", "rolling_mean", "rolling_variance") if self.normalised else ("biases",)
        yield from ((f"{self.number}.{word}", self.shape[:1]) for word in words)
        yield f"{self.number}.weights", self.shape


class Header(NamedTuple):
    """What a .weights says of itself."""

    major: int = 0
    minor: int = 2
    revision: int = 0
    seen: int = 0  # images that it was trained on

    @property
    def form(self) -> str:
        """Return the format of its bytes: `seen` has eight bytes from version 0.2 on, and four before."""
        return "<iiiQ" if 10 * self.major + self.minor >= 2 else "<iiiI"


# kind -> option -> (how it is read, default); "flag" is 0 or 1, "layers" are numbers of layers, relative if negative
_OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
    "net": {"width": ("int", None), "height": ("int", None), "channels": ("int", 3)},
    "convolutional": {
        "filters": ("int", 1), "size": ("int", 1), "stride": ("int", 1), "pad": ("flag", 0), "padding": ("int", 0),
        "groups": ("int", 1), "batch_normalize": ("flag", 0), "activation": ("word", "logistic"),
    },
    "maxpool": {"stride": ("int", 1), "size": ("int", None), "padding": ("int", None)},
    "upsample": {"stride": ("int", 2)},
    "shortcut": {"from": ("layers", None), "activation": ("word", "linear")},
    "route": {"layers": ("layers", None), "groups": ("int", 1), "group_id": ("int", 0)},
    "yolo": {
        "mask": ("ints", None), "anchors": ("decimals", None), "classes": ("int", 20), "num": ("int", 1),
        "scale_x_y": ("decimal", 1.0),
    },
}  # fmt: skip
KINDS = tuple(_OPTIONS)
"""Kinds of sections that are supported."""

# options that change what training does, and no prediction
_TRAINING = {
    "net": """adam angle aspect B1 B2 batch blur burn_in contrast cutmix decay decay_step ema_alpha eps exposure flip
    gamma hue inputs label_smooth_eps learning_rate learning_rate_min letter_box max_batches max_chart_loss max_crop
    min_crop mixup momentum mosaic mosaic_bound notruth optimized_memory policy power random saturation scale scales
    seq_scales sgdr_cycle sgdr_mult show_receptive_field steps step subdivisions time_steps track try_fix_nan
    workspace_size_limit_MB""",
    "yolo": """beta_nms cls_normalizer counters_per_class focal_loss ignore_thresh iou_loss iou_normalizer iou_thresh
    jitter label_smooth_eps map max max_delta nms_kind obj_normalizer random resize show_details truth_thresh""",
}


def known(kind: str) -> set[str]:
    """Return the options of a kind of section that are read, or change no prediction."""
    return {*_OPTIONS.get(kind, ()), *_TRAINING.get(kind, "").split()}


def read_text(path: Path) -> str:
    """Return the text of a small file.

    Raises:
        CheckpointError: it is missing, too large, or not text.
    """
    status = files.status(path, CheckpointError)
    if status is None:
        raise CheckpointError(f"there is no {path}; a Darknet model is NAME{CFG} and NAME{WEIGHTS} in one folder")
    if status.st_size > MAX_TEXT:
        raise CheckpointError(f"{path} has {status.st_size:,} bytes; at most {MAX_TEXT:,} are supported")
    try:
        with path.open("rb") as file:
            return file.read(MAX_TEXT).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8 text; give Darknet's own file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def sections(text: str, where: str) -> list[Section]:
    """Return the sections of the text of a .cfg.

    Args:
        text: what the file holds.
        where: its name, for messages.

    Raises:
        CheckpointError: a line is neither a section nor an option, an option is there twice, or there are too many.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = "".join(line.split())
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            if len(found) == MAX_SECTIONS:
                raise CheckpointError(f"{where} has more than {MAX_SECTIONS} sections; at most that many are supported")
            kind = line[1:].removesuffix("]")
            found.append((_ALIASES.get(kind, kind), {}))
            continue
        option, equals, value = line.partition("=")
        if not equals or not option or not found:
            raise CheckpointError(f"{where}, line {number}: {shown(line)} is neither [section] nor option=value in one")
        if option in found[-1][1]:
            raise CheckpointError(f"{where}, line {number}: {shown(option)} is in [{found[-1][0][:40]}] twice")
        found[-1][1][option] = value
    return [Section(*section) for section in found]


def cfg_text(listed: Iterable[Section]) -> str:
    """Return the text of a .cfg; `sections` gives back the sections."""
    blocks = ("\n".join([f"[{kind}]", *(f"{name}={options[name]}" for name in options)]) for kind, options in listed)
    return "\n\n".join(blocks) + "\n"


def layers(listed: Sequence[Section], where: str) -> tuple[Layer, list[Layer]]:
    """Return [net] and the layers of a network, every option checked and with its default.

    Args:
        listed: the sections of a .cfg; options that are not read here are passed over.
        where: its name, for messages.

    Raises:
        CheckpointError: the sections do not begin with [net], or one is of a kind that is not supported, or has an
            option of another type or out of range; the message names it.
    """
    if not listed or listed[0].kind != "net":
        raise CheckpointError(f"{where} does not begin with [net]; give Darknet's own file")
    read = [_layer(section, number, where) for number, section in enumerate(listed, -1)]
    return read[0], read[1:]


def name(number: int, kind: str) -> str:
    """Return what messages call a layer."""
    return "[net]" if number < 0 else f"layer {number} [{kind[:40]}]"


def _layer(section: Section, number: int, where: str) -> Layer:
    """Read the options of one section."""
    kind, options = section
    called = f"{where}: {name(number, kind)}"
    if kind not in KINDS or (kind == "net") != (number < 0):
        raise CheckpointError(f"{called} is not supported; supported are {', '.join(f'[{kind}]' for kind in KINDS)}")
    values: dict[str, Any] = {}
    for option, (how, default) in _OPTIONS[kind].items():
        if option in options:
            values[option] = _value(options[option], how, number, f"{called} has {option} {shown(options[option])},")
        elif default is None and kind != "maxpool":
            raise CheckpointError(f"{called} has no {option}")
        else:
            values[option] = default
    if kind == "convolutional":
        if values.pop("pad"):
            values["padding"] = values["size"] // 2
        elif values["size"] == 1 and values["padding"]:
            raise CheckpointError(f"{called} has padding around a layer of size 1, which is not supported")
    if kind == "maxpool":
        values["size"] = values["stride"] if values["size"] is None else values["size"]
        values["padding"] = values["size"] - 1 if values["padding"] is None else values["padding"]
    if kind == "shortcut" and len(values["from"]) != 1:
        raise CheckpointError(f"{called} adds {len(values['from'])} layers; one is supported")
    if kind == "yolo":
        pairs = len(values["anchors"]) // 2
        if len(values["anchors"]) % 2 or pairs != values["num"] or any(not 0 <= n < pairs for n in values["mask"]):
            raise CheckpointError(f"{called}: mask, num and anchors do not fit each other")
    return Layer(kind, values)


def _value(text: str, how: str, number: int, problem: str) -> Any:
    """Read a value; `problem` begins the message if it is none."""
    if how == "word":
        return text
    parts = [part for part in text.split(",") if part] if how in ("ints", "decimals", "layers") else [text]
    form = _DECIMAL if how.startswith("decimal") else _NUMBER
    if not 0 < len(parts) <= 100 or not all(form.fullmatch(part) for part in parts):
        raise CheckpointError(f"{problem} which is not {'a list of numbers' if len(parts) != 1 else 'a number'}")
    if form is _DECIMAL:
        decimals = tuple(float(part) for part in parts)
        return decimals if how == "decimals" else decimals[0]
    whole = tuple(int(part) for part in parts)
    if how == "layers":
        whole = tuple(number + part if part < 0 else part for part in whole)
        if any(not 0 <= part < number for part in whole):
            raise CheckpointError(f"{problem} which is not a layer before it")
    elif any(not 0 <= part <= MAX_CHANNELS for part in whole) or (how == "flag" and whole[0] > 1):
        raise CheckpointError(f"{problem} which is out of range")
    return whole if how in ("ints", "layers") else whole[0]


def convolutions(net: Layer, listed: Sequence[Layer], where: str) -> list[Convolution]:
    """Return the layers that have numbers in the .weights, with the shapes that follow from the layers before.

    Raises:
        CheckpointError: channels do not fit; the message names the layer.
    """
    found, channels = list[Convolution](), list[int]()
    before = net.options["channels"]
    for number, (kind, options) in enumerate(listed):
        called = f"{where}: {name(number, kind)}"
        if kind == "convolutional":
            out, side, groups = options["filters"], options["size"], options["groups"]
            if min(before, out, side, groups, options["stride"]) < 1 or before % groups or out % groups:
                raise CheckpointError(f"{called} makes {out} channels of {before} in {groups} groups")
            found.append(Convolution(number, (out, before // groups, side, side), bool(options["batch_normalize"])))
            before = out
        elif kind == "route":
            before = sum(channels[part] for part in options["layers"])
            if before > MAX_CHANNELS:
                raise CheckpointError(f"{called} joins {before:,} channels; at most {MAX_CHANNELS:,} are supported")
            if not options["groups"] or before % options["groups"]:
                raise CheckpointError(f"{called} takes {before} channels in {options['groups']} groups")
            before //= options["groups"]
        channels.append(before)
    return found


def open_weights(
    path: str | Path, listed: Sequence[Convolution], *, allow_nonfinite: bool = False
) -> tuple[Header, TensorFile]:
    """Compare a .weights with the layers that it belongs to; return its header, and its tensors, unread.

    The tensors have the names of `Convolution.tensors`.

    Raises:
        CheckpointError: the file has another header, or more or fewer bytes than the layers; the message says in which
            layer it ends.
    """
    headers: list[Header] = []

    def find(where: str, file: BinaryIO) -> dict[str, Place]:
        headers.append(_header(where, file))
        return _places(where, os.fstat(file.fileno()).st_size, struct.calcsize(headers[0].form), listed)

    file = TensorFile.open(path, find, allow_nonfinite=allow_nonfinite)
    return headers[0], file


def write_weights(
    path: Path, listed: Sequence[Convolution], tensors: Iterable[tuple[str, np.ndarray]], header: Header
) -> None:
    """Write a .weights; it is flushed to disk when this returns.

    Args:
        path: file to make; it must not exist.
        listed: the layers.
        tensors: (name, array) of all tensors, in the order of the file.
        header: its version and how many images were seen.

    Raises:
        ValueError: a tensor is missing, superfluous, out of order or of another shape.
    """
    wanted = [pair for layer in listed for pair in layer.tensors()]
    with path.open("xb") as file:
        file.write(struct.pack(header.form, *header))
        for (want, shape), (given, array) in zip(wanted, tensors, strict=True):
            if (given, array.shape) != (want, shape):
                raise ValueError(f"{given} {array.shape} instead of {want} {shape}")
            file.write(np.ascontiguousarray(array, "<f4").data)
        file.flush()
        os.fsync(file.fileno())


def _header(where: str, file: BinaryIO) -> Header:
    """Read the header."""
    start = file.read(20)
    if len(start) < 16:
        raise CheckpointError(f"{where} is not a Darknet weights file, or is cut short ({len(start)} bytes)")
    header = Header(*struct.unpack("<iii", start[:12]))
    if not (0 <= header.major < 1000 and 0 <= header.minor < 1000):  # from 1000 on: transposed matrices
        version = f"{header.major}.{header.minor}"
        raise CheckpointError(f"{where} is not a Darknet weights file, or of the unsupported version {version}")
    if len(start) < (size := struct.calcsize(header.form)):
        raise CheckpointError(f"{where} is cut short ({len(start)} bytes); take a fresh copy")
    return Header(*struct.unpack(header.form, start[:size]))


def _places(where: str, size: int, start: int, listed: Sequence[Convolution]) -> dict[str, Place]:
    """Return where each tensor is, or say in which layer the file ends."""
    shapes = [(tensor, shape, layer) for layer in listed for tensor, shape in layer.tensors()]
    needed = start + 4 * sum(math.prod(shape) for _, shape, _ in shapes)
    places, end = dict[str, Place](), start
    for tensor, shape, layer in shapes:
        count = 4 * math.prod(shape)
        if end + count > size:
            called, word = name(layer.number, "convolutional"), tensor.partition(".")[2]
            at = f"before {called}" if end == size and word == "biases" else f"in the {word} of {called}"
            raise CheckpointError(
                f"{where} ends {at}: it has {size:,} bytes, and the cfg's layers have {needed:,}; take a fresh copy, "
                "or the cfg that belongs to it"
            )
        places[tensor] = Place(Spec("float32", shape), ((end, count),))
        end += count
    if end < size:
        last = name(listed[-1].number, "convolutional") if listed else "its header"
        raise CheckpointError(
            f"{where} has {size - end:,} bytes after {last}, the cfg's last layer with weights; take the cfg that "
            "belongs to it"
        )
    return places
