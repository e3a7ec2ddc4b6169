"""Faster R-CNN beside torchvision: by parts, with the losses on the same samples, end to end, and wrong variants."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fm_jax.core import statistics, tree
from fm_jax.hub import pretrained
from fm_jax.layers import pyramid
from fm_jax.models.vision import faster_rcnn as model
from fm_jax.objectives.detection import faster_rcnn as objective
from fm_jax.ops import anchors as anchor_ops
from fm_jax.ops import boxes as box_ops
from fm_jax.ops import roi
from tests.close import close, small
from tests.hub.forms import build, write
from tests.parity import convert
from tests.parity.changes import change, edit
from tests.parity.detectors import torchvision_peer as peers
from tests.parity.distances import steepest
from tests.parity.vision import faster_rcnn as ours

TOLERANCE = 5e-4  # of the peer's standard deviation: ten times what was measured
PARTS = ("maps", "objectness", "deltas", "proposals", "logits", "refined", "detections")


@pytest.fixture(scope="module", autouse=True)
def loaded():
    return peers.torchvision()


@cache
def case(name):
    """Return (config, our module, our parameters, batch, torchvision's answer, its samples)."""
    cfg = ours.FORMS[name]
    peer = peers.faster_rcnn(cfg)
    tensors = ours.draw(peers.shapes(peer))
    rows = ours.batch(cfg.get("num_channels", 3))
    answer, samples = peers.theirs(peers.fill(peer, tensors), rows, (ours.LOSS.anchors, ours.LOSS.proposals))
    module, _ = build(cfg)
    return cfg, module, convert.params(module, tensors), rows, answer, samples


def run(name, change=lambda m, p: (m, p), loss=ours.LOSS, *, train=True):
    """Return the distances of every part of our answer, of a model that may be changed."""
    _, module, params, rows, answer, samples = case(name)
    before = module
    module, params = change(module, params)
    mine = ours.ours(module, rows, samples if train else None, loss)(params)
    return distances(jax.device_get((mine, regions(module, rows)(params))), answer, before)


def regions(module, rows):
    """Return a jitted params -> the first stage in training."""
    return jax.jit(lambda params: module.apply({"params": params}, rows["images"], train=True, method="regions"))


def distances(mine, answer, module):
    """Return the largest difference of each part, in standard deviations of torchvision's."""
    apart, found = lambda got, want: float(np.abs(got - want).max() / want.std()), {}
    mine, first = mine
    out, valid = mine["outputs"], mine["outputs"].valid
    found["maps"] = max(map(apart, first.maps, answer["maps"]))
    found["objectness"] = apart(out.objectness, answer["objectness"])
    found["deltas"] = apart(out.deltas, answer["deltas"])
    for name, boxes, mask, want in (
        ("proposals", out.proposals, valid, answer["proposals"]),
        ("train_proposals", first.proposals, first.valid, answer["train_proposals"]),
    ):
        found[name] = _listed(boxes, mask, want)
    for name, got in (("logits", out.logits), ("refined", out.refined)):
        found[name] = _listed(got, valid, answer[name])
    seen, theirs = mine["detections"], answer["detections"]
    same = [len(want["labels"]) == mask.sum() and (got[mask] + 1 == want["labels"]).all()
            for got, mask, want in zip(seen.classes, seen.valid, theirs, strict=True)]  # fmt: skip
    found["detections"] = 1e9
    if all(same):
        found["detections"] = max(
            _listed(seen.boxes, seen.valid, [want["boxes"] for want in theirs]),
            _listed(seen.scores, seen.valid, [want["scores"] for want in theirs]),
        )
    if "losses" not in mine:
        return found
    found["losses"] = max(abs(mine["losses"][name] - want) / max(want, 1.0) for name, want in answer["losses"].items())
    found["total"] = abs(mine["loss"] - sum(answer["losses"].values()))
    gradients, _ = statistics.split(convert.params(module, answer["gradients"]))
    if module.backbone.cfg.norm_frozen:  # torchvision's are not parameters then: ours have a gradient of zero
        frozen = {path: leaf for path, leaf in tree.flatten(mine["gradients"]).items() if "/norm" in path}
        assert not any(leaf.any() for leaf in frozen.values())
    found["gradients"] = steepest(mine["gradients"], gradients)
    return found


def _listed(got, mask, want):
    """Compare padded rows with lists of unpadded ones."""
    if [len(rows) for rows in want] != mask.sum(axis=1).tolist():
        return 1e9
    every = np.concatenate(want)
    return float(np.abs(got[mask] - every).max() / every.std()) if every.size else 0.0


@pytest.mark.parametrize("name", ours.FORMS)
def test_every_part_is_torchvisions(name):
    found = run(name)
    print(name, {key: f"{value:.1e}" for key, value in found.items()})
    assert len(found) == 11
    _, module, *_, answer, (_, second) = case(name)
    assert min(len(found["labels"]) for found in answer["detections"]) > 0
    assert (second.positive & (second.index < module.cfg.proposals[0])).any()  # a proposal, and not an object itself
    small(max(found.values()), TOLERANCE)


@pytest.mark.parametrize("size", [(64, 96), (70, 93), (33, 130)])
def test_anchors_are_exactly_torchvisions(size):
    sizes, ratios = (8.0, 12.0, 37.0), (0.5, 1.0, 1.7)
    shapes = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in (4, 8, 16)]
    generator = peers.torchvision().models.detection.anchor_utils.AnchorGenerator(
        tuple((s,) for s in sizes), (ratios,) * 3
    )
    listed = SimpleNamespace(tensors=torch.zeros(1, 3, *size), image_sizes=[size])
    theirs = generator(listed, [torch.zeros(1, 1, *shape) for shape in shapes])[0].numpy()
    np.testing.assert_array_equal(anchor_ops.anchors(shapes, size, sizes, ratios), theirs)


def test_deltas_are_torchvisions():
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 90, (2, 50, 2)), rng.uniform(0.5, 60, (2, 50, 2))
    boxes, anchors = np.concatenate([corner, corner + side], axis=2).astype(np.float32)
    deltas = rng.normal(0, 8, (50, 4)).astype(np.float32)  # some beyond the clamp
    for weights in ((1.0, 1.0, 1.0, 1.0), model.WEIGHTS):
        coder = peers.torchvision().models.detection._utils.BoxCoder(weights)
        theirs = [torch.from_numpy(array.copy()) for array in (boxes, anchors, deltas)]
        close(box_ops.encode(boxes, anchors, weights), coder.encode_single(*theirs[:2]).numpy())
        close(box_ops.decode(deltas, anchors, weights), coder.decode_single(theirs[2], theirs[1]).numpy())


@pytest.mark.parametrize("form", ["products", "gather"])
@pytest.mark.parametrize(("aligned", "sampling"), [(False, 2), (True, 2), (False, 1), (True, 3)])
def test_roi_align_is_torchvisions(monkeypatch, form, aligned, sampling):
    monkeypatch.setattr(roi, "_LARGEST", 0 if form == "gather" else 10**9)
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, 24 // 2**n, 32 // 2**n, 5)).astype(np.float32) for n in range(3)]
    corner, side = rng.uniform(0, 60, (2, 9, 2)), rng.uniform(0.2, 64, (2, 9, 2))
    boxes = np.concatenate([corner, np.minimum(corner + side, [128, 96])], axis=2).astype(np.float32)
    boxes[0, 0] = [127.5, 20, 128, 90]  # thinner than a position, at the edge: widened, it reaches beyond the map
    there = [torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in maps]
    listed = [torch.from_numpy(x.copy()) for x in boxes]
    ops = peers.torchvision().ops
    one = ops.roi_align(there[0], listed, (3, 3), 0.25, sampling, aligned).numpy().reshape(2, 9, 5, 3, 3)
    close(roi.roi_align(maps[0], boxes, 3, 0.25, sampling, aligned=aligned), one.transpose(0, 1, 3, 4, 2))
    if not aligned:
        pool = ops.MultiScaleRoIAlign(["0", "1", "2"], 3, sampling, canonical_scale=40)
        many = pool(dict(zip("012", there, strict=True)), listed, [(96, 128)] * 2).numpy().reshape(2, 9, 5, 3, 3)
        got = roi.pyramid_roi_align(maps, boxes, 3, (0.25, 0.125, 0.0625), sampling, canonical=40.0)
        close(got, many.transpose(0, 1, 3, 4, 2))
        assert len(np.unique(roi.levels(boxes, 2, 3, 40.0))) == 3


@pytest.mark.slow
def test_resnet50_fpn_is_torchvisions():
    """At full width, with fewer proposals: of thousands some have scores too close for one order in float32."""
    counts = {"rpn_pre_nms_top_n_train": 96, "rpn_pre_nms_top_n_test": 48}
    counts |= {"rpn_post_nms_top_n_train": 200, "rpn_post_nms_top_n_test": 100}
    peer = peers.torchvision().models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, image_mean=[0.0] * 3, image_std=[1.0] * 3, min_size=128, max_size=160,
        **counts,
    )  # fmt: skip
    assert sum(x.numel() for x in peer.parameters()) == 41_808_406
    tensors = ours.draw(peers.shapes(peer))
    rows = ours.batch(classes=90, size=(128, 160))
    module, _ = build({"model_type": "faster_rcnn", "norm_frozen": False, **counts})
    first = regions(module, rows)
    drawn = first(convert.params(module, tensors))
    for name, out, wanted in (("cls_logits", drawn.objectness, 1.0), ("bbox_pred", drawn.deltas, 0.2)):
        for part in ("weight", "bias"):  # so deep a net has large outputs, whose probabilities are all 1
            tensors[f"rpn.head.{name}.{part}"] *= wanted / float(out.std())
    quotas = 256, 16
    answer, samples = peers.theirs(peers.fill(peer.eval(), tensors), rows, quotas)
    params = convert.params(module, tensors)
    loss = objective.Config(anchors=quotas[0], proposals=quotas[1])
    mine = ours.ours(module, rows, samples, loss)(params), first(params)
    found = distances(jax.device_get(mine), answer, module)
    print({key: f"{value:.1e}" for key, value in found.items()})
    small(max(found.values()), 1e-2)


@pytest.mark.parametrize("name", ours.FORMS)
def test_weights_go_both_ways(name, tmp_path):
    """A folder of torchvision's tensors opens here, and what is saved here loads there."""
    from safetensors.torch import load_file

    cfg, module, params, _, _, _ = case(name)
    peer = peers.faster_rcnn(cfg)
    tensors = ours.draw(peers.shapes(peer))
    found = pretrained.load(write(tmp_path / "theirs", cfg, tensors))
    assert found.module == module
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    pretrained.save(tmp_path / "ours", module, params)
    peer.load_state_dict(load_file(tmp_path / "ours" / "model.safetensors"), strict=True)
    held = peer.state_dict()
    for key, want in tensors.items():
        np.testing.assert_array_equal(held[key].numpy(), want, err_msg=key)


def test_names_of_older_files_are_read(tmp_path):
    cfg, _, params, *_ = case("faster-rcnn")
    older = {"rpn.head.conv.0.0.": "rpn.head.conv."}
    older |= {f"fpn.{kind}_blocks.{n}.0.": f"fpn.{kind}_blocks.{n}." for kind in ("inner", "layer") for n in range(3)}
    tensors = ours.draw(peers.shapes(peers.faster_rcnn(cfg)))
    for new, old in older.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    found = pretrained.load(write(tmp_path / "older", cfg, tensors))
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


FIRST, BOTH = "faster-rcnn", "faster-rcnn-bottleneck"


def head(**changes):
    return lambda m, p: (m.clone(cfg=replace(m.cfg, **changes)), p)


# a wrong variant -> (case, change of the model, of the loss, the first part that shows it)
WRONG = {
    "another epsilon": (FIRST, lambda m, p: (change(m, norm_epsilon=1e-5), p), {}, "maps"),
    "v1 instead of v1.5": (BOTH, lambda m, p: (change(m, stride_first=True), p), {}, "maps"),
    "height and width of kernels": (
        FIRST, lambda m, p: (m, edit(p, "out1/kernel", lambda k: k.swapaxes(0, 1))), {}, "maps"),
    "other anchors": (FIRST, head(anchor_sizes=(12.0, 12.0, 24.0, 44.0)), {}, "proposals"),
    "ratios of width to height": (FIRST, head(anchor_ratios=(2.0, 1.0, 0.5)), {}, "proposals"),
    "another suppression of proposals": (FIRST, head(proposal_overlap=0.5), {}, "proposals"),
    "fewer anchors decoded": (FIRST, head(decoded=(96, 12)), {}, "proposals"),
    "another level": (FIRST, head(canonical=224.0), {}, "logits"),
    "other points of a crop": (FIRST, head(sampling=1), {}, "logits"),
    "rows and columns of a crop": (
        FIRST, lambda m, p: (m, edit(p, "hidden1/kernel", lambda k: k.swapaxes(0, 1))), {}, "logits"),
    "another suppression of detections": (FIRST, head(overlap=0.3), {}, "detections"),
    "another least score": (BOTH, head(score=0.3), {}, "detections"),
    "another edge of smooth L1": (FIRST, lambda m, p: (m, p), {"beta": 1.0}, "losses"),
    "another scale of box targets": (FIRST, lambda m, p: (m, p), {"box_weights": (1.0, 1.0, 1.0, 1.0)}, "losses"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_variant_is_seen(wrong):
    name, changed, loss, part = WRONG[wrong]
    found = run(name, changed, replace(ours.LOSS, **loss), train=part == "losses")
    assert found[part] > 3 * TOLERANCE, found


def shifted(real):
    """Give an anchor's position its middle instead of its corner."""
    return lambda shapes, image, *rest: real(shapes, image, *rest) + 2.0


# a wrong program -> (what is replaced where, by what, the first part that shows it)
CODE = {
    "anchors around the middle": ((model, "anchors"), shifted, "proposals"),
    "aligned crops": (
        (model, "pyramid_roi_align"), lambda real: lambda *a, **k: real(*a, **k, aligned=True), "logits"),
    "weights of detections": ((model, "WEIGHTS"), lambda real: (1.0, 1.0, 1.0, 1.0), "detections"),
    "bilinear doubling": (
        (pyramid, "double"),
        lambda real: lambda x, h, w: jax.image.resize(x, (*x.shape[:1], h, w, x.shape[-1]), "linear"), "maps"),
    "gradients through proposals": (
        (anchor_ops, "jax"),
        lambda real: SimpleNamespace(vmap=real.vmap, Array=real.Array, lax=SimpleNamespace(
            top_k=real.lax.top_k, stop_gradient=lambda x: x)), "gradients"),
    "suppression across levels": (
        (anchor_ops, "ops"),
        lambda real: SimpleNamespace(**{**vars(real), "nms": lambda b, s, t, k, g: real.nms(b, s, t, k)}),
        "train_proposals"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", CODE)
def test_a_wrong_program_is_seen(wrong, monkeypatch):
    (where, name), make, part = CODE[wrong]
    monkeypatch.setattr(where, name, make(getattr(where, name)))
    found = run(FIRST, train=part == "gradients")
    assert found[part] > 3 * TOLERANCE, found


def test_matching_is_torchvisions():
    """Also where an object's best anchor overlaps it little, two overlap it equally, and an image has no object."""
    rng = np.random.default_rng(3)
    anchors = np.asarray(anchor_ops.anchors([(8, 8), (4, 4)], (64, 64), (12.0, 20.0), (0.5, 1.0, 2.0)))
    corner = rng.uniform(0, 40, (6, 5, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(2, 24, (6, 5, 2))], axis=2).astype(np.float32)
    boxes[0, 0] = [12, 12, 20, 20]  # between anchors
    mask = rng.uniform(size=(6, 5)) < 0.7
    mask[1] = False
    kinds, which, _ = objective.match(anchors[None], boxes, mask, 0.7, 0.3, best=True)
    detection = peers.torchvision().models.detection._utils
    for number in range(6):
        given = torch.from_numpy(boxes[number][mask[number]].copy())
        if not len(given):
            assert not np.asarray(kinds[number]).any()
            continue
        quality = peers.torchvision().ops.box_iou(given, torch.from_numpy(anchors.copy()))
        found = detection.Matcher(0.7, 0.3, allow_low_quality_matches=True)(quality).numpy()
        want = np.where(found >= 0, 1, np.where(found == -1, 0, -1))
        np.testing.assert_array_equal(kinds[number], want)
        matched = np.flatnonzero(mask[number])[found[found >= 0]]
        np.testing.assert_array_equal(np.asarray(which[number])[found >= 0], matched)


def test_another_normaliser_where_an_image_has_fewer_proposals():
    """torchvision divides by the samples that there are, ours by the quota: the ratio is theirs to ours."""
    _, module, params, rows, answer, samples = case(FIRST)
    loss = replace(ours.LOSS, proposals=32)
    mine = ours.ours(module, rows, samples, loss)(params)["losses"]
    for name in ("classes", "boxes"):
        close(mine[name] * 2, jnp.float32(answer["losses"][name]), 1e-4)
