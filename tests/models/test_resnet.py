from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from fm_jax.core import sharding, statistics, tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.models.vision import resnet
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.objectives.classify import softmax
from fm_jax.train import state
from fm_jax.train.step import make_train_step
from tests.close import close

TINY = resnet.tiny()
X = np.random.default_rng(0).normal(size=(8, 12, 10, 3)).astype(np.float32)


def init(model, x=X):
    return jax.jit(lambda key: meta.unbox(model.init(key, x)["params"]))(jax.random.key(0))


def trained(cfg, classes, size=64):
    """Count the parameters of a classifier, running statistics left out."""
    model = ImageClassifier(resnet.ResNet(cfg), classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, size, size, 3), np.float32))["params"]
    return tree.count(statistics.split(meta.unbox(shapes))[0])


@pytest.mark.parametrize(
    ("preset", "classes", "count"),
    [
        (resnet.resnet18, 1000, 11_689_512),
        (resnet.resnet34, 1000, 21_797_672),
        (resnet.resnet50, 1000, 25_557_032),
        (resnet.resnet20, 10, 269_722),
        (resnet.resnet56, 10, 853_018),
        (partial(resnet.plain, 20), 10, 269_722),  # shortcuts of the CIFAR form have no parameters
    ],
)
def test_presets_have_the_published_sizes(preset, classes, count):
    assert trained(preset(), classes) == count


def test_a_multiplier_scales_every_width():
    assert resnet.resnet50(0.25).widths == (64, 128, 256, 512)
    assert resnet.resnet50(0.25).stem_width == 16


@pytest.mark.parametrize(
    ("cfg", "shape"),
    [
        (resnet.Config((1, 1), (8, 16), "basic", stem_width=8), (2, 2, 16)),
        (replace(TINY, depths=(1, 1, 1), widths=(8, 16, 16)), (3, 3, 16)),
        (replace(TINY, block="bottleneck", stride_first=True), (6, 5, 16)),
    ],
)
def test_every_stage_but_the_first_halves_the_image(cfg, shape):
    model = resnet.ResNet(cfg)
    out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), X, method="hidden"))[0]
    assert out.shape == (8, *shape)


def test_every_block_is_its_shortcut_at_the_start():
    cfg = replace(TINY, depths=(3,), widths=(8,))
    model = resnet.ResNet(cfg)
    params = init(model)
    without = resnet.ResNet(replace(cfg, depths=(1,)))
    short = {**params, "stage1": {"block0": params["stage1"]["block0"]}}
    close(model.apply({"params": params}, X), without.apply({"params": short}, X))
    live = init(resnet.ResNet(replace(cfg, zero_init=False)))
    assert np.abs(model.apply({"params": live}, X) - model.apply({"params": params}, X)).max() > 0.1


def test_a_plain_network_starts_alive():
    """Nothing but its layers carries the image: a last scale of 0 would kill it."""
    model = resnet.ResNet(replace(TINY, shortcut="none"))
    assert np.asarray(model.apply({"params": init(model)}, X)).std() > 0.01


def test_a_padded_shortcut_thins_the_image_and_adds_empty_channels():
    model = resnet.ResNet(replace(TINY, shortcut="pad"))
    params = init(model)
    assert "shortcut" not in params["stage2"]["block0"]
    apply = partial(model.apply, {"params": params}, X, mutable=["taps"], method="hidden")
    _, kept = apply(tap=resnet.Tap(read=("conv.stage1", "conv.stage2")))
    first, second = (kept["taps"][f"site:conv.stage{stage}"] for stage in (1, 2))
    close(second[..., :8], first[:, ::2, ::2])  # the last scale is 0 yet
    assert not second[..., 8:].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet.cifar(19), r"6n \+ 2 layers .* not 19"),
        (lambda: replace(TINY, depths=(1,)), "must have one entry per stage"),
        (lambda: replace(TINY, depths=(0, 1)), "depths must be at least 1"),
        (lambda: replace(TINY, block="bottleneck", widths=(6, 12)), "multiples of 4"),
        (lambda: replace(TINY, shortcut="pad", widths=(16, 8)), "must not decrease"),
        (lambda: replace(TINY, norm_momentum=1.0), "norm_momentum in"),
        (lambda: init(resnet.ResNet(TINY), X[..., :1]), r"images must be \[B, H, W, 3\], not \[8, 12, 10, 1\]"),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_image_alone_is_classified_as_in_a_batch():
    model = ImageClassifier(resnet.ResNet(TINY), 5)
    params = init(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + rng.uniform(0, 0.5, leaf.shape).astype(np.float32) / leaf.ndim**4, params)
    apply = jax.jit(lambda x: model.apply({"params": params}, x))
    whole = apply(X)
    alone = np.concatenate([apply(X[row : row + 1]) for row in range(len(X))])
    close(alone, whole)
    batch, _ = jax.jit(lambda x: model.apply({"params": params}, x, mutable=["statistics"]))(X)
    assert np.abs(batch - whole).max() > 0.1  # in training they are not


def trained_steps(cfg, devices=None):
    """Return losses, trained leaves and running statistics of three steps, rows of unlike images on every device."""
    mesh = make_mesh(cfg, devices)
    model = ImageClassifier(resnet.ResNet(replace(TINY, depths=(1,), widths=(16,))), 5)
    rng = np.random.default_rng(2)
    image = (rng.normal(size=(16, 8, 8, 3)) * np.arange(1, 17).reshape(16, 1, 1, 1) / 8).astype(np.float32)
    batch = {"image": image, "label": rng.integers(0, 5, 16).astype(np.int32), "weights": np.ones(16, np.float32)}
    batch["weights"][[3, 4, 5]] = 0  # unequally many rows count on each device
    params = state.init_params(model, [image], jax.random.key(0), mesh)
    tx = optax.sgd(0.1, momentum=0.9)
    now = state.place(lambda p, frozen: state.create(p, tx, frozen=frozen, ema=False), *statistics.split(params), mesh)
    layouts = [jax.tree.map(lambda leaf: leaf.sharding, now.frozen)]
    losses = []
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(softmax(model.apply, ("image",)), tx, key=jax.random.key(1)))
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        for _ in range(3):
            now, metrics = step(now, batch)
            losses.append(float(metrics["loss"]))
    layouts.append(jax.tree.map(lambda leaf: leaf.sharding, now.frozen))
    for one, two in zip(*map(jax.tree.leaves, layouts), strict=True):
        assert one.is_equivalent_to(two, 1)
    return losses, jax.device_get(now.params), jax.device_get(now.frozen)


def test_statistics_are_those_of_all_devices():
    """Eight devices with two rows each: the moments, the loss and the step are those of one device with sixteen."""
    one = trained_steps(MeshConfig(data=1), jax.devices()[:1])
    start = {"mean": 0.0, "var": 1.0}
    assert all(np.abs(leaf - start[path[-1].key]).max() > 1e-3 for path, leaf in jax.tree.leaves_with_path(one[2]))
    for cfg in (MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)):
        many = trained_steps(cfg)
        for got, want in zip(*map(jax.tree.leaves, (many, one)), strict=True):
            close(got, want, 5e-5, scale=max(1.0, float(np.abs(want).max())))


def test_no_device_gets_the_rows_of_another():
    """On this mesh XLA's partitioner swapped them where a kernel was split along the axis that splits the batch too."""
    model = resnet.ResNet(TINY)
    boxed = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    params = init(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.05, leaf.shape).astype(np.float32), params)
    apply = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    want = jax.jit(apply)(params, X)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, X), (sharding.shardings(boxed, mesh), sharding.batch_sharding(mesh)))
        close(jax.jit(apply)(*placed), want)


def test_computing_in_bfloat16_keeps_float32_features_and_statistics():
    model = resnet.ResNet(replace(TINY, dtype="bfloat16"))
    params = init(model)
    out, new = jax.jit(lambda x: model.apply({"params": params}, x, mutable=["statistics"]))(X)
    assert out.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
    apply = jax.jit(lambda x: resnet.ResNet(TINY).apply({"params": params}, x, mutable=["statistics"]))
    want, _ = apply(X)
    close(out, want, 0.1)
