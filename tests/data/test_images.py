"""Readers: what is in the file counts, not its name; what cannot be read says why."""

import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from fedjax_dp.data import images
from fedjax_dp.data.images import ImageError, read_image, read_mask

RGB = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
MASK16 = np.random.default_rng(1).integers(0, 60_000, (40, 30)).astype(np.uint16)


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "whatever"])
def test_the_extension_does_not_matter(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    Image.fromarray(RGB).save(path, format="PNG")
    np.testing.assert_array_equal(read_image(path), RGB)


def test_jpeg_under_a_png_name(tmp_path):
    smooth = np.broadcast_to(np.linspace(50, 200, 64).astype(np.uint8)[:, None, None], (64, 64, 3))
    Image.fromarray(smooth.copy()).save(tmp_path / "a.png", format="JPEG", quality=95)
    got = read_image(tmp_path / "a.png").astype(int)
    assert got.shape == (64, 64, 3)
    assert np.abs(got - smooth).max() < 8


@pytest.mark.parametrize("compression", [None, "lzw", "packbits", "deflate", "zlib"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_lossless_tiff(tmp_path, compression, tile):
    path = tmp_path / "a.png"
    tifffile.imwrite(path, RGB, compression=compression, tile=tile, photometric="rgb")
    np.testing.assert_array_equal(read_image(path), RGB)
    tifffile.imwrite(path, MASK16, compression=compression, tile=tile, photometric="minisblack")
    np.testing.assert_array_equal(read_mask(path), MASK16)


def test_jpeg_tiff_comes_back_as_rgb(tmp_path):
    colour = np.zeros((64, 64, 3), np.uint8) + np.array([200, 90, 150], np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", colour, compression="jpeg", photometric="rgb")
    assert np.abs(read_image(tmp_path / "a.tif").astype(int) - colour).max() < 6
    # Stored as YCbCr (200, 90, 150), which by JFIF's formula is the RGB below.
    tifffile.imwrite(tmp_path / "a.tif", colour, compression="jpeg", photometric="ycbcr")
    assert np.abs(read_image(tmp_path / "a.tif").astype(int) - (231, 197, 133)).max() < 6


def test_tiff_variants(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(path), RGB)
    tifffile.imwrite(path, 255 - RGB[..., 0], photometric="miniswhite")
    np.testing.assert_array_equal(read_image(path), np.repeat(RGB[..., :1], 3, axis=2))
    index = (MASK16 % 3).astype(np.uint8)
    colours = np.zeros((3, 256), np.uint16)
    colours[:, :3] = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]]).T * 257
    tifffile.imwrite(path, index, photometric="palette", colormap=colours)
    np.testing.assert_array_equal(read_mask(path), index)
    expected = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])[index]
    np.testing.assert_array_equal(read_image(path), expected)
    tifffile.imwrite(path, index > 0)
    np.testing.assert_array_equal(read_mask(path), index > 0)


def test_tiff_pyramid_is_read_and_a_stack_is_not(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(RGB, photometric="rgb")
        tiff.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(read_image(path), RGB)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(RGB, photometric="rgb")
        tiff.write(RGB, photometric="rgb")
    with pytest.raises(ImageError, match="2 pages"):
        read_image(path)


def test_transparent_pixels_are_white_and_half_transparent_ones_between(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, :3] = (100, 0, 50)
    rgba[0, :, 3] = (255, 0, 128)
    for name, save in (
        ("a.png", lambda p: Image.fromarray(rgba).save(p)),
        ("a.tif", lambda p: tifffile.imwrite(p, rgba, photometric="rgb", extrasamples=[2])),
    ):
        save(tmp_path / name)
        got = read_image(tmp_path / name)
        np.testing.assert_array_equal(got[0, 0], (100, 0, 50))
        np.testing.assert_array_equal(got[0, 1], (255, 255, 255))
        np.testing.assert_allclose(got[0, 2], (177, 127, 152), atol=1)


def test_gray_palette_and_16_bit_images_become_rgb(tmp_path):
    gray = RGB[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png"), np.stack([gray] * 3, -1))
    palette = Image.fromarray(RGB).quantize(8)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(
        read_image(tmp_path / "palette.png"), np.asarray(palette.convert("RGB"))
    )
    Image.fromarray(MASK16).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png")[..., 1], MASK16 >> 8)


def test_16_bit_masks_survive(tmp_path):
    Image.fromarray(MASK16).save(tmp_path / "gray.png")
    got = read_mask(tmp_path / "gray.png")
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, MASK16)
    # Gray with alpha, and colour with equal channels: Pillow alone would keep the high byte.
    for channels in (2, 3, 4):
        deep = np.repeat(MASK16[..., None], channels, axis=2)
        if channels in (2, 4):
            deep[..., -1] = 65535
        (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(deep))
        np.testing.assert_array_equal(read_mask(tmp_path / "deep.png"), MASK16)


def test_32_bit_tiff_masks_survive(tmp_path):
    mask = np.array([[0, 70_000], [1, 2]], np.int32)
    tifffile.imwrite(tmp_path / "a.tif", mask)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), mask)
    tifffile.imwrite(tmp_path / "a.tif", mask.astype(np.uint32) + np.uint32(2**31))
    with pytest.raises(ImageError, match="2\\*\\*31"):
        read_mask(tmp_path / "a.tif")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_keep_their_labels(tmp_path, bits):
    labels = (MASK16 % 2**bits).astype(np.uint8)
    _write_gray_png(tmp_path / "a.png", labels, bits)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), labels)


def test_palette_mask_gives_the_index_and_alpha_is_dropped(tmp_path):
    index = (MASK16 % 4).astype(np.uint8)
    palette = Image.fromarray(index).convert("P")
    palette.frombytes(index.tobytes())
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "p.png"), index)
    two = np.stack([index, 255 - index], axis=-1)
    (tmp_path / "la.png").write_bytes(imagecodecs.png_encode(two))
    np.testing.assert_array_equal(read_mask(tmp_path / "la.png"), index)


def test_colour_masks_are_refused_unless_their_channels_are_equal(tmp_path):
    index = (MASK16 % 4).astype(np.uint8)
    Image.fromarray(np.stack([index] * 3, -1)).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "gray.png"), index)
    Image.fromarray(np.stack([index, index, index * 0], -1)).save(tmp_path / "colour.png")
    with pytest.raises(ImageError, match="class index"):
        read_mask(tmp_path / "colour.png")


def test_jpeg_and_floating_point_masks_are_refused(tmp_path):
    Image.fromarray(RGB[..., 0]).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(ImageError, match="lossless"):
        read_mask(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", RGB[..., 0].astype(np.float32))
    with pytest.raises(ImageError, match="float32"):
        read_mask(tmp_path / "a.tif")


@pytest.mark.parametrize("save", ["png", "jpeg", "tiff", "tiff-lzw"])
@pytest.mark.parametrize("fraction", [0.3, 0.9])
def test_truncated_files_are_errors(tmp_path, save, fraction):
    whole = tmp_path / "whole"
    if save.startswith("tiff"):
        compression = "lzw" if save == "tiff-lzw" else None
        tifffile.imwrite(whole, RGB, compression=compression, photometric="rgb")
    else:
        Image.fromarray(RGB).save(whole, format=save)
    content = whole.read_bytes()
    (tmp_path / "part").write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(ImageError, match="part"):
        read_image(tmp_path / "part")


def test_decompression_bombs_are_refused_before_they_unfold(tmp_path):
    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b""))
    (tmp_path / "bomb.png").write_bytes(bomb + _chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=f"{images.MAX_PIXELS:,}"):
        read_image(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match=f"{images.MAX_PIXELS:,}"):
        read_mask(tmp_path / "bomb.png")
    side = int(images.MAX_PIXELS**0.5) + 1
    _sparse_tiff(tmp_path / "bomb.tif", side)
    with pytest.raises(ImageError, match=f"{images.MAX_PIXELS:,}"):
        read_image(tmp_path / "bomb.tif")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"GIF89a" + bytes(40), "GIF89a"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
        (b"II*\0" + bytes(40), "TIFF"),
        (b"\xff\xd8\xff" + bytes(40), "JPEG"),
    ],
)
def test_other_files_are_clear_errors(tmp_path, content, says):
    (tmp_path / "a.png").write_bytes(content)
    for read in (read_image, read_mask):
        with pytest.raises(ImageError, match=r"a\.png"):
            read(tmp_path / "a.png")
    with pytest.raises(ImageError, match=says):
        read_image(tmp_path / "a.png")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match="Cannot open"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="Cannot open"):
        read_image(tmp_path)


def test_pickles_are_never_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    np.save(tmp_path / "a.npy", np.array(Evil(), dtype=object), allow_pickle=True)
    with pytest.raises(ImageError, match="never read"):
        read_mask(tmp_path / "a.npy")
    assert not (tmp_path / "ran").exists()


def test_real_formats(real_data):
    formats = real_data / "formats"
    lzw = sorted((formats / "01_monuseg_tcga/images").glob("*.tif"))[0]
    assert read_image(lzw).shape == (1000, 1000, 3)
    two_channel = read_mask(formats / f"01_monuseg_tcga/masks_binary_LA/{lzw.stem}.png")
    deep = read_mask(formats / f"01_monuseg_tcga/masks_instance16/{lzw.stem}.png")
    assert set(np.unique(two_channel)) == {0, 255}
    assert deep.dtype == np.uint16
    assert deep.max() > 255
    overlap = (
        2 * ((two_channel > 0) & (deep > 0)).sum() / ((two_channel > 0).sum() + (deep > 0).sum())
    )
    assert overlap > 0.9  # two drawings of the same nuclei: both readers see the same picture
    packbits = formats / "04_gbm40_emory/images/01.tif"
    assert read_image(packbits).shape == (512, 512, 3)
    jpeg_as_png = formats / "03_tnbc_curie/images/01_1.png"
    assert jpeg_as_png.read_bytes()[:3] == b"\xff\xd8\xff"
    assert read_image(jpeg_as_png).shape == (512, 512, 3)
    rgba = sorted((formats / "10_dsb2018_colour").glob("stage1_train/*/images/*.png"))[0]
    assert read_image(rgba).shape == (256, 320, 3)
    with pytest.raises(ImageError, match="class index"):
        read_mask(formats / "07_prostate_lund/masks_rgb/seg_1.png")
    with pytest.raises(ImageError, match="never read"):
        read_mask(formats / "08_nucls_tcga/labels/train_1.npy")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def _write_gray_png(path, labels, bits):
    """A grayscale PNG with `bits` per pixel, which Pillow does not write."""
    unpacked = np.unpackbits(labels[..., None], axis=-1)[..., -bits:]
    lines = np.packbits(unpacked.reshape(len(labels), -1), axis=1)
    raw = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", labels.shape[1], labels.shape[0], bits, 0, 0, 0, 0)
    parts = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw)) + _chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def _sparse_tiff(path, side):
    """A TIFF that claims to be large and holds a single byte."""
    tags = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, side), (279, 4, 1)]
    content = b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        content += struct.pack("<HHII", tag, kind, 1, value)
    path.write_bytes(content + bytes(4))
