"""Every kind of file that Pillow can write here, against the pixels that went in."""

import io
import struct
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fm_jax.core.errors import DataError
from fm_jax.data.images.image import decode, denormalise, normalise, resize
from tests.close import close

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)
GREY = RNG.integers(0, 256, (6, 9)).astype(np.uint8)


def written(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    held = io.BytesIO()
    picture.save(held, kind, **options)
    return held.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_colour_comes_back_exactly(kind: str) -> None:
    found = decode(written(Image.fromarray(RGB), kind))
    assert found.dtype == np.uint8 and found.flags.c_contiguous and np.array_equal(found, RGB)


def test_a_path_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(written(Image.fromarray(RGB)))
    assert np.array_equal(decode(tmp_path / "a.png"), RGB)
    with pytest.raises(DataError, match=r"b\.png: cannot read the file: No such file"):
        decode(tmp_path / "b.png")


def test_grey_and_black_and_white_are_repeated() -> None:
    assert np.array_equal(decode(written(Image.fromarray(GREY))), np.repeat(GREY[..., None], 3, 2))
    bits = Image.fromarray(GREY > 127)
    assert bits.mode == "1"
    assert np.array_equal(decode(written(bits))[..., 1], np.where(GREY > 127, 255, 0))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 32768, 65406, 65407, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert decode(written(Image.fromarray(values), kind))[0, :, 2].tolist() == [0, 0, 1, 128, 254, 255, 255]


def tiff(values: np.ndarray, kind: int) -> bytes:
    """Return a TIFF of one strip; Pillow cannot write unsigned 32 bits. `kind`: 1 unsigned, 2 signed, 3 float."""
    height, width = values.shape
    fields = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    fields |= {279: values.nbytes, 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    end = struct.pack("<H", len(fields)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.tobytes() + end


@pytest.mark.parametrize(
    ("values", "kind", "bytes_"),
    [
        (np.array([[0, 32768, 65535]], "<u4"), 1, [0, 128, 255]),
        (np.array([[0, 2**31, 2**32 - 1]], "<u4"), 1, [0, 128, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], "<i4"), 2, [0, 128, 255]),
        (np.array([[0, 32768, 65535]], "<i4"), 2, [0, 128, 255]),
        (np.array([[0, 0.5, 1]], "<f4"), 3, [0, 128, 255]),
        (np.array([[0, 127.6, 255]], "<f4"), 3, [0, 128, 255]),
    ],
)
def test_thirty_two_bits_are_scaled_by_the_range_they_reach(values: np.ndarray, kind: int, bytes_: list[int]) -> None:
    found = decode(tiff(values, kind))
    assert found.shape == (1, 3, 3) and found[0].tolist() == [[byte] * 3 for byte in bytes_]


@pytest.mark.parametrize("value", [-0.1, 256.0, float("nan"), float("inf")])
def test_floats_of_no_known_range_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"x: float values .* are neither in 0 to 1 nor in 0 to 255; save 8 or 16 bits"):
        decode(tiff(np.array([[value, 0.5]], "<f4"), 3), name="x")


def test_numbers_below_zero_are_refused() -> None:
    with pytest.raises(DataError, match=r"x: values -5 to 1 are below 0; save 8 or 16 bits"):
        decode(tiff(np.array([[-5, 1]], "<i4"), 2), name="x")


def test_palettes_are_looked_up() -> None:
    picture = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(decode(written(picture)), np.asarray(picture.convert("RGB")))
    assert np.array_equal(decode(written(picture, "GIF")), np.asarray(picture.convert("RGB")))


def test_what_is_transparent_is_white() -> None:
    alpha = np.array([[0, 255, 51]], np.uint8)
    colour = np.full((1, 3, 3), 100, np.uint8)
    found = decode(written(Image.fromarray(np.concatenate([colour, alpha[..., None]], 2), "RGBA")))
    assert found[0, :, 0].tolist() == [255, 100, 255 - 31]
    layered = np.stack([colour[..., 0], alpha], axis=2)
    assert np.array_equal(decode(written(Image.fromarray(layered, "LA"))), found)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert decode(written(palette, transparency=0))[0].tolist() == [[255] * 3, [40, 50, 60]]
    assert decode(written(palette, transparency=bytes([255, 0])))[0].tolist() == [[10, 20, 30], [255] * 3]


def test_four_colours_of_print_become_three() -> None:
    inks = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # all cyan
    for kind in ("JPEG", "TIFF"):
        assert abs(decode(written(inks, kind)).astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF", "JPEG"):
        file = written(Image.fromarray(RGB), kind, exif=exif)
        assert np.array_equal(decode(file), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file)))))
    assert decode(file).shape[:2] == ((9, 6) if orientation > 4 else (6, 9))


def test_damaged_exif_leaves_the_pixels_and_prints_nothing(recwarn: pytest.WarningsRecorder) -> None:
    file = written(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert np.array_equal(decode(file), RGB) and not recwarn.list


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        file = written(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
        assert Image.open(io.BytesIO(file)).n_frames == 2  # type: ignore[attr-defined]
        assert decode(file)[0, 0, 0] > 200 and decode(file)[0, 0, 2] < 50


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_half_a_file_is_refused_by_name(kind: str) -> None:
    file = written(Image.fromarray(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)), kind)
    with pytest.raises(DataError, match=r"^half: ") as caught:
        decode(file[: len(file) // 2], name="half")
    assert "\n" not in str(caught.value)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(DataError, match=r"^x: the file is empty"):
        decode(b"", name="x")
    for file in (b"<html>not found</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(DataError, match=r"^x: not an image in JPEG, PNG, .* \(\d+ bytes\)"):
            decode(file, name="x")


def test_a_bomb_is_refused_by_its_header_and_not_only_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    def header(width: int, height: int) -> bytes:
        return f"P5\n{width} {height}\n255\n".encode()  # no pixel follows: decoding would fail otherwise

    for width, height, message in ((9000, 9000, "9,000 × 9,000 pixels"), (13000, 13000, "too"), (10**5, 10**5, "too")):
        with pytest.raises(DataError, match=rf"^x: {message}.* max_pixels 25,000,000"):
            decode(header(width, height), name="x")
    assert not recwarn.list
    with pytest.raises(DataError, match=r"6 × 6 pixels exceed max_pixels 35"):
        decode(header(6, 6), max_pixels=35)


def test_many_threads_leave_the_warnings_as_they_were() -> None:
    file, before, failed = written(Image.fromarray(RGB)), list(warnings.filters), []

    def work() -> None:
        if any(not np.array_equal(decode(file), RGB) for _ in range(50)):
            failed.append(1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed and list(warnings.filters) == before


def test_resizing_smooths_and_keeps_the_mean() -> None:
    image = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    small = resize(image, 4, 8)
    assert small.shape == (4, 8, 3) and abs(small.mean() - image.mean()) < 2 and small.std() < image.std() / 2
    assert resize(image, 32, 32) is image
    assert np.array_equal(resize(image, 8, 4, box=(3, 5, 7, 13), interpolation="nearest"), image[5:13, 3:7])


def test_normalising_is_undone_by_its_inverse() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    values = normalise(RGB, mean, std)
    assert values.dtype == np.float32
    close(values, (RGB / 255 - np.array(mean)) / np.array(std))
    assert np.array_equal(denormalise(values, mean, std), RGB)
    assert denormalise(np.full((1, 1, 3), 100.0), mean, std).tolist() == [[[255] * 3]]


@pytest.mark.parametrize(
    "image", [RGB, RGB[:, ::-1], RGB[None], RGB[0, 0], RGB[:0]], ids=lambda image: str(image.shape)
)
def test_normalising_rows_gives_the_bits_of_normalising_pixels(image: np.ndarray) -> None:
    mean, std = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)], np.float32)
    values = normalise(image, tuple(mean.tolist()), tuple(std.tolist()))
    assert values.dtype == np.float32 and values.shape == image.shape
    assert np.array_equal(values, image * (1 / (255 * std)) - mean / std)


def test_normalising_refuses_another_number_of_channels() -> None:
    with pytest.raises(ValueError):
        normalise(np.zeros((3, 3, 4), np.uint8), (0.5,) * 3, (0.5,) * 3)
