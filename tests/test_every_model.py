"""What every model of the house promises, whatever it models. A new model is one line in MODELS."""

import json
import sys
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from fm_jax.checkpoint import model as models
from fm_jax.core import sharding, statistics, tree
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.interpret import capture
from fm_jax.layers import tap as taps
from fm_jax.layers.tap import Tap
from fm_jax.models.language import classifier, decoder, encoder, encoder_decoder, masked_lm, sentence, span, tagger
from fm_jax.models.multimodal import clip
from fm_jax.models.vision import efficientnet, faster_rcnn, mae, resnet, vit, yolov3, yolox
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.simclr import SimCLR
from fm_jax.objectives import image_text
from tests.close import close

ROWS = 8


def ids(time: int, vocab_size: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (ROWS, time), dtype=np.int32)


GPT = decoder.tiny()
LLAMA = replace(decoder.llama(2, 32, 4, 2, 64, vocab_size=96), init_std=0.0)
MIXED = replace(GPT, attention=replace(GPT.attention, windows=(0, 4)), scale_by_depth=True, remat="dots")
BERT = encoder.Encoder(encoder.tiny())
ALBERT = encoder.Encoder(replace(BERT.cfg, num_layers=3, embed_size=16, shared=True, remat="full"))
GROUPS = encoder.Encoder(replace(ALBERT.cfg, num_layers=4, shared=(2, 1)))
T5 = encoder_decoder.tiny()
GATED = replace(T5.mlp, activation="gelu_tanh", gated=True)
T5_V1_1 = replace(T5, num_encoder_layers=3, mlp=GATED, tied=False, scale_head=False, remat="dots")
TYPES = np.tile(np.arange(16) > 6, (ROWS, 1)).astype(np.int32)
IMAGE = np.random.default_rng(0).normal(size=(ROWS, 8, 8, 3)).astype(np.float32)
PHOTO = np.random.default_rng(0).normal(size=(ROWS, 32, 32, 3)).astype(np.float32)
NOISE = np.random.default_rng(1).uniform(size=(ROWS, 16)).astype(np.float32)
VIT = vit.ViT(replace(vit.tiny(), registers=2, layer_scale=0.5, pool="both", mlp=vit.MLPConfig(64, "silu", gated=True)))
CLIP = clip.tiny()
SIGLIP = replace(
    clip.siglip(replace(vit.tiny(), num_layers=1), 2, 4, vocab_size=96),
    text=replace(CLIP.text, attention=replace(CLIP.text.attention, causal=False), remat="dots"),
)
LENGTHS, FULL = np.arange(9, 17, dtype=np.int32), np.full(ROWS, 16, np.int32)
CAPTIONS = np.where(np.arange(16)[None] == LENGTHS[:, None] - 1, 95, ids(16, 95)).astype(np.int32)


class Joined(nn.Module):
    """A model of several outputs, seen as one array."""

    inner: nn.Module

    @property
    def sites(self):
        return self.inner.sites

    def __call__(self, *inputs, tap=None):
        return jnp.stack(self.inner(*inputs, tap=tap), axis=1)


class Compared(Joined):
    """A model of images and texts, seen as its logits."""

    def __call__(self, *inputs, tap=None):
        return image_text.logits(self.inner(*inputs, tap=tap))


class Flat(Joined):
    """A model of several outputs of different shapes, seen as one array of those that `keep` names."""

    keep: tuple[str, ...] = ()

    def __call__(self, *inputs, tap=None):
        found = self.inner(*inputs, tap=tap)._asdict()
        return jnp.concatenate([found[name].reshape(ROWS, -1) for name in self.keep], axis=1)


YOLO3 = replace(yolov3.tiny(), head_widths=(32, 16), remat="full")  # eight devices divide every width
RCNN_HEAD, RCNN_BASE = faster_rcnn.tiny()
RCNN = faster_rcnn.FasterRCNN(RCNN_HEAD, resnet.ResNet(replace(RCNN_BASE, zero_init=False, remat="full")))
SCENE = np.random.default_rng(0).normal(size=(ROWS, 32, 32, 3)).astype(np.float32)


class Detected(Joined):
    """A detector, whose outputs are of one anchor point each.

    It is deep, and with running moments of 0 and 1 nothing of an image would arrive at the end of its small kernels.
    """

    gain = 2.0

    def __call__(self, *inputs, tap=None):
        raw = self.inner(*inputs, tap=tap)
        return jnp.concatenate([raw.boxes, raw.objectness[..., None], raw.classes], axis=-1)


# name, module, its inputs (every array has the batch first)
MODELS: list[tuple[str, nn.Module, tuple[np.ndarray, ...]]] = [
    ("gpt", decoder.Decoder(GPT), (ids(16),)),
    ("gpt3, rematerialised", decoder.Decoder(MIXED), (ids(16),)),
    ("llama", decoder.Decoder(LLAMA), (ids(16),)),
    ("classifier", classifier.Classifier(decoder.Decoder(GPT), 6), (ids(16), LENGTHS)),
    ("bert", BERT, (ids(16),)),
    ("albert, rematerialised", ALBERT, (ids(16),)),
    ("masked words, albert in groups", masked_lm.MaskedLM(GROUPS), (ids(16),)),
    ("bert's classifier", classifier.Classifier(BERT, 6, "first", hidden="tanh"), (ids(16), LENGTHS, TYPES)),
    ("electra's discriminator", tagger.discriminator(BERT), (ids(16), LENGTHS)),
    ("span", Joined(span.SpanFinder(BERT)), (ids(16), FULL, TYPES)),
    ("t5", encoder_decoder.EncoderDecoder(T5), (ids(16), ids(12), LENGTHS - 4)),
    ("t5 v1.1, rematerialised", encoder_decoder.EncoderDecoder(T5_V1_1), (ids(16), ids(12), LENGTHS - 4)),
    ("sentence", sentence.SentenceEncoder(BERT, normalise=True), (ids(16), LENGTHS)),
    ("resnet", ImageClassifier(resnet.ResNet(resnet.tiny()), 6), (IMAGE,)),
    ("efficientnet", ImageClassifier(efficientnet.EfficientNet(efficientnet.tiny()), 6), (IMAGE,)),
    ("simclr", SimCLR(resnet.ResNet(resnet.tiny()), 8), (IMAGE,)),
    ("yolox, rematerialised", Detected(yolox.YOLOX(replace(yolox.tiny(), remat="full"))), (PHOTO,)),
    ("vit, scaled and gated", ImageClassifier(VIT, 6), (IMAGE,)),
    ("faster r-cnn, rematerialised", Flat(RCNN, ("objectness", "deltas", "logits", "refined")), (SCENE,)),
    ("clip", Compared(clip.CLIP(CLIP)), (IMAGE, CAPTIONS)),
    ("siglip, rematerialised", Compared(clip.CLIP(SIGLIP)), (IMAGE, ids(16))),
    ("mae", mae.MAE(mae.decoder(1, 16, 2), vit.ViT(vit.tiny())), (IMAGE, NOISE)),
    (
        "yolov3, rematerialised",
        Flat(yolov3.YOLOv3(YOLO3), ("boxes", "objectness", "classes")),
        (IMAGE,),
    ),
]

MESHES = [
    pytest.param(MeshConfig(data=8), marks=pytest.mark.slow),  # the two below hold what these two do, and more
    pytest.param(MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
]


@dataclass(frozen=True, eq=False)
class Case:
    """A model with everything that several tests ask of it, computed once."""

    model: nn.Module
    inputs: tuple[np.ndarray, ...]

    @cached_property
    def boxed(self) -> Any:
        """The abstract parameters with their logical names."""
        return jax.eval_shape(lambda key: self.model.init(key, *self.inputs), jax.random.key(0))["params"]

    @cached_property
    def params(self) -> Any:
        """Fresh parameters, all moved a little: a zero bias would hide what is done to it."""
        fresh = jax.jit(lambda key: meta.unbox(self.model.init(key, *self.inputs)["params"]))(jax.random.key(0))
        rng = np.random.default_rng(1)
        gain = getattr(self.model, "gain", 1.0)
        return jax.tree.map(
            lambda leaf: (gain if leaf.ndim > 1 else 1) * leaf + rng.normal(0, 0.05, leaf.shape).astype(np.float32),
            fresh,
        )

    @cached_property
    def readout(self) -> np.ndarray:
        shape = jax.eval_shape(self.apply, self.params, *self.inputs).shape
        return np.random.default_rng(2).normal(size=shape).astype(np.float32)

    def apply(self, params: Any, *inputs: Any) -> jax.Array:
        return self.model.apply({"params": params}, *inputs)

    def output_and_gradient(self, params: Any, *inputs: Any) -> tuple[jax.Array, Any]:
        def score(params):
            out = self.apply(params, *inputs)
            return (out * self.readout).sum(), out

        gradient, out = jax.grad(score, has_aux=True)(params)
        return out, gradient

    @cached_property
    def whole(self) -> tuple[jax.Array, Any]:
        """The compiled output and gradient on one device."""
        return jax.jit(self.output_and_gradient)(self.params, *self.inputs)


@cache
def case(index: int) -> Case:
    return Case(*MODELS[index][1:])


SLOW = ("yolox, rematerialised", "yolov3, rematerialised", "siglip, rematerialised")  # up to a minute to compile
every_model = pytest.mark.parametrize(
    "case",
    [pytest.param(i, marks=[pytest.mark.slow] * (name in SLOW)) for i, (name, *_) in enumerate(MODELS)],
    ids=[model[0] for model in MODELS],
    indirect=True,
)


@pytest.fixture(name="case")
def made(request):
    return case(request.param)


@every_model
def test_outputs_are_finite_float32_for_every_row(case):
    out, _ = case.whole
    assert out.dtype == jnp.float32
    assert out.shape[0] == ROWS
    assert np.isfinite(out).all()
    assert float(np.std(out, axis=0).min()) > 0  # rows are not mixed up into one


@every_model
def test_jit_computes_what_plain_python_does(case):
    close(case.apply(case.params, *case.inputs), case.whole[0])


@every_model
def test_the_gradient_reaches_every_parameter(case):
    gradient = tree.flatten(case.whole[1])
    assert gradient.keys() == tree.flatten(case.params).keys()
    assert all(np.isfinite(leaf).all() for leaf in gradient.values())
    running = tree.flatten(statistics.split(case.params)[1])  # never trained
    # A bias of the keys adds the same number to all scores of a query: its gradient is zero but for rounding.
    keys = {path for path in gradient if path.endswith("attn/k/bias")}
    assert {path for path, leaf in gradient.items() if not leaf.any()} - keys == running.keys()


@every_model
def test_every_parameter_names_its_axes(case):
    """The tree of layouts is the tree of parameters, and each name has a rule."""
    boxes = jax.tree_util.tree_leaves_with_path(case.boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
    unnamed = [path for path, leaf in boxes if not isinstance(leaf, nn.Partitioned)]
    assert not unnamed
    layouts = sharding.shardings(case.boxed, make_mesh(MeshConfig()))
    assert jax.tree.structure(layouts) == jax.tree.structure(case.params)
    for layout, (path, leaf) in zip(jax.tree.leaves(layouts), boxes, strict=True):
        assert len(layout.spec) == len(leaf.names) == leaf.value.ndim, path


@every_model
@pytest.mark.parametrize("mesh", MESHES, ids=lambda cfg: f"{cfg.data}-{cfg.fsdp}-{cfg.tensor}-{cfg.sequence}")
def test_a_mesh_changes_nothing(case, mesh):
    mesh = make_mesh(mesh)
    layout = sharding.shardings(case.boxed, mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(case.params, layout)
        inputs = jax.device_put(case.inputs, sharding.batch_sharding(mesh))
        out, gradient = jax.jit(case.output_and_gradient, out_shardings=(None, layout))(params, *inputs)
    ways = [len(leaf.sharding.device_set) // _copies(leaf) for leaf in jax.tree.leaves(params)]
    assert max(ways) == mesh.shape["fsdp"] * mesh.shape["tensor"]  # it was split, and as far as the mesh allows
    close(out, case.whole[0], 5e-5)
    wanted = tree.flatten(case.whole[1])
    for path, leaf in tree.flatten(gradient).items():  # that of a key's bias is rounding: what went into it is not
        close(leaf, wanted[path], 1e-4, scale=max(1.0, float(np.abs(wanted[path]).max())))


def _copies(leaf):
    return len(leaf.sharding.device_set) * np.prod(leaf.sharding.shard_shape(leaf.shape)) // leaf.size


@every_model
def test_without_a_tap_the_program_is_the_untapped_one(case, monkeypatch):

    def program():
        # a function of its own each time: JAX remembers what it traced, and would give the first program again
        return str(jax.make_jaxpr(lambda *arrays: case.apply(*arrays))(case.params, *case.inputs))

    traced = program()
    stubs = {taps.visit: lambda module, tap, site, x: x, taps.touches: lambda tap, prefix: False}
    for name, module in list(sys.modules.items()):
        for real, stub in stubs.items():
            if name.startswith("fm_jax.") and getattr(module, real.__name__, None) is real:
                monkeypatch.setattr(module, real.__name__, stub)
    assert program() == traced


@every_model
def test_every_declared_site_can_be_read_and_no_other_exists(case):
    assert set(capture.shapes(case.model, case.params, *case.inputs)) == set(case.model.sites)


@every_model
def test_an_edit_at_every_site_and_layer_changes_the_output(case):
    """No edit may do nothing in silence. Edits are data, so one compiled program serves them all."""
    found = capture.shapes(case.model, case.params, *case.inputs)
    rng = np.random.default_rng(3)
    noise = {site: rng.normal(size=shape.shape).astype(np.float32) for site, shape in found.items()}
    nowhere = {site: np.zeros(shape.shape, bool) for site, shape in found.items()}

    @jax.jit
    def edited(put, add):
        """Overwrite the sites where `put` is true; add noise where `add` is."""
        tap = Tap(put={site: (put[site], noise[site]) for site in noise}, add=jax.tree.map(jnp.multiply, add, noise))
        return capture.apply(case.model, case.params, *case.inputs, tap=tap)[0]

    plain = edited(nowhere, nowhere)
    close(plain, case.whole[0])
    silent = []
    for site, shape in found.items():
        for layer in range(shape.shape[0]) if taps.is_stacked(site) else [...]:
            there = nowhere[site].copy()
            there[layer] = True
            one = {**nowhere, site: there}
            for kind, out in (("put", edited(one, nowhere)), ("add", edited(nowhere, one))):
                if float(jnp.abs(out - plain).max()) < 1e-3:
                    silent.append((kind, site, layer))
    assert not silent


def test_a_model_need_not_know_of_devices():
    """An output may be laid out as the caller likes."""
    made = case(0)
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
        out = jax.jit(made.apply, out_shardings=split)(made.params, *made.inputs)
    assert out.sharding.shard_shape(out.shape) == (ROWS // 2, 16, 24)
    close(out, made.whole[0])


@pytest.mark.parametrize("model", [model for _, model, _ in MODELS], ids=[name for name, *_ in MODELS])
def test_a_checkpoint_gives_back_the_model_that_it_describes(model):
    inner = model.inner if isinstance(model, Joined | Flat) else model
    data = json.loads(json.dumps(models.describe(inner)))
    assert models.build({"model": data}, "runs/one") == inner
