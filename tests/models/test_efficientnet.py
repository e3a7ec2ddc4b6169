from dataclasses import replace

import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import statistics, tree
from fm_jax.core.errors import ConfigError
from fm_jax.models.vision import efficientnet
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.models.vision.efficientnet import Config, EfficientNet, Stage
from tests.close import about, close

TINY = efficientnet.tiny()
X = np.random.default_rng(0).normal(size=(6, 17, 12, 3)).astype(np.float32)


def init(model, x=X):
    return jax.jit(lambda key: meta.unbox(model.init(key, x)["params"]))(jax.random.key(0))


def shapes(cfg):
    model = ImageClassifier(EfficientNet(cfg), 1000)
    return meta.unbox(jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"])


@pytest.mark.parametrize(("number", "count"), [(0, 5_288_548), (1, 7_794_184), (3, 12_233_232)])
def test_presets_have_the_published_sizes(number, count):
    assert tree.count(statistics.split(shapes(efficientnet.efficientnet(number)))[0]) == count


def test_widths_are_rounded_to_eights_and_never_below_nine_tenths():
    assert Config().channels(320) == 320
    assert Config(1.1).channels(16) == 16  # 17.6: 16 is 91 % of it
    assert Config(1.4).channels(32) == 48  # 44.8
    assert Config(0.35).channels(32) == 16  # 11.2: 8 would be 71 %
    assert Config(0.1).channels(16) == 8
    assert Config(depth=1.1).repeats(Stage(2, 3, 1, 1, 8)) == 3


def test_the_blocks_that_pad_evenly_at_the_published_sizes():
    """As the public checkpoints of B0 … B7 list them in their config.json."""
    published = [(), (16,), (5, 8, 16), (5, 18), (6,), (13, 27), (31,), (18,)]
    assert [efficientnet.efficientnet(number).odd_blocks() for number in range(8)] == published


def test_the_narrow_layer_is_a_quarter_of_the_blocks_input():
    params = shapes(Config())["backbone"]
    assert params["stage1_block0"]["squeeze"]["reduce"]["kernel"].shape == (1, 1, 32, 8)
    assert params["stage2_block0"]["squeeze"]["reduce"]["kernel"].shape == (1, 1, 96, 4)
    assert params["stage7_block0"]["squeeze"]["reduce"]["kernel"].shape == (1, 1, 1152, 48)


@pytest.mark.parametrize("size", [(16, 12), (17, 13), (18, 15)])
def test_every_stride_rounds_up(size):
    model = EfficientNet(TINY)
    x = np.zeros((1, *size, 3), np.float32)
    out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), x, method="hidden"))[0]
    assert out.shape == (1, -(-size[0] // 4), -(-size[1] // 4), 32)


def test_depth_is_dropped_in_training_only_and_linearly(monkeypatch):
    rates = []

    class Noted(efficientnet.DropPath):
        def __call__(self, x):
            rates.append(self.rate)
            return super().__call__(x)

    monkeypatch.setattr(efficientnet, "DropPath", Noted)
    model = EfficientNet(replace(TINY, stages=(Stage(3, 3, 1, 1, 8), Stage(2, 3, 1, 1, 8)), drop_path=0.4))
    params = init(model)
    close(rates, [0.4 * block / 5 for block in (1, 2, 4)], 1e-9)  # firsts have no shortcut
    plain = jax.jit(model.apply)({"params": params}, X)
    noisy = jax.jit(lambda key: model.apply({"params": params}, X, rngs={"dropout": key}))
    kept, other = (noisy(jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(kept - plain).max() > 1e-3 < np.abs(kept - other).max()
    quiet = EfficientNet(replace(model.cfg, drop_path=0.0))
    dropless = jax.jit(lambda key: quiet.apply({"params": params}, X, rngs={"dropout": key}))(jax.random.key(0))
    close(dropless, plain, 2e-5)


def test_signals_keep_their_size_at_the_start():
    """Every filter of a depthwise layer sees k² numbers: drawn as if it saw k² · C they would fall below epsilon."""
    model = EfficientNet(TINY)
    params = init(model)
    kernel = np.asarray(params["stage2_block1"]["filter"]["kernel"])
    assert kernel.shape == (3, 3, 1, 64)
    about(kernel.std(), (2 / 9) ** 0.5, 0.1)
    out, _ = jax.jit(lambda x: model.apply({"params": params}, x, mutable=["statistics"], method="hidden"))(X)
    assert 0.1 < float(out.std()) < 2


def test_an_image_alone_is_classified_as_in_a_batch():
    model = ImageClassifier(EfficientNet(TINY), 5, dropout=0.5)
    params = init(model)
    apply = jax.jit(lambda x: model.apply({"params": params}, x))
    alone = np.concatenate([apply(X[row : row + 1]) for row in range(len(X))])
    close(alone, apply(X))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: efficientnet.efficientnet(8), "must be 0 to 7, not 8"),
        (lambda: replace(TINY, width=0.0), "width must be above 0"),
        (lambda: replace(TINY, drop_path=1.0), r"drop_path must be in \[0, 1\), not 1.0"),
        (lambda: replace(TINY, stages=()), "at least one"),
        (lambda: replace(TINY, stages=(Stage(1, 4, 1, 1, 8),)), "its size odd"),
        (lambda: init(EfficientNet(TINY), X[..., :2]), r"images must be \[B, H, W, 3\], not \[6, 17, 12, 2\]"),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
