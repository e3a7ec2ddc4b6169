"""What we make of an image by a preprocessor_config.json against what transformers' processors make of it."""

import json

import numpy as np
import pytest
import transformers

from fm_jax.data.images import pictures, scenes
from fm_jax.hub import preprocessing, pretrained
from fm_jax.hub.preprocessing import Preprocessing
from tests.close import close
from tests.hub import forms

TOLERANCE = 1e-5  # of normalised values: both scale by Pillow, and differ by float32's rounding
RNG = np.random.default_rng(0)
SIZES = [(32, 32), (36, 36), (40, 52), (61, 40), (33, 90), (20, 31)]

# (class, fields)
FILES = [
    ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
    ("ViTImageProcessor", {"size": 32, "resample": 0, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
    ("DeiTImageProcessor", {"size": 32, "do_center_crop": None, "do_normalize": None}),
    ("EfficientNetImageProcessor", {"size": 32, "include_top": None}),
    ("ViTImageProcessor", {"size": 36, "do_center_crop": True, "crop_size": 32, "do_normalize": False}),
    ("DeiTImageProcessor", {"size": 36, "crop_size": 32}),
    ("ConvNextImageProcessor", {"size": 32, "crop_pct": 0.875}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.94, "resample": 2}),
    ("ConvNextImageProcessor", {"size": 400}),
    ("EfficientNetImageProcessor", {"size": 32, "image_std": [0.48, 0.47, 0.46]}),
    ("EfficientNetImageProcessor", {"size": 32, "include_top": False, "rescale_offset": True, "rescale_factor": 0.007}),
    ("EfficientNetImageProcessor", {"size": 32, "do_normalize": False, "do_center_crop": True, "crop_size": 28}),
    ("BitImageProcessor", {"size": 36, "crop_size": 32}),
    ("CLIPImageProcessor", {"size": 36, "crop_size": 32}),
    ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}}),
    ("BitImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}, "resample": 2}),
    ("BitImageProcessor", {"size": 36, "crop_size": 32, "do_rescale": False, "image_mean": 100, "image_std": 50}),
]


def theirs(folder, image):
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(image, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]


def compare(folder, found):
    for height, width in SIZES:
        image = RNG.integers(0, 256, (height, width, 3), np.uint8)
        want = theirs(folder, image).transpose(1, 2, 0)
        got = found.view(image)
        assert got.shape == want.shape
        close(got, want, TOLERANCE, scale=max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize(("kind", "fields"), FILES)
def test_an_image_is_seen_as_transformers_sees_it_and_so_it_is_handed_on(kind, fields, tmp_path):
    (tmp_path / preprocessing.FILE).write_text(json.dumps({"image_processor_type": kind, **fields}))
    found = preprocessing.read(tmp_path, "")
    compare(tmp_path, found)
    (tmp_path / "again").mkdir()
    preprocessing.write(tmp_path / "again", found)
    compare(tmp_path / "again", found)
    getattr(transformers, f"{kind}Pil")(**fields).save_pretrained(tmp_path / "theirs")
    assert preprocessing.read(tmp_path / "theirs", "") == found


@pytest.mark.parametrize("kind", preprocessing._DEFAULTS)
def test_what_a_file_leaves_out_is_as_in_transformers(kind, tmp_path):
    """An empty file of a class, against the class's own defaults written out."""
    (tmp_path / preprocessing.FILE).write_text(json.dumps({"image_processor_type": kind}))
    getattr(transformers, f"{kind}Pil")().save_pretrained(tmp_path / "full")
    assert preprocessing.read(tmp_path, "") == preprocessing.read(tmp_path / "full", "")


@pytest.mark.parametrize("name", ["vit", "mae", "dinov2", "resnet", "efficientnet"])
def test_a_file_that_names_no_class_is_the_families(name, tmp_path):
    config = forms.FORMS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / preprocessing.FILE).write_text(json.dumps({"size": 32, "crop_size": 32}))
    found = preprocessing.read(tmp_path, config["model_type"])
    compare(tmp_path, found)


@pytest.mark.parametrize("name", ["vit", "registers", "resnet", "efficientnet"])
def test_a_folder_of_ours_tells_transformers_what_our_evaluation_shows(name, tmp_path):
    model, _ = forms.build(forms.FORMS[name])
    cfg = pictures.Config(
        scenes.Config(),
        size=8 if name == "vit" else 32,
        mean=pictures.IMAGENET_MEAN,
        std=pictures.IMAGENET_STD,
        center_crop=0.8,
    )
    pretrained.save(tmp_path / "folder", model, forms.draw(model), preprocessing=preprocessing.of(cfg))
    compare(tmp_path / "folder", preprocessing.of(cfg))
    found = pretrained.load(tmp_path / "folder").preprocessing
    assert isinstance(found, Preprocessing) and preprocessing.onto(cfg, found) == cfg
    shown = pictures.Evaluation(
        Still([RNG.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]), cfg, pictures.Labels(1)
    )
    for index in range(len(shown)):
        want = theirs(tmp_path / "folder", shown._decodable.pictures.images[index]).transpose(1, 2, 0)
        close(shown[index]["image"], want, TOLERANCE)


class Still:
    """Images that are there already."""

    name, fingerprint, classes = "stills", "none", ("one",)

    def __init__(self, images):
        self.images = list(images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], 0

    def id(self, index):
        return str(index)
