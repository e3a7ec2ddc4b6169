"""preprocessor_config.json; what transformers makes of it is compared in tests/parity/test_preprocessing.py.

The files have the forms and numbers of public checkpoints of their families, as far as these decide what is seen.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import CheckpointError, ConfigError
from fm_jax.data.images import augment, pictures
from fm_jax.data.images.image import normalise, resize
from fm_jax.hub import preprocessing as hub
from fm_jax.hub import pretrained
from fm_jax.hub.preprocessing import Preprocessing
from fm_jax.models.vision import vit
from tests.close import close
from tests.hub import forms

HALF, IMAGENET = (0.5, 0.5, 0.5), (pictures.IMAGENET_MEAN, pictures.IMAGENET_STD)
IMAGE = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
VALUES = {"image_mean": list(IMAGENET[0]), "image_std": list(IMAGENET[1]), "do_normalize": True, "do_resize": True}
ROOTS = [0.47853944, 0.4732864, 0.47434163]

# name -> (model_type, file, what it means)
PUBLISHED = {
    "vit": (
        "vit",
        {
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
            "image_processor_type": "ViTFeatureExtractor", "image_std": [0.5] * 3, "resample": 2,
            "rescale_factor": 0.00392156862745098, "size": {"height": 224, "width": 224},
        },
        Preprocessing(224, HALF, HALF, stretch=True),
    ),
    "clip": (
        "clip",
        {
            "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 224,
        },
        Preprocessing(
            224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), interpolation="bicubic"
        ),
    ),
    "siglip": (
        "siglip",
        {
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
            "image_processor_type": "SiglipImageProcessor", "image_std": [0.5] * 3,
            "processor_class": "SiglipProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
            "size": {"height": 224, "width": 224},
        },
        Preprocessing(224, HALF, HALF, interpolation="bicubic", stretch=True),
    ),
    "mae": ("vit_mae", {**VALUES, "resample": 2, "size": 224}, Preprocessing(224, *IMAGENET, stretch=True)),
    "deit": (
        "vit",
        {**VALUES, "crop_size": 224, "do_center_crop": True, "feature_extractor_type": "DeiTFeatureExtractor",
         "resample": 3, "size": 256},
        Preprocessing(224, *IMAGENET, 0.875, "bicubic", stretch=True),
    ),
    "resnet": (
        "resnet",
        {**VALUES, "crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3, "size": 224},
        Preprocessing(224, *IMAGENET, 0.875, "bicubic"),
    ),
    "efficientnet": (
        "efficientnet",
        {**VALUES, "image_std": ROOTS, "crop_size": {"height": 289, "width": 289}, "do_center_crop": False,
         "do_rescale": True, "image_processor_type": "EfficientNetImageProcessor", "include_top": True, "resample": 0,
         "rescale_factor": 0.00392156862745098, "rescale_offset": False, "size": {"height": 224, "width": 224}},
        Preprocessing(224, IMAGENET[0], IMAGENET[1], 1.0, "nearest", stretch=True),
    ),
    "dinov2": (
        "dinov2",
        {**VALUES, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True,
         "do_rescale": True, "image_processor_type": "BitImageProcessor", "resample": 3,
         "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256}},
        Preprocessing(224, *IMAGENET, 0.875, "bicubic"),
    ),
}  # fmt: skip


def put(folder: Path, data) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hub.FILE).write_text(json.dumps(data))
    return folder


def same(found: Preprocessing, want: Preprocessing) -> None:
    assert replace(found, mean=want.mean, std=want.std) == want
    close(np.array([found.mean, found.std]), np.array([want.mean, want.std]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_say_what_their_models_want(name, tmp_path):
    kind, data, want = PUBLISHED[name]
    found = hub.read(put(tmp_path, data), kind)
    assert found is not None
    same(found, want)


@pytest.mark.parametrize(
    ("changes", "shift", "scale"),
    [
        ({}, IMAGENET[0], IMAGENET[1]),
        ({"do_normalize": False}, (0.0,) * 3, (1.0,) * 3),
        ({"do_rescale": False}, tuple(x / 255 for x in IMAGENET[0]), tuple(x / 255 for x in IMAGENET[1])),
        ({"do_rescale": False, "do_normalize": False}, (0.0,) * 3, (1 / 255,) * 3),
        ({"rescale_factor": 1 / 127.5}, tuple(x / 2 for x in IMAGENET[0]), tuple(x / 2 for x in IMAGENET[1])),
        ({"image_mean": 0.5, "image_std": 0.25}, HALF, (0.25,) * 3),
    ],
)
def test_all_that_is_done_to_a_value_is_one_shift_and_one_scale(changes, shift, scale, tmp_path):
    found = hub.read(put(tmp_path, {**VALUES, "size": 8, **changes}), "vit")
    close(np.array([found.mean, found.std]), np.array([shift, scale]))


def test_efficientnets_deviation_divides_twice_and_its_values_may_begin_at_minus_one(tmp_path):
    data = {**VALUES, "size": 8, "rescale_factor": 1 / 127.5, "rescale_offset": True, "do_center_crop": False}
    byte = np.full((8, 8, 3), 200, np.uint8)
    for top, normal in ((True, True), (False, True), (True, False)):
        file = put(tmp_path, {**data, "include_top": top, "do_normalize": normal})
        want = 200 / 127.5 - 1
        want = (want - np.array(IMAGENET[0])) / IMAGENET[1] if normal else want
        want = want / np.array(IMAGENET[1]) if top else want
        close(hub.read(file, "efficientnet").view(byte)[3, 4], want)


def test_what_is_seen_is_the_middle_of_the_image_or_of_the_stretched_image():
    found = Preprocessing(14, *IMAGENET, 0.7, "bicubic")
    assert found.scaled == 20
    want = resize(IMAGE, 20, 27, interpolation="bicubic")[3:17, 6:20]
    np.testing.assert_array_equal(found.view(IMAGE), normalise(want, *IMAGENET))
    want = resize(IMAGE, 20, 20, interpolation="bicubic")[3:17, 3:17]
    np.testing.assert_array_equal(replace(found, stretch=True).view(IMAGE), normalise(want, *IMAGENET))


class One:
    """One picture."""

    name, fingerprint, classes = "one", "one", ("a",)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return IMAGE, 0

    def id(self, index):
        return "one"


def test_an_evaluation_shows_the_view_and_a_config_takes_it_over():
    cfg = replace(
        pictures.imagenet(14), center_crop=0.7, recipe=replace(pictures.imagenet().recipe, interpolation="bicubic")
    )
    found = hub.of(cfg)
    seen, _ = augment.centre(IMAGE, cfg.size, cfg.center_crop, interpolation=cfg.recipe.interpolation)
    np.testing.assert_array_equal(found.view(IMAGE), normalise(seen, cfg.mean, cfg.std))
    assert hub.onto(pictures.imagenet(14), found) == cfg
    wide = replace(found, stretch=True)
    rows = pictures.Evaluation(One(), hub.onto(pictures.imagenet(14), wide), pictures.Labels(2))
    np.testing.assert_array_equal(rows[0]["image"], wide.view(IMAGE))
    assert hub.of(hub.onto(pictures.Config(), found)) == found
    assert hub.onto(pictures.Config(), found).source == pictures.Config().source


@pytest.mark.parametrize("center_crop", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("stretch", [False, True])
def test_what_is_written_is_read_again(center_crop, interpolation, stretch, tmp_path):
    found = Preprocessing(32, *IMAGENET, center_crop, interpolation, stretch)
    hub.write(tmp_path, found)
    kind = "ViT" if center_crop == 1 else "DeiT"  # transformers 4's ViTImageProcessor cuts nothing out
    kind = f"{kind if stretch else 'Bit'}ImageProcessor"
    assert json.loads((tmp_path / hub.FILE).read_text())["image_processor_type"] == kind
    again = hub.read(tmp_path, "")
    assert again == replace(found, center_crop=again.center_crop) and again.scaled == found.scaled
    np.testing.assert_array_equal(again.view(IMAGE), found.view(IMAGE))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("vit", {"image_processor_type": "OwlViTImageProcessor"}, "'OwlViTImageProcessor' is not supported; supported"),
        ("bert", {}, "image_processor_type is missing"),
        ("vit", {"resample": 1}, "resample is 1; supported are 0 \\(nearest\\), 2"),
        ("vit", {"do_resize": False}, "do_resize is false"),
        ("vit", {"do_pad": True}, "do_pad is true"),
        ("vit", {"sharpen": 2}, "sharpen \\(2\\) is unknown"),
        ("vit", {"size": {"height": 8, "width": 12}}, 'size {"height": 8, "width": 12} is not supported'),
        ("vit", {"size": {"shortest_edge": 8, "longest_edge": 9}}, "is not supported; give an equal height and width"),
        ("vit", {"size": {"shortest_edge": 8}}, "without do_center_crop gives images of different sizes"),
        ("vit", {"size": "224"}, "is not supported"),
        ("vit", {"size": {}}, "is not supported"),
        ("vit", {"size": True}, "is not supported"),
        ("dinov2", {"crop_size": 9}, "crop_size 9 does not fit into size 8"),
        ("dinov2", {"crop_size": {"shortest_edge": 8}}, "does not fit into size 8"),
        ("dinov2", {"do_center_crop": False}, "images of different sizes"),
        ("resnet", {"crop_pct": 1.5}, "crop_pct 1.5"),
        ("resnet", {"do_center_crop": True}, "do_center_crop True is not supported"),
        ("resnet", {"size": {"height": 8, "width": 8}}, "is not supported"),
        ("vit", {"image_mean": [0.5]}, "image_mean \\[0.5\\] must be three numbers"),
        ("vit", {"image_std": [1, 0, 1]}, "above 0"),
        ("vit", {"rescale_factor": 0.0}, "rescale_factor is 0.0"),
        ("vit", {"resample": "bicubic"}, "resample is 'bicubic', not int"),
    ],
)
def test_a_file_that_cannot_be_honoured_is_refused_by_name(kind, changes, message, tmp_path):
    data = {**VALUES, "size": 8} | ({"crop_size": 8} if kind == "dinov2" else {})
    assert hub.read(put(tmp_path / "sound", data), kind if kind != "bert" else "vit").size == 8
    with pytest.raises(CheckpointError, match=message) as caught:
        hub.read(put(tmp_path / "folder", {**data, **changes}), kind)
    assert "preprocessor_config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_field_that_is_told_to_be_without_effect_is_passed_over(tmp_path):
    assert hub.read(put(tmp_path, {**VALUES, "size": 8, "sharpen": 2}), "vit", ("sharpen",)).size == 8


@pytest.mark.parametrize("changes", [{"size": 0}, {"center_crop": 0.0}, {"center_crop": 1.1}, {"std": (1.0, 0.0, 1.0)}])
def test_what_shows_nothing_is_refused(changes):
    with pytest.raises(ConfigError, match="above 0"):
        replace(Preprocessing(8, HALF, HALF), **changes)


@pytest.mark.parametrize("name", ["vit", "resnet", "efficientnet", "dinov2", "registers", "mae"])
def test_a_folder_gives_what_was_put_in(name, tmp_path):
    model, _ = forms.build(forms.FORMS[name])
    params = forms.draw(model)
    found = Preprocessing(8, *IMAGENET, 0.8, "bicubic")
    pretrained.save(tmp_path / "with", model, params, preprocessing=found)
    assert pretrained.load(tmp_path / "with").preprocessing == found
    pretrained.save(tmp_path / "without", model, params)
    assert not (tmp_path / "without" / hub.FILE).exists()
    assert pretrained.load(tmp_path / "without").preprocessing is None


def test_a_folder_opens_without_a_file_that_cannot_be_honoured_where_that_is_asked_for(tmp_path):
    model, _ = forms.make(tmp_path / "folder", "vit")
    put(tmp_path / "folder", {"image_processor_type": "OwlViTImageProcessor"})
    with pytest.raises(CheckpointError, match=r"name preprocessor_config\.json in ignore"):
        pretrained.load(tmp_path / "folder")
    found = pretrained.load(tmp_path / "folder", ignore=iter([hub.FILE]))
    assert found.module == model and found.preprocessing is None


def test_a_model_of_words_has_none(tmp_path):
    forms.make(tmp_path / "folder", "gpt2")
    put(tmp_path / "folder", {"feature_extractor_type": "Of something else"})
    assert pretrained.load(tmp_path / "folder").preprocessing is None
    module, _ = forms.build(forms.FORMS["gpt2"])
    with pytest.raises(CheckpointError, match="images of 3 channels; the Decoder reads 0"):
        pretrained.save(tmp_path / "out", module, forms.draw(module), preprocessing=Preprocessing(8, HALF, HALF))


def test_images_that_the_model_does_not_take_are_not_promised(tmp_path):
    found = Preprocessing(12, HALF, HALF)
    model = vit.ViT(replace(vit.tiny()))
    with pytest.raises(CheckpointError, match="images of size 12, but the model reads 8 × 8"):
        pretrained.save(tmp_path / "out", model, forms.draw(model), preprocessing=found)
    grey, _ = forms.build(forms.FORMS["resnet-v1"])
    with pytest.raises(CheckpointError, match="the ResNet reads 1"):
        pretrained.save(tmp_path / "out", grey, forms.draw(grey), preprocessing=found)
    model, _ = forms.build(forms.FORMS["dinov2"])  # of any size
    pretrained.save(tmp_path / "out", model, forms.draw(model), preprocessing=found)
