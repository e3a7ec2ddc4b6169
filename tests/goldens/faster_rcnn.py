"""How Faster R-CNN is compared with what torchvision computed once, its samples of the losses among it.

Weights and images are drawn from a seed by numpy, so the file holds none. Beside the gradients of one case it holds
  CASE/peer             with the losses, and the number of detections and proposals of each image;
  CASE/objectness …     every fifth output of the first stage; proposals and the second stage's, of all images in a row;
  CASE/boxes, scores, classes   of the detections, likewise;
  CASE/samples/…        numbers of the sampled candidates and which are positive, of both stages.
"""

import json
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from fm_jax.core import statistics
from fm_jax.hub import families, table
from tests.goldens.stored import Golden, flat
from tests.parity import convert
from tests.parity.changes import change
from tests.parity.distances import apart
from tests.parity.vision import faster_rcnn as family

TOLERANCE = 1e-3  # of the standard deviation of torchvision's outputs, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("faster_rcnn", every=13)
CASES = tuple(family.FORMS)
TRAINS = "faster-rcnn"  # the case whose losses and gradients are kept: compiling them takes as long as all the rest
STAGES = ("anchors", "proposals")
_EVERY = 5  # one in so many anchors is kept


def made() -> dict[str, np.ndarray]:
    """Compute what the file is to hold; needs torchvision."""
    from tests.parity.detectors import torchvision_peer as peers

    found = {}
    for case, cfg in family.FORMS.items():
        peer = peers.faster_rcnn(cfg)
        tensors = family.draw(peers.shapes(peer))
        quotas = family.LOSS.anchors, family.LOSS.proposals
        answer, samples = peers.theirs(peers.fill(peer, tensors), rows(case), quotas)
        names = sorted(tensors)
        told = {
            "losses": answer["losses"],
            "proposals": [len(found) for found in answer["proposals"]],
            "detections": [len(found["scores"]) for found in answer["detections"]],
            "tensors": [(name, tensors[name].shape) for name in names],
        }
        found[f"{case}/peer"] = np.array(json.dumps(told))
        listed = {name: np.concatenate(answer[name]) for name in ("proposals", "logits", "refined")}
        listed |= {name: answer[name][:, ::_EVERY] for name in ("objectness", "deltas")}
        for ours, theirs in (("boxes", "boxes"), ("scores", "scores"), ("classes", "labels")):
            listed[ours] = np.concatenate([each[theirs] for each in answer["detections"]])
        found |= {f"{case}/{name}": array for name, array in listed.items()}
        if case != TRAINS:
            continue
        found[f"{case}/gradients"] = flat(answer["gradients"], names)[:: GOLDEN.every]
        for stage, drawn in zip(STAGES, samples, strict=True):
            found |= {f"{case}/samples/{stage}/{name}": part for name, part in drawn._asdict().items()}
    return found


def rows(case: str) -> dict[str, np.ndarray]:
    """Return the batch of a case."""
    return family.batch(family.FORMS[case].get("num_channels", 3))


def load(case):
    """Return our module, our parameters, and for each of their numbers its place among the peer's."""
    module = convert.module(family.FORMS[case])
    names = table.specs(families.writing(module).table(module), families.abstract(module))
    weights = family.draw({name: spec.shape for name, spec in names.items()})
    assert [(name, list(weights[name].shape)) for name in sorted(weights)] == list(
        map(tuple, GOLDEN.peers[case]["tensors"])
    )
    places = GOLDEN.named(case, np.arange(sum(x.size for x in weights.values()), dtype=np.float32))
    return module, convert.params(module, weights), convert.params(module, places)


def distances(case, model, params, places) -> dict[str, float]:
    """Return the largest differences of outputs, detections, losses and gradients, in units of the peer's."""
    told, kept = GOLDEN.peers[case], GOLDEN.under(case)
    samples = None
    if case == TRAINS:
        first, second = (
            family.Drawn(*(kept[f"samples/{stage}/{name}"] for name in family.Drawn._fields)) for stage in STAGES
        )
        samples = first, second
    mine = jax.device_get(family.ours(model, rows(case), samples)(params))
    out, seen = mine["outputs"], mine["detections"]
    listed = {name: getattr(out, name)[out.valid] for name in ("proposals", "logits", "refined")}
    listed |= {name: getattr(out, name)[:, ::_EVERY] for name in ("objectness", "deltas")}
    listed |= {name: getattr(seen, name)[seen.valid] for name in ("boxes", "scores")}
    counted = [told["proposals"], told["detections"]] == [x.sum(axis=1).tolist() for x in (out.valid, seen.valid)]
    found = {name: _farthest(got, kept[name]) if counted else np.inf for name, got in listed.items()}
    found["classes"] = 0.0 if counted and (seen.classes[seen.valid] + 1 == kept["classes"]).all() else np.inf
    if samples is None:
        return found
    found["losses"] = max(apart(mine["losses"][name], want) for name, want in told["losses"].items())
    return found | {"gradients": GOLDEN.steepest(case, mine["gradients"], statistics.split(places)[0])}


def _farthest(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / want.std())


def _head(**changes):
    return lambda model: model.clone(cfg=replace(model.cfg, **changes))


_SAME = ("objectness", "deltas", "proposals")
WRONG = {
    "a detector's epsilon": (CASES[1], lambda model: change(model, norm_epsilon=1e-3), {"objectness": 3}, ()),
    "a detector's crops": (CASES[1], _head(sampling=2), {"logits": 3, "refined": 3}, _SAME),
}


def covered(models):
    """Assert that the cases differ in blocks, norms, levels and channels."""
    configs = [model.backbone.cfg for model in models]
    assert {(cfg.block, cfg.norm_frozen, len(cfg.depths), cfg.in_channels) for cfg in configs} == {
        ("basic", True, 3, 3), ("bottleneck", False, 2, 1)
    }  # fmt: skip
