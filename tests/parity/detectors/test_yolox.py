"""YOLOX beside libreyolo's: raw and decoded predictions, assignment, every term of the loss, gradients, one step.

Every tensor is drawn anew, running moments among them. Wrong programs must be seen.
"""

import copy
import re
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fm_jax.core import statistics, tree
from fm_jax.core.errors import CheckpointError
from fm_jax.hub import families, pretrained, table
from fm_jax.hub.files import safetensors
from fm_jax.hub.files.weights import Spec
from fm_jax.hub.vision import yolox as hub
from fm_jax.models.vision import yolox as model_file
from fm_jax.objectives.detection import yolox as objective
from fm_jax.ops import anchor_points, assignment
from tests.close import close, small
from tests.parity import convert
from tests.parity.changes import change
from tests.parity.detectors import yolox_peer
from tests.parity.distances import apart, distances
from tests.parity.vision import yolox

TOLERANCE = 2e-5  # of the peer's standard deviation, or of a gradient's norm, in float32 on CPU
POINTS = anchor_points.points(64, 96, model_file.STRIDES)
CASES, MOST = 200, 8
FORMS = (*yolox.FORMS, *yolox.LARGER)


@cache
def made(form):
    """Return our module, its parameters, the peer and the batch."""
    module, params = yolox.load(form)
    return module, params, yolox_peer.peer(form, yolox.drawn(module)), yolox.batch()


@cache
def answer(form, *, train=False, double=False):
    """Return the peer's answer in our terms."""
    module, _, peer, batch = made(form)
    found = yolox_peer.theirs(peer, batch, train=train, double=double)
    gradients, _ = statistics.split(convert.params(module, found["gradients"]))
    after = tree.flatten(statistics.split(convert.params(module, found["after"]))[1])
    return {**found, "gradients": gradients} | ({"statistics": after} if train else {})


def apart_from(form, mine, **how):
    """Return the distances of an answer of ours, every term of the loss among them."""
    peer = answer(form, **how)
    terms = {name: apart(mine["terms"][name], value) for name, value in peer["terms"].items()}
    return distances(mine, peer) | terms


def measured(form, module=None, params=None):
    """Return how far we are from the peer in evaluation, perhaps with a changed module or parameters."""
    right, given, _, batch = made(form)
    return apart_from(form, yolox.ours(module or right, batch)(params or given))


@pytest.mark.parametrize("form", FORMS)
def test_predictions_losses_and_gradients_are_libreyolos(form):
    found = measured(form)
    print(form, {name: f"{value:.1e}" for name, value in found.items()})
    small(max(found.values()), TOLERANCE * (2 if form == "yolox-deep" else 1))
    assert answer(form)["terms"]["positives"] > 0.5


@pytest.mark.parametrize("form", FORMS)
def test_a_step_in_training_is_as_near_to_float64_as_libreyolos(form):
    """The norms of 24 numbers a channel magnify float32's rounding, theirs like ours: both are held to float64."""
    module, params, _, batch = made(form)
    mine = apart_from(form, yolox.ours(module, batch, train=True)(params), train=True, double=True)
    theirs = apart_from(form, answer(form, train=True), train=True, double=True)
    print(form, {name: f"{value:.1e} ({theirs[name]:.1e})" for name, value in mine.items()})
    small(mine["statistics"], 1e-4)
    for name in ("raw", "gradients", "loss"):
        assert mine[name] < max(10 * theirs[name], 1e-5)
        assert theirs[name] < 2e-3


@pytest.mark.parametrize("form", FORMS)
def test_decoded_boxes_and_scores_are_libreyolos(form):
    module, params, peer, batch = made(form)
    want = yolox_peer.decoded(copy.deepcopy(peer), batch)
    raw = jax.jit(module.apply)({"params": params}, batch["images"])
    boxes = anchor_points.decode(raw.boxes, POINTS)
    close(boxes, np.concatenate([want[..., :2] - want[..., 2:4] / 2, want[..., :2] + want[..., 2:4] / 2], axis=-1))
    close(jax.nn.sigmoid(raw.objectness), want[..., 4])
    close(jax.nn.sigmoid(raw.classes), want[..., 5:])


def drawn_case(seed):
    """Return predictions and up to eight boxes of an image: some predictions are near a box, some far from all."""
    rng = np.random.default_rng(seed)
    count = rng.integers(0, MOST + 1)
    centre = rng.uniform(0.02, 0.98, (count, 2)) * [96, 64]
    sides = np.exp(rng.uniform(np.log(5), np.log(70), (count, 2)))
    boxes = np.concatenate([centre - sides / 2, centre + sides / 2], axis=1)
    predicted = np.array(anchor_points.decode(rng.normal(0, 0.7, (len(POINTS.cell), 4)), POINTS))
    if count:
        near = np.abs(POINTS.centre[:, None] - centre).max(-1)
        hit = (rng.random(len(predicted)) < 0.6) & (near.min(1) < 40)
        predicted[hit] = boxes[near.argmin(1)[hit]] + rng.normal(0, rng.choice([0.5, 2, 6]), (hit.sum(), 4))
    predicted = np.concatenate([predicted.reshape(-1, 2, 2).min(1), predicted.reshape(-1, 2, 2).max(1) + 0.1], axis=1)
    return {
        "predicted": predicted.astype(np.float32),
        "logits": rng.normal(-1, 2, (len(predicted), 3)).astype(np.float32),
        "objectness": rng.normal(-1, 2, len(predicted)).astype(np.float32),
        "boxes": boxes.astype(np.float32),
        "labels": rng.integers(0, 3, count).astype(np.int32),
    }


@cache
def cases():
    """Return 200 images, each unpadded and all padded, and the peer's assignments."""
    drawn = [drawn_case(seed) for seed in range(CASES)]
    padded = {name: np.stack([case[name] for case in drawn]) for name in ("predicted", "logits", "objectness")}
    for name in ("boxes", "labels"):
        more = [(0, 0)] * (drawn[0][name].ndim - 1)
        padded[name] = np.stack([np.pad(case[name], [(0, MOST - len(case[name])), *more]) for case in drawn])
    padded["mask"] = np.arange(MOST) < np.array([[len(case["boxes"])] for case in drawn])
    want = [np.stack(part) for part in zip(*(yolox_peer.assigned(case, POINTS) for case in drawn), strict=True)]
    return padded, want


def assign():
    """Return our assignments of the 200 images."""
    given = cases()[0]
    one = lambda *image: assignment.simota(*image[:3], POINTS, *image[3:])  # noqa: E731
    order = ("predicted", "logits", "objectness", "boxes", "labels", "mask")
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(*(given[name] for name in order)))


def disagreements(found):
    """Return how many images are assigned otherwise than by the peer."""
    positive, box, _ = cases()[1]
    wrong = (found.positive != positive) | (positive & (found.box != box))
    return int(wrong.any(axis=1).sum())


def test_two_hundred_images_are_assigned_as_by_libreyolo():
    given, (positive, _, iou) = cases()
    found = assign()
    assert disagreements(found) == 0
    close(found.iou, iou)
    counts = given["mask"].sum(1)
    assert (counts == 0).sum() >= 10 and not positive[counts == 0].any()
    assert positive.sum() > 3 * counts.sum()  # dynamic k is more than one
    near = np.abs(given["boxes"].reshape(CASES, MOST, 2, 2).mean(2)[:, :, None] - POINTS.centre).max(-1)
    wanted = ((near < assignment.RADIUS * POINTS.stride[:, 0]) & given["mask"][..., None]).sum(1)
    assert (wanted[positive] > 1).sum() > 100  # several boxes want one point


WRONG_ASSIGNMENTS = {
    "the radius of release 0.3.0": lambda patch: patch.setattr(assignment, "RADIUS", 2.5),
    "five IoUs instead of ten": lambda patch: patch.setattr(assignment, "CANDIDATES", 5),
    "points of other boxes cost nothing more": lambda patch: patch.setattr(assignment, "FAR", 0.0),
    "an equal share of the IoU's cost": lambda patch: patch.setattr(assignment, "IOU_SHARE", 1.0),
    "a class's cost without objectness": lambda patch: patch.setattr(
        assignment,
        "_class_cost",
        lambda logits, objectness, labels, real=assignment._class_cost: real(logits, 0 * objectness + 30, labels),
    ),
}


@pytest.mark.parametrize("wrong", WRONG_ASSIGNMENTS)
def test_a_wrong_assignment_is_seen(wrong, monkeypatch):
    WRONG_ASSIGNMENTS[wrong](monkeypatch)
    assert disagreements(assign()) > 3


def test_padding_that_takes_part_is_seen(monkeypatch):
    real = assignment.simota
    monkeypatch.setattr(assignment, "simota", lambda *given: real(*given[:-1], jnp.ones_like(given[-1])))
    assert disagreements(assign()) > 50


def _order(x):
    """Turn 2×2 pixels into channels in the order (row, column)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)


WRONG_MODELS = {
    "another epsilon": (lambda m, p: (change(m, norm_epsilon=1e-5), p), lambda patch: None),
    "running means lost": (
        lambda m, p: (m, tree.map_with_path(lambda path, x: 0 * x if path.endswith("/mean") else x, p)),
        lambda patch: None,
    ),
    "blue and red change places": (
        lambda m, p: (m, {**p, "stem": {**p["stem"], "conv": {"kernel": _swapped(p["stem"]["conv"]["kernel"])}}}),
        lambda patch: None,
    ),
    "pixels in another order": (lambda m, p: (m, p), lambda patch: patch.setattr(model_file, "_focus", _order)),
    "windows of 3": (
        lambda m, p: (m, p),
        lambda patch: patch.setattr(
            model_file, "nn", SimpleNamespace(**{**vars(model_file.nn), "max_pool": _narrow_pool})
        ),
    ),
    "bottlenecks without shortcuts": (
        lambda m, p: (m, p),
        lambda patch: patch.setattr(model_file, "CSP", partial(_without, model_file.CSP)),
    ),
}


def _swapped(kernel):
    return kernel.reshape(3, 3, 4, 3, -1)[:, :, :, ::-1].reshape(kernel.shape)


def _narrow_pool(x, window, padding, real=model_file.nn.max_pool):
    return real(x, tuple(min(side, 3) for side in window), padding=tuple((min(a, 1), min(b, 1)) for a, b in padding))


def _without(csp, *given, **options):
    return csp(*given, **{**options, "shortcut": False})


@pytest.mark.parametrize("wrong", WRONG_MODELS)
def test_a_wrong_model_is_seen(wrong, monkeypatch):
    module, params, _, _ = made("yolox")
    changed, patch = WRONG_MODELS[wrong]
    patch(monkeypatch)
    found = measured("yolox", *changed(module, params))
    assert found["raw"] > 20 * TOLERANCE, found


objective_iou = objective.iou


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("BOX_SHARE", 1.0, "iou_loss"),
        ("iou", lambda a, b: jnp.sqrt(objective_iou(a, b)), "iou_loss"),
        ("simota", lambda *given: _sure(assignment.simota(*given)), "class_loss"),
    ],
    ids=["the boxes' share", "the IoU itself", "classes without the IoU"],
)
def test_a_wrong_loss_is_seen(name, value, seen, monkeypatch):
    monkeypatch.setattr(objective, name, value)
    found = measured("yolox")
    small(found["raw"], TOLERANCE)
    assert found[seen] > 1e-2, found


def _sure(found):
    return found._replace(iou=found.positive.astype(jnp.float32))


def test_a_file_of_libreyolos_opens_by_its_names_alone_and_goes_back(tmp_path):
    """A folder without config.json; what is saved here loads there, with every tensor equal."""
    for form in FORMS:
        module, params, peer, _ = made(form)
        folder = tmp_path / form
        folder.mkdir()
        state = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
        specs = {name: Spec(tensor.dtype.name, tensor.shape) for name, tensor in state.items()}
        safetensors.write(folder, specs, iter(state.items()))
        found = pretrained.load(folder)
        assert found.module == module
        jax.tree.map(np.testing.assert_array_equal, found.params, params)
        pretrained.save(tmp_path / f"{form}-ours", found.module, found.params)
        back = safetensors.open_file(tmp_path / f"{form}-ours" / "model.safetensors")
        tensors = {name: back.read(name, tuple(slice(None) for _ in spec.shape)) for name, spec in back.specs.items()}
        again = copy.deepcopy(peer)
        again.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()})
        for name, tensor in again.state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), state[name], err_msg=name)


def test_the_two_lines_that_convert_a_pickle_do(tmp_path, monkeypatch):
    module, params, peer, _ = made("yolox")
    torch.save({"model": peer.state_dict(), "epoch": 300}, tmp_path / "yolox.pth")
    with pytest.raises(CheckpointError) as refused:
        pretrained.load(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines, scope = re.findall("`(import [^`]*|safetensors[^`]*)`", str(refused.value)), {}
    assert len(lines) == 2
    exec("\n".join(lines), scope)  # noqa: S102  (what the message advises)
    found = pretrained.load(tmp_path)
    assert found.module == module
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


@pytest.mark.parametrize("size", ["nano", "tiny", "s", "m", "l", "x"])
def test_the_presets_are_libreyolos(size):
    """By names and shapes of all tensors, made without memory."""
    yolox_peer.imported("training.distributed")
    nn = yolox_peer.imported("models.yolox.nn")
    with torch.device("meta"):
        peer = nn.LibreYOLOXModel(size[0], 80)
    specs = {name: Spec("float32", tuple(tensor.shape)) for name, tensor in peer.state_dict().items()}
    cfg = getattr(model_file, f"yolox_{size}")()
    module = model_file.YOLOX(cfg)
    mine = {name: spec.shape for name, spec in table.specs(hub.table(module), families.abstract(module)).items()}
    assert mine == {name: spec.shape for name, spec in specs.items() if not name.endswith("num_batches_tracked")}
    assert families.build(families.described(SimpleNamespace(specs=specs, where="the peer")))[1] == module
