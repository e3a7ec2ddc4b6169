"""The model that a checkpoint describes: what is found again, and what is refused. All models: test_every_model.py."""

import importlib
from pathlib import Path

import flax.linen as nn
import pytest

from fm_jax.checkpoint import model as models
from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.models.language import decoder
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.vision import mae, resnet, vit

GPT = decoder.Decoder(decoder.tiny())
MODELS = Path(models.__file__).parents[1] / "models"


def test_every_model_of_the_house_is_in_the_table():
    files = [file.relative_to(MODELS).with_suffix("") for file in MODELS.glob("*/*.py") if file.stem != "__init__"]
    found = [importlib.import_module(f"fm_jax.models.{'.'.join(file.parts)}") for file in files]
    whole = {
        models.name(cls)
        for module in found
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__
        if hasattr(cls, "sites")
    }
    assert len(whole) >= 14 and set(models.CLASSES) == whole


def test_a_head_is_described_with_what_it_stands_on():
    data = models.describe(Classifier(GPT, 3, "last", bias=False))
    assert (data["class"], data["num_classes"], data["pool"]) == ("language.classifier.Classifier", 3, "last")
    assert data["backbone"]["class"] == "language.decoder.Decoder" and data["backbone"]["cfg"]["num_layers"] == 2


@pytest.mark.parametrize("cfg", [decoder.tiny(), resnet.tiny(), vit.tiny()])
def test_a_config_alone_makes_its_model(cfg):
    made = models.of(cfg)
    assert made.cfg is cfg and type(made).__module__ == type(cfg).__module__


def test_a_config_that_is_not_enough_is_refused():
    with pytest.raises(ConfigError, match=r"made of a vision\.mae\.Config alone"):
        models.of(mae.decoder(1, 16, 2))


def test_a_model_that_could_not_be_opened_again_is_refused_before_it_is_trained():
    with pytest.raises(ConfigError, match=r"flax.*Dense is not among the classes of fm_jax/checkpoint/model\.py"):
        models.describe(nn.Dense(3))


CLASS = models.describe(GPT)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, r"runs/old does not name its model.*check out the revision that trained it.*hub_convert"),
        ({"git": None}, r"check out the revision that trained it"),
        ({"git": {"revision": "abc123"}}, r"check out abc123"),
        (
            {"model": {"class": "os.system"}},
            r"class 'os\.system', which is unknown; known are language\.classifier\.Classifier",
        ),
        ({"model": "language.decoder.Decoder"}, r"class 'language.decoder.Decoder', which is unknown"),
        ({"model": {**CLASS, "depth": 3}}, r"has no depth; it may need a later version"),
        ({"model": {**CLASS, "cfg": {"vocab_size": 3}}}, r"Decoder cannot be built: key \w+ is missing"),
        ({"model": {"class": CLASS["class"]}}, r"Decoder cannot be built"),
        ({"model": {"class": "language.masked_lm.MaskedLM", "backbone": 3}}, r"class 3, which is unknown"),
    ],
)
def test_what_describes_no_model_is_refused_and_never_imported(meta, message):
    with pytest.raises(CheckpointError, match=message):
        models.build(meta, "runs/old")
