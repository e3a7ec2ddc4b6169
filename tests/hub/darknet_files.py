"""Darknet's files, written here in a few lines of their own: sections of small networks, and numbers for them.

A network is a line of words: `8.3/2` is a 3×3 layer of 8 channels and stride 2, `+` a shortcut to the layer three
before, `p2` max pooling by 2 of stride 2 (`p1`: stride 1), `m5` max pooling of size 5 and stride 1, `^` an upsampling,
`<-1,4` a route, `=2,3` the last layer of a scale and the [yolo] with these anchors.
"""

import struct

import numpy as np

RESIDUAL = """8.3 8.3/2 4.1 8.3 + 16.3/2 8.1 16.3 + 8.1 16.3 8.1 16.3 8.1 16.3 =2,3
    <-4 4.1 ^ <-1,4 4.1 8.3 4.1 8.3 4.1 8.3 =0,1"""
POOLED = "4.3 p2 8.3 p2 16.3 p1 24.3 8.1 16.3 =2,3 <-4 4.1 ^ <-1,2 8.3 =0,1"
SPP = """8.3 8.3/2 4.1 8.3 + 16.3/2 8.1 16.3 + 8.1 16.3 8.1 m3 <-2 m5 <-1,-3,-4 8.1 16.3 8.1 16.3 =2,3
    <-4 4.1 ^ <-1,4 4.1 8.3 4.1 8.3 4.1 8.3 =0,1"""
NETWORKS = {"yolov3": RESIDUAL, "yolov3-tiny": POOLED, "yolov3-spp": SPP}
ANCHORS, CLASSES = "2,3,4,3,6,5,8,12", 4


def sections(words, *, width=24, height=16, classes=CLASSES):
    """Return [[kind, {option: value}], …] of a network."""
    made = [["net", {"width": str(width), "height": str(height), "channels": "3", "momentum": "0.9"}]]
    normed = {"batch_normalize": "1", "pad": "1", "activation": "leaky"}
    for word in words.split():
        if word == "+":
            made.append(["shortcut", {"from": "-3", "activation": "linear"}])
        elif word == "^":
            made.append(["upsample", {"stride": "2"}])
        elif word[0] == "p":
            made.append(["maxpool", {"size": "2", "stride": word[1:]}])
        elif word[0] == "m":
            made.append(["maxpool", {"stride": "1", "size": word[1:]}])
        elif word[0] == "<":
            made.append(["route", {"layers": word[1:]}])
        elif word[0] == "=":
            filters = str(len(word[1:].split(",")) * (5 + classes))
            made.append(
                ["convolutional", {"size": "1", "stride": "1", "pad": "1", "filters": filters, "activation": "linear"}]
            )
            anchors = {"mask": word[1:], "anchors": ANCHORS, "classes": str(classes), "num": "4"}
            made.append(
                ["yolo", {**anchors, "jitter": ".3", "ignore_thresh": ".7", "truth_thresh": "1", "random": "1"}]
            )
        else:
            shape, _, stride = word.partition("/")
            filters, size = shape.split(".")
            made.append(["convolutional", {**normed, "filters": filters, "size": size, "stride": stride or "1"}])
    return made


def text(listed):
    """Return the text of a .cfg as people write it: comments, empty lines, spaces."""
    lines = ["# a small network"]
    for kind, options in listed:
        lines += [f"[{kind}]", *(f"{name} = {value.replace(',', ', ')}" for name, value in options.items())]
        lines += ["", "; --"]
    return "\n".join(lines) + "\n"


def tensors(listed, seed=0):
    """Return {name: array} of all tensors in the order of the file, found by a walk of its own."""
    rng, made, channels = np.random.default_rng(seed), {}, []
    before = int(listed[0][1]["channels"])
    for number, (kind, options) in enumerate(listed[1:]):
        if kind == "convolutional":
            out, size = int(options["filters"]), int(options["size"])
            words = (
                ["biases", "scales", "rolling_mean", "rolling_variance"] if "batch_normalize" in options else ["biases"]
            )
            for word in words:
                made[f"{number}.{word}"] = rng.uniform(0.2, 1.5, out).astype(np.float32)
            made[f"{number}.weights"] = rng.normal(0, 0.3, (out, before, size, size)).astype(np.float32)
            before = out
        elif kind == "route":
            places = [int(place) for place in options["layers"].split(",")]
            before = sum(channels[place] for place in places)  # a negative place counts from the end, as in Python
        channels.append(before)
    return made


def header(major=0, minor=2, revision=0, seen=32_013_312):
    """Return the header of a .weights."""
    return struct.pack("<iiiQ" if major * 10 + minor >= 2 else "<iiiI", major, minor, revision, seen)


def weights(arrays, start=None):
    """Return the bytes of a .weights."""
    return (header() if start is None else start) + b"".join(array.astype("<f4").tobytes() for array in arrays.values())


def write(folder, listed, arrays=None, *, stem="net", start=None, names=()):
    """Write NAME.cfg, NAME.weights and, with names, NAME.names; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.cfg").write_text(text(listed))
    (folder / f"{stem}.weights").write_bytes(weights(tensors(listed) if arrays is None else arrays, start))
    if names:
        (folder / f"{stem}.names").write_text("\n".join(names) + "\n")
    return folder
