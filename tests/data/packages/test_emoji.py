"""Emoji: pictures in class folders, captions beside them, and all pictures of a concept in one split."""

import io
import json

import pytest
from PIL import Image

from fm_jax.core.errors import DataError
from fm_jax.data.images.folder import ImageFolder
from fm_jax.data.packages import emoji

DOG = {"unified": "1F436", "name": "DOG FACE", "category": "Animals & Nature", "subcategory": "animal-mammal"}
WAVE = {"unified": "1F44B", "name": "WAVING HAND SIGN", "category": "People & Body", "subcategory": "hand"}
FLAG = {"unified": "1F1E9-1F1EA", "name": "Germany Flag", "category": "Flags", "subcategory": "country-flag"}
TONE = {"unified": "1F3FB", "name": "SKIN", "category": "Component", "subcategory": "skin-tone"}
KEY = {"unified": "0023-FE0F-20E3", "name": "HASH KEY", "category": "Symbols", "subcategory": "keycap"}
HAS = {f"has_img_{style}": True for style in emoji.STYLES}
WORDS = {
    "en": {"🐶": ("dog face", ["dog", "pet"]), "👋": ("waving hand", ["hand"]), "🏻": ("light skin tone", ["skin"])},
    "de": {"🐶": ("Hundegesicht", ["Hund"]), "#⃣": ("Taste", [])},
}


def png(size=64):
    data = io.BytesIO()
    Image.new("RGBA", (size, size)).save(data, "PNG")
    return data.getvalue()


def put(root, table=None, picture=None, words=None):
    entries = [{**entry, **HAS} for entry in (DOG, WAVE, FLAG, TONE, KEY)]
    entries[0]["has_img_google"] = False
    entries[1]["skin_variations"] = {"1F3FB": {"unified": "1F44B-1F3FB", **HAS}}
    packages = {"cldr-annotations-full": root / "cldr"}
    for style in emoji.STYLES:
        packages[f"emoji-datasource-{style}"] = root / style
        pictures = root / style / "package/img" / style / "64"
        pictures.mkdir(parents=True)
        (root / style / "package/emoji.json").write_text(json.dumps(entries) if table is None else table)
        for code in ("1f436", "1f44b", "1f44b-1f3fb", "1f1e9-1f1ea", "1f3fb", "0023-fe0f-20e3"):
            (pictures / f"{code}.png").write_bytes(png() if picture is None else picture)
    for language in emoji.LANGUAGES:
        known = {sign: {"tts": [name], "default": list_} for sign, (name, list_) in WORDS.get(language, {}).items()}
        path = root / "cldr/package/annotations" / language / "annotations.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"annotations": {"annotations": known}}) if words is None else words)
    (root / "out").mkdir()
    return packages, root / "out"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    packages, out = put(tmp_path_factory.mktemp("emoji"))
    counts = emoji.convert(packages, out)
    rows = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    return counts, out, {(row["style"], row["code"]): row for row in rows}


def test_every_picture_has_one_line_and_lies_in_its_class(made):
    counts, out, rows = made
    assert len(rows) == 11 and [counts[name] for name in ("twitter", "google", "twitter_skins", "google_skins")] == [
        5,
        4,
        1,
        1,
    ]
    assert (counts["concepts"], counts["concepts_with_cldr_names"], counts["categories"]) == (5, 3, 5)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == {row["file"] for row in rows.values()}
    for row in rows.values():
        top = f"{row['style']}_skins" if row["skin"] else row["style"]
        assert row["file"].split("/")[:3] == [top, row["split"], row["category"]]


def test_the_image_folder_reads_a_style(made):
    _, out, rows = made
    split = rows["twitter", "1F44B"]["split"]
    source = ImageFolder(out / "twitter", split)
    assert "people_body" in source.classes
    image, _ = source[0]
    assert image.shape == (64, 64, 3) and (image == 255).all()  # transparent pixels on white


def test_names_and_keywords_come_in_every_language_that_has_them(made):
    rows = made[2]
    dog = rows["twitter", "1F436"]
    assert dog["caption"] == "dog face" and dog["emoji"] == "🐶"
    assert dog["names"] == {"en": "dog face", "de": "Hundegesicht"}
    assert dog["keywords"] == {"en": ["dog", "pet"], "de": ["Hund"]}
    assert rows["twitter", "1F1E9-1F1EA"]["caption"] == "germany flag" and not rows["twitter", "1F1E9-1F1EA"]["names"]
    assert rows["twitter", "0023-FE0F-20E3"]["names"] == {"de": "Taste"}  # CLDR writes it without a selector


def test_a_skin_variant_is_named_after_its_tone_and_stays_with_its_emoji(made):
    rows = made[2]
    variant = rows["google", "1F44B-1F3FB"]
    assert variant["caption"] == "waving hand: light skin tone" and variant["skin"] == ["light skin tone"]
    assert rows["google", "1F44B"]["skin"] == [] and variant["split"] == rows["google", "1F44B"]["split"]
    assert rows["twitter", "1F3FB"]["caption"] == "light skin tone" and rows["twitter", "1F3FB"]["split"] == "train"


def test_a_concept_is_the_same_for_man_woman_tone_and_selector():
    runner = ("1F3C3", "1F3C3-1F3FD", "1F3C3-200D-2642-FE0F", "1F3C3-1F3FB-200D-2640-FE0F")
    cook = ("1F468-200D-1F373", "1F469-1F3FF-200D-1F373", "1F9D1-200D-1F373")
    for codes in (runner, cook):
        assert len({emoji.concept(code) for code in codes}) == 1
    assert len({emoji.concept(code) for code in ("1F1E9-1F1EA", "1F1E9-1F1F0", "1F436", *runner[:1], *cook[:1])}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": "[{"}, "emoji.json is not JSON"),
        ({"table": "{}"}, "emoji.json: 'None' is not an emoji"),
        ({"table": json.dumps([{**DOG, "unified": "../../x"}])}, "is not an emoji with unified"),
        ({"table": json.dumps([{**DOG, **HAS, "unified": "1F999"}])}, r"picture 1f999\.png is missing"),
        ({"picture": png(32)}, "is not a PNG of 64 × 64"),
        ({"picture": b"GIF89a" + b"\0" * 99}, "is not a PNG"),
        ({"words": "[]"}, r"en/annotations\.json holds a list"),
        ({"words": '{"annotations": {"annotations": {"a": {"tts": 5}}}}'}, "does not have CLDR's form"),
    ],
)
def test_damaged_tables_and_pictures_are_named(changes, message, tmp_path):
    packages, out = put(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        emoji.convert(packages, out)
