"""Photographs, folders of images, and what is drawn from them."""

import socket
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from dfsq.sr import datasets
from dfsq.sr.datasets import (
    CALIBRATION_PHOTOGRAPHS,
    TEST_PHOTOGRAPHS,
    calibration_crops,
    image_files,
    load_dataset,
    photograph,
    pixel_digest,
    read_image,
)
from dfsq.sr.imaging import imresize, ssim_y

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 31, 4), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three images of different sizes and formats, and a file that is none."""
    for name, size in (("b.png", (20, 31)), ("a.bmp", (17, 24)), ("c.webp", (16, 16))):
        Image.fromarray(PIXELS[: size[0], : size[1], :3]).save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


# --- reading ---


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tif"])
def test_lossless_formats_give_the_same_pixels(tmp_path, suffix):
    Image.fromarray(PIXELS[..., :3]).save(tmp_path / f"image.{suffix}", lossless=True)
    image = read_image(tmp_path / f"image.{suffix}")
    assert image.dtype == np.uint8
    assert np.array_equal(image, PIXELS[..., :3])


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_other_modes(tmp_path, mode):
    """Greyscale is repeated, transparency dropped, a palette looked up."""
    channels = {"L": PIXELS[..., 0], "LA": PIXELS[..., :2], "RGBA": PIXELS}
    if mode in channels:
        image, expected = Image.fromarray(channels[mode], mode), channels[mode]
        expected = expected[..., :3] if mode == "RGBA" else PIXELS[..., :1].repeat(3, axis=2)
    else:
        image = Image.fromarray(PIXELS[..., :3]).convert(mode)
        expected = np.asarray(image.convert("RGB"))
    image.save(tmp_path / "image.png")
    assert np.array_equal(read_image(tmp_path / "image.png"), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits(tmp_path, dtype):
    Image.fromarray(PIXELS[..., 0].astype(dtype) * 200).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match=r"image\.tif has more than 8 bits a channel"):
        read_image(tmp_path / "image.tif")


def write_png(path, image, kind):
    """Of 16 bits a channel; Pillow writes greyscale only."""

    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    height, width = image.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize(("channels", "kind"), [(3, 2), (2, 4), (4, 6)])
def test_more_than_eight_bits_in_colour_or_with_transparency(tmp_path, channels, kind):
    write_png(tmp_path / "image.png", PIXELS[..., :channels].astype(np.uint16) * 200, kind)
    with pytest.raises(ValueError, match=r"image\.png has more than 8 bits a channel"):
        read_image(tmp_path / "image.png")


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}], ids=str)
def test_more_than_eight_bits_in_a_tiff_in_colour(tmp_path, options):
    deep = PIXELS[..., :3].astype(np.uint16) * 200
    tifffile.imwrite(tmp_path / "image.tif", deep, photometric="rgb", **options)
    with pytest.raises(ValueError, match=r"image\.tif has more than 8 bits a channel"):
        read_image(tmp_path / "image.tif")


@pytest.mark.parametrize("content", [b"hello", b"", b"\x89PNG\r\n\x1a\n", bytes(500)])
def test_files_that_are_no_image(tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"image\.png is not a readable image"):
        read_image(tmp_path / "image.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.95])
def test_truncated_files(tmp_path, suffix, part):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(PIXELS[..., :3]).save(path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match="is not a readable image"):
        read_image(path)


def test_more_pixels_than_pillow_reads(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"b\.png is too large: .*620 pixels.* limit of 200"):
        read_image(folder / "b.png")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such image"):
        read_image(tmp_path / "image.png")
    with pytest.raises(ValueError, match="not a readable image"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        image_files(tmp_path / "sub")
    with pytest.raises(ValueError, match="holds no image"):
        image_files(tmp_path)


def test_images_of_a_folder_by_name(folder):
    assert [p.name for p in image_files(folder)] == ["a.bmp", "b.png", "c.webp"]


# --- embedded photographs ---


def test_photographs_come_with_the_dependencies(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    for name in CALIBRATION_PHOTOGRAPHS + TEST_PHOTOGRAPHS:
        image = photograph(name)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert min(image.shape[:2]) >= 300


def test_calibration_and_test_are_disjoint():
    assert not set(CALIBRATION_PHOTOGRAPHS) & set(TEST_PHOTOGRAPHS)

    def thumbnail(name):
        image = Image.fromarray(photograph(name)).convert("L").resize((16, 16))
        values = np.asarray(image, float).ravel()
        return (values - values.mean()) / values.std()

    for a in map(thumbnail, CALIBRATION_PHOTOGRAPHS):
        for b in map(thumbnail, TEST_PHOTOGRAPHS):
            assert abs(np.mean(a * b)) < 0.9


@pytest.fixture
def asked(monkeypatch):
    """Names of the photographs that were opened."""
    names = []
    monkeypatch.setattr(datasets, "photograph", lambda n: names.append(n) or photograph(n))
    return names


def test_each_side_opens_its_own_photographs(asked):
    calibration_crops(count=8)
    assert sorted(asked) == sorted(CALIBRATION_PHOTOGRAPHS)
    asked.clear()
    pairs = load_dataset()
    assert tuple(asked) == tuple(p.name for p in pairs) == TEST_PHOTOGRAPHS


def test_unknown_photograph():
    with pytest.raises(ValueError, match="unknown photograph 'cat'; there are china, coffee"):
        photograph("cat")


# --- data sets ---


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pairs_of_a_folder(tmp_path, scale):
    pixels = np.random.default_rng(1).integers(0, 256, (29, 31, 3), np.uint8)
    sizes = {"a.bmp": (21, 24), "b.png": (29, 31), "c.webp": (20, 20)}
    for name, (height, width) in sizes.items():
        Image.fromarray(pixels[:height, :width]).save(tmp_path / name, lossless=True)
    pairs = load_dataset(tmp_path, scale)
    assert [p.name for p in pairs] == ["a", "b", "c"]
    for pair, (height, width) in zip(pairs, sizes.values(), strict=True):
        height, width = height - height % scale, width - width % scale
        assert np.array_equal(pair.hr, pixels[:height, :width])
        assert np.array_equal(pair.lr, imresize(pair.hr, 1 / scale))
        assert pair.lr.shape == (height // scale, width // scale, 3)


def test_limit(folder):
    assert [p.name for p in load_dataset(str(folder), limit=2)] == ["a", "b"]
    assert [p.name for p in load_dataset(limit=1)] == ["astronaut"]
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        load_dataset(limit=0)


def test_unknown_data_set(folder):
    with pytest.raises(
        ValueError,
        match=r"unknown data set 'set5'; there are photographs, Set5, .* or give a folder",
    ):
        load_dataset("set5")


@pytest.mark.parametrize(("scale", "least"), [(2, 16), (3, 18), (4, 20), (8, 32)])
def test_images_too_small_to_be_measured(tmp_path, scale, least):
    """SSIM of the smallest is defined; one pixel less in a direction, and the image is named."""
    pixels = np.random.default_rng(0).integers(0, 256, (least, least + 1, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (pair,) = load_dataset(tmp_path, scale)
    assert ssim_y(pair.hr, pair.hr, scale) == 1
    for part in (pixels[1:], pixels[:, : least - 1], pixels[:1, :1]):
        Image.fromarray(part).save(tmp_path / "b.png")
        height, width = part.shape[:2]
        message = f"b has {width}x{height} pixels; {least}x{least} at least .* at x{scale}; leave"
        with pytest.raises(ValueError, match=message):
            load_dataset(tmp_path, scale)
        assert load_dataset(tmp_path, scale, limit=1)


def test_two_images_of_one_name(folder):
    Image.fromarray(PIXELS[..., :3]).save(folder / "c.png")
    with pytest.raises(ValueError, match="two images are called c; rename one"):
        load_dataset(folder)
    assert len(load_dataset(folder, limit=3)) == 3


def test_pixel_digest_is_of_decoded_pixels(folder):
    digest = pixel_digest(load_dataset(folder))
    Image.fromarray(read_image(folder / "a.bmp")).save(folder / "a.png")
    (folder / "a.bmp").unlink()
    assert pixel_digest(load_dataset(folder)) == digest
    changed = PIXELS[:17, :24, :3].copy()
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(folder / "a.png")
    assert pixel_digest(load_dataset(folder)) != digest


# --- calibration crops ---


@pytest.mark.parametrize(("scale", "size"), [(2, 96), (3, 64), (4, 48)])
def test_crops_of_the_paper(scale, size):
    crops = calibration_crops(scale=scale, count=3)
    assert [c.shape for c in crops] == [(size, size, 3)] * 3
    assert all(c.dtype == np.uint8 for c in crops)


def test_crops_are_seeded():
    first, again, other = (calibration_crops(count=6, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    more = calibration_crops(count=8, seed=0)
    assert np.array_equal(more[:6], first)


def test_crops_are_flipped_and_rotated_parts_of_the_lr_images(folder):
    (lr,) = (imresize(p.hr, 1 / 2) for p in load_dataset(folder) if p.name == "c")
    windows = {}
    for turns in range(4):
        for mirror in (False, True):
            for y in range(4):
                for x in range(4):
                    part = np.rot90(lr[y : y + 5, x : x + 5], turns)
                    part = part[:, ::-1] if mirror else part
                    windows[part.tobytes()] = turns, mirror, y, x
    for name in ("a.bmp", "b.png"):
        (folder / name).unlink()
    crops = calibration_crops(folder, 2, 200, size=5)
    found = {windows[crop.tobytes()] for crop in crops}
    assert {f[:2] for f in found} == {(t, m) for t in range(4) for m in (False, True)}
    assert {f[2] for f in found} == {f[3] for f in found} == {0, 1, 2, 3}


def test_bad_scales():
    with pytest.raises(ValueError, match="scale must be at least 1, not 0"):
        load_dataset(scale=0)
    for scale in (0, 1000):
        with pytest.raises(ValueError, match=f"scale must be 1 to 192, not {scale}"):
            calibration_crops(scale=scale)


def test_crops_of_a_folder_skip_images_that_are_too_small(folder):
    count = len(load_dataset(folder))
    message = rf"{count - 1} of {count} images of .* smaller than a crop of 20x20 pixels"
    with pytest.warns(UserWarning, match=message):
        crops = calibration_crops(folder, 2, 20, size=10)
    Image.new("RGB", (1, 1)).save(folder / "one.png")  # too small to be downscaled
    with pytest.warns(UserWarning, match=rf"{count} of {count + 1} images"):
        again = calibration_crops(folder, 2, 20, size=10)
    assert all(map(np.array_equal, crops, again))
    (folder / "one.png").unlink()
    source = load_dataset(folder)[1].lr  # b, the only one with 10 rows
    values = set(map(tuple, source.reshape(-1, 3)))
    assert all(set(map(tuple, c.reshape(-1, 3))) <= values for c in crops)
    with pytest.raises(ValueError, match=r"no image of .* has an LR image of 96x96 pixels"):
        calibration_crops(folder)


@pytest.mark.parametrize("options", [{"count": 0}, {"size": 0}])
def test_bad_numbers(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} .*must be at least 1, not .*0"):
        calibration_crops(**options)
