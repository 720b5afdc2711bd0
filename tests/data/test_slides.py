"""Slides: every container's pixels against other readers, regions at any scale, hostile files."""

import concurrent.futures
import pathlib
import shutil

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from fedjax_dp.data import slides
from fedjax_dp.data.pyramids import segments
from fedjax_dp.data.slides import SlideError, open_slide
from tests.slide_files import painted, patch, pyramid, write_generic, write_ome, write_svs

REAL = pathlib.Path(__file__).parents[3] / "shared" / "data" / "formats"
SVS = (
    "wsi/CMU-1-Small-Region.svs",
    "wsi/TCGA-CR-7395-01A-01-TS1.svs",
    "11_monusac_svs/A9K0_1.svs",
    "11_monusac_svs/A9K0_3.svs",
)
IMAGE = painted(301, 419)


def real(name):
    path = REAL / name
    if not path.exists():
        pytest.skip(f"real slides are absent: {name}")
    return path


def through_openslide(path, x, y, level, width, height):
    openslide = pytest.importorskip("openslide", reason="OpenSlide is not installed")
    with openslide.OpenSlide(path) as slide:
        pixels = np.asarray(slide.read_region((x, y), level, (width, height))).astype(int)
    alpha = pixels[..., 3:]
    return (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255


def cut(image, x, y, width, height):
    """A rectangle of an array, white beyond its edges."""
    found = np.full((height, width, 3), 255, np.uint8)
    for j in range(height):
        for i in range(width):
            if 0 <= y + j < image.shape[0] and 0 <= x + i < image.shape[1]:
                found[j, i] = image[y + j, x + i]
    return found


@pytest.mark.parametrize("name", SVS)
def test_native_regions_equal_openslide(name):
    """200 of each: at least 50 cross tile edges, at least 50 overhang the slide."""
    path = real(name)
    rng = np.random.default_rng(1)
    with open_slide(path, mpp=0.5) as slide:
        width, height = slide.dimensions
        crossing = overhanging = 0
        for number in range(200):
            w, h = (int(v) for v in rng.integers(30, 300, 2))
            x, y = int(rng.integers(0, width - 30)), int(rng.integers(0, height - 30))
            if number < 60:
                x, y = int(rng.integers(-29, 0)), int(rng.integers(height - 29, height))
            crossing += x // 256 != (x + w) // 256
            overhanging += x < 0 or y < 0 or x + w > width or y + h > height
            found = slide.read_region(x, y, w, h)
            assert (found == through_openslide(path, x, y, 0, w, h)).all(), (x, y, w, h)
        assert crossing >= 50
        assert overhanging >= 50


def test_each_level_equals_openslide():
    path = real("wsi_derived/derived_generic_pyramid_jpeg.tif")
    with open_slide(path) as slide:
        assert len(slide.levels) == 4
        for number, level in enumerate(slide.levels):
            factor = round(level.downsample[0])
            for x, y in ((0, 0), (17, 90), (level.width - 40, level.height - 40)):
                found = slide.read_level(number, x, y, 130, 120)
                there = through_openslide(path, x * factor, y * factor, number, 130, 120)
                assert (found == there).all(), (number, x, y)


def test_a_level_of_a_real_svs_equals_tifffile():
    path = real("wsi/TCGA-CR-7395-01A-01-TS1.svs")
    with open_slide(path, mpp=0.5) as slide, tifffile.TiffFile(path) as tiff:
        assert [level[:2] for level in slide.levels] == [(4443, 3567), (2221, 1783)]
        assert slide.levels[1].downsample == (4443 / 2221, 3567 / 1783)
        whole = next(page for page in tiff.pages if page.shape[:2] == (1783, 2221)).asarray()
        assert (slide.read_level(1, 0, 0, 2221, 1783) == whole).all()


@pytest.mark.parametrize(
    "name", ["wsi/OS-1-detail.ome.tif", "wsi_derived/derived_ome_subifd_lzw.ome.tif"]
)
def test_ome_tiffs_equal_tifffile(name):
    path = real(name)
    with open_slide(path) as slide, tifffile.TiffFile(path) as tiff:
        assert len(slide.levels) == len(tiff.series[0].levels)
        for number, (level, there) in enumerate(
            zip(slide.levels, tiff.series[0].levels, strict=True)
        ):
            found = slide.read_level(number, 0, 0, level.width, level.height)
            assert (found == there.asarray()).all()
        assert 0.1 < slide.mpp[0] < 1


def write_planes(path):
    planes = np.moveaxis(IMAGE, -1, 0)
    options = {"resolution": (2e4, 2e4), "resolutionunit": 3, "compression": "zlib"}
    tifffile.imwrite(
        path, planes, photometric="rgb", planarconfig="separate", tile=(64, 64), **options
    )


def big_endian(path):
    with tifffile.TiffWriter(path, byteorder=">") as writer:
        writer.write(
            IMAGE, photometric="rgb", tile=(64, 64), resolution=(2e4, 2e4), resolutionunit=3
        )


KINDS = {
    "jpeg": lambda path: write_generic(path, IMAGE),
    "lzw with predictor": lambda path: write_generic(
        path, IMAGE, compression="lzw", predictor=True
    ),
    "deflate": lambda path: write_generic(path, IMAGE, compression="zlib"),
    "zstd": lambda path: write_generic(path, IMAGE, compression="zstd"),
    "packbits": lambda path: write_generic(path, IMAGE, compression="packbits"),
    "jpeg 2000": lambda path: write_generic(path, IMAGE, compression="jpeg2000"),
    "none, strips": lambda path: write_generic(path, IMAGE, tile=None, compression=None, levels=1),
    "one strip": lambda path: write_generic(
        path, IMAGE, tile=None, compression=None, levels=1, rowsperstrip=301
    ),
    "lzw strips": lambda path: write_generic(
        path, IMAGE, tile=None, compression="lzw", rowsperstrip=7
    ),
    "planes": write_planes,
    "ome": lambda path: write_ome(path, IMAGE),
    "svs": lambda path: write_svs(path, IMAGE),
    "big-endian": big_endian,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_equals_tifffile(kind, tmp_path):
    path = tmp_path / "a.tif"
    KINDS[kind](path)
    with open_slide(path) as slide, tifffile.TiffFile(path) as tiff:
        assert slide.mpp == pytest.approx((0.5, 0.5))
        assert slide.dimensions == (419, 301)
        pages = [*tiff.pages, *(tiff.pages.first.pages or ())]
        for number, level in enumerate(slide.levels):
            page = next(p for p in pages if (p.imagewidth, p.imagelength) == level[:2])
            there = np.moveaxis(page.asarray(), 0, -1) if "planes" in kind else page.asarray()
            assert (slide.read_level(number, 0, 0, *level[:2]) == there).all()
            corner = slide.read_level(number, -5, level.height - 20, 40, 33)
            assert (corner == cut(there, -5, level.height - 20, 40, 33)).all()


def test_an_svs_knows_its_levels_from_its_pictures(tmp_path):
    """The thumbnail lies between the levels, and label and macro pictures are none."""
    path = write_svs(tmp_path / "a.svs", IMAGE, levels=3)
    with open_slide(path) as slide:
        assert [level[:2] for level in slide.levels] == [(419, 301), (209, 150), (104, 75)]
        assert slide.format == "Aperio SVS"
        assert slide.codec == "JPEG"


def test_ycbcr_jpeg_2000_becomes_rgb(tmp_path):
    """Compression 33003: the codestream holds luminance and colour, as OpenSlide reads it."""
    ycbcr = np.asarray(Image.fromarray(IMAGE).convert("YCbCr"))
    path = write_svs(tmp_path / "a.svs", ycbcr, levels=1, compression=33005, thumbnail=False)
    patch(path, 0, 259, 33003)
    with open_slide(path) as slide:
        assert slide.codec == "JPEG 2000 (YCbCr)"
        found = slide.read_region(0, 0, 419, 301)
    assert np.abs(found.astype(int) - IMAGE).max() <= 3  # two conversions, rounded
    there = through_openslide(path, 0, 0, 0, 419, 301)
    assert np.abs(found.astype(int) - there).max() <= 1


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_jpeg_in_ycbcr_becomes_rgb(subsampling, tmp_path):
    """As most scanners write it; tifffile writes what it is given."""
    path = tmp_path / "a.tif"
    ycbcr = np.asarray(Image.fromarray(IMAGE).convert("YCbCr"))
    options = {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": subsampling}
    tifffile.imwrite(path, ycbcr, tile=(64, 64), photometric="ycbcr", **options)
    with open_slide(path, mpp=0.5) as slide, open_slide(path, mpp=0.5, cache_bytes=0) as partly:
        found = slide.read_region(0, 0, 419, 301)
        assert np.abs(found.astype(int) - IMAGE).mean() < 6
        assert (found == tifffile.imread(path)).all()
        assert (found == through_openslide(path, 0, 0, 0, 419, 301)).all()
        for x, y, width, height in ((3, 5, 90, 20), (60, 64, 70, 17), (1, 130, 200, 100)):
            part = partly.read_region(x, y, width, height)
            assert (part == found[y : y + height, x : x + width]).all()


def test_gray_and_transparent_pixels(tmp_path):
    gray = IMAGE[..., 0]
    tifffile.imwrite(tmp_path / "g.tif", gray, tile=(64, 64), photometric="minisblack")
    tifffile.imwrite(tmp_path / "w.tif", gray, tile=(64, 64), photometric="miniswhite")
    alpha = np.dstack([IMAGE, np.full_like(gray, 255)])
    alpha[:50, :, 3] = 0
    tifffile.imwrite(tmp_path / "a.tif", alpha, tile=(64, 64), photometric="rgb", extrasamples=[2])
    for name, expected in (("g", gray), ("w", 255 - gray)):
        with open_slide(tmp_path / f"{name}.tif", mpp=1.0) as slide:
            found = slide.read_region(0, 0, 419, 301)
        assert (found == expected[..., None]).all()
    with open_slide(tmp_path / "a.tif", mpp=1.0) as slide:
        found = slide.read_region(0, 0, 419, 301)
    assert (found[:50] == 255).all()
    assert (found[50:] == IMAGE[50:]).all()


# --- scale


def reference(image, x, y, scale, width, height):
    """Bilinear resampling in floating point, its triangle widened where the output is coarser."""

    def weights(start, scale, count, length):
        reach = max(scale, 1.0)
        centres = start + (np.arange(count) + 0.5) * scale
        sources = np.arange(length) + 0.5
        table = np.maximum(0, 1 - np.abs(sources[None] - centres[:, None]) / reach)
        return table / table.sum(1, keepdims=True)

    rows = weights(y, scale[1], height, image.shape[0])
    columns = weights(x, scale[0], width, image.shape[1])
    return np.einsum("iy,jx,yxc->ijc", rows, columns, image.astype(float), optimize=True)


@pytest.mark.parametrize("mpp", [0.25, 0.4, 0.5, 0.61, 0.9, 1.7])
@pytest.mark.parametrize("levels", [1, 3])
def test_resampled_regions_equal_the_formula(mpp, levels, tmp_path):
    path = write_generic(tmp_path / "a.tif", IMAGE, levels=levels, compression="zlib")
    x, y, width, height = 40.0, 60.5, 70, 50
    with open_slide(path) as slide:
        found = slide.read_region(x, y, width, height, mpp)
        number = slide._level_for((mpp / 0.5, mpp / 0.5))
        dx, dy = slide.levels[number].downsample
        source = pyramid(IMAGE, levels)[number]
    scale = mpp / 0.5 / dx, mpp / 0.5 / dy
    expected = reference(source, x / dx, y / dy, scale, width, height)
    assert np.abs(found - expected).max() <= 1.1  # rounded once in each axis


def test_a_region_does_not_depend_on_what_is_asked_for_beside_it(tmp_path, monkeypatch):
    path = write_generic(tmp_path / "a.tif", IMAGE, compression="zlib")
    with open_slide(path) as slide:
        whole = slide.read_region(3, 5, 120, 90, 0.83).astype(int)
        step = 0.83 / 0.5
        part = slide.read_region(3 + 37 * step, 5 + 11 * step, 60, 70, 0.83)
        assert np.abs(part - whole[11:81, 37:97]).max() <= 1
        monkeypatch.setattr("fedjax_dp.data.resampling.MAX_SOURCE_PIXELS", 500)
        assert np.abs(slide.read_region(3, 5, 120, 90, 0.83) - whole).max() <= 1


def test_scale_takes_the_next_finer_level(tmp_path):
    path = write_generic(tmp_path / "a.tif", IMAGE)
    with open_slide(path) as slide:
        taken = [slide._level_for((s, s)) for s in (0.5, 1.0, 1.9, 2.0, 3.9, 4.0, 50.0)]
    assert taken == [0, 0, 0, 1, 1, 2, 2]


def test_axes_of_their_own(tmp_path):
    """A pixel twice as wide as high comes out square."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, IMAGE, tile=(64, 64), photometric="rgb", resolution=(1e4, 2e4), resolutionunit=3
    )
    with open_slide(path) as slide:
        assert slide.mpp == (1.0, 0.5)
        found = slide.read_region(0, 10, 100, 100, 1.0)
    expected = reference(IMAGE, 0, 10, (1.0, 2.0), 100, 100)
    assert np.abs(found - expected).max() <= 1.1


def test_white_outside_and_nothing_else(tmp_path):
    path = write_generic(tmp_path / "a.tif", IMAGE)
    with open_slide(path) as slide:
        assert (slide.read_region(1000, -900, 30, 20) == 255).all()
        assert (slide.read_region(-500.5, 3, 30, 20, 2.0) == 255).all()


# --- resolution


@pytest.mark.parametrize(
    ("resolution", "unit"),
    [((72, 72), "INCH"), ((300, 300), "INCH"), ((2e4, 2e4), "NONE"), ((1, 1), "CENTIMETER")],
)
def test_implausible_resolution_counts_as_missing(resolution, unit, tmp_path):
    path = write_generic(tmp_path / "a.tif", IMAGE, resolution=resolution, unit=unit)
    with pytest.raises(SlideError, match="mpp="):
        open_slide(path)
    with open_slide(path, mpp=0.31) as slide:
        assert slide.mpp == (0.31, 0.31)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(0.25, "µm", 0.25), (250.0, "nm", 0.25), (0.00025, "mm", 0.25), (0.25, "pixel", None)],
)
def test_units_of_ome(value, unit, expected, tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", IMAGE, mpp=value, unit=unit)
    if expected is None:
        with pytest.raises(SlideError, match="how large its pixels"):
            open_slide(path)
        return
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx((expected, expected))


def test_a_real_slide_without_resolution_names_the_override():
    with pytest.raises(SlideError, match="column mpp of the table"):
        open_slide(real("wsi/TCGA-CR-7395-01A-01-TS1.svs"))


@pytest.mark.parametrize("mpp", [0.0, -1.0, 40.0, float("nan"), (0.5, 100.0)])
def test_an_override_is_checked(mpp, tmp_path):
    with pytest.raises(SlideError, match="micrometres"):
        open_slide(write_generic(tmp_path / "a.tif", IMAGE), mpp=mpp)


# --- tiles that are not there


def test_zero_byte_tiles_are_white_in_a_generic_tiff(tmp_path):
    path = write_generic(tmp_path / "a.tif", IMAGE, levels=1, compression="zlib")
    patch(path, 0, 325, 0, index=1)
    with open_slide(path) as slide:
        found = slide.read_region(0, 0, 192, 64)
    assert (found[:, 64:128] == 255).all()
    assert (found[:, :64] == IMAGE[:64, :64]).all()
    assert (found[:, 128:] == IMAGE[:64, 128:192]).all()


def test_zero_byte_tiles_of_a_coarse_svs_level_come_from_the_finer_one(tmp_path):
    path = write_svs(tmp_path / "a.svs", IMAGE, thumbnail=False)
    with open_slide(path) as slide:
        before = slide.read_level(1, 0, 0, 209, 150)
    patch(path, 1, 325, 0, index=1)
    with open_slide(path) as slide:
        after = slide.read_level(1, 0, 0, 209, 150)
    assert (after[:64, :64] == before[:64, :64]).all()
    assert (after[:64, 64:128] != 255).any()
    assert np.abs(after.astype(int) - before).mean() < 2


# --- threads and files


def test_threads_read_at_once(tmp_path):
    path = write_svs(tmp_path / "a.svs", IMAGE)
    corners = [(int(x), int(y)) for x, y in np.random.default_rng(3).integers(-20, 380, (300, 2))]
    with open_slide(path) as slide, open_slide(path) as other:
        alone = [slide.read_region(x, y, 90, 70) for x, y in corners]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda c: other.read_region(*c, 90, 70), corners))
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))


def test_only_the_segments_of_the_region_are_read(tmp_path, monkeypatch):
    path = write_generic(tmp_path / "a.tif", IMAGE, levels=1)
    read = []
    pread = segments.os.pread
    monkeypatch.setattr(segments.os, "pread", lambda *a: read.append(a) or pread(*a))
    with open_slide(path) as slide:
        slide.read_region(70, 70, 30, 30)
        assert len(read) == 1
        slide.read_region(60, 60, 10, 10)
        assert len(read) == 4  # one of the four is still decoded


def test_one_large_strip_is_read_by_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "_PLAIN_STRIP_BYTES", 419 * 3 * 10)
    path = tmp_path / "a.tif"
    KINDS["one strip"](path)
    counts = []
    pread = segments.os.pread
    monkeypatch.setattr(segments.os, "pread", lambda *a: counts.append(a[1]) or pread(*a))
    with open_slide(path) as slide:
        found = slide.read_region(5, 95, 50, 10)
    assert (found == IMAGE[95:105, 5:55]).all()
    assert counts == [419 * 3 * 10] * 2


def test_unicode_and_spaces_in_paths(tmp_path):
    folder = tmp_path / "größe 組織 a'b"
    folder.mkdir()
    with open_slide(write_svs(folder / "slide 1 é.svs", IMAGE)) as slide:
        assert slide.dimensions == (419, 301)


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write_generic(tmp_path / "a.tif", IMAGE)
    with open_slide(path) as slide:
        slide.check_unchanged()
        with open(path, "ab") as file:
            file.write(b"more")
        with pytest.raises(SlideError, match="changed while"):
            slide.check_unchanged()
        path.unlink()
        with pytest.raises(SlideError, match="Cannot open"):
            slide.check_unchanged()


# --- hostile files


def test_truncated_files(tmp_path):
    whole = write_svs(tmp_path / "a.svs", IMAGE).read_bytes()
    path = tmp_path / "b.svs"
    for end in (3, 8, 100, len(whole) // 2, len(whole) - 2000):
        path.write_bytes(whole[:end])
        with pytest.raises(SlideError, match=r"b\.svs"):
            open_slide(path, mpp=0.5)


@pytest.mark.parametrize("content", [b"", b"hello world", b"%PDF-1.4", b"II*\0" + b"\xff" * 60])
def test_no_slides_at_all(content, tmp_path):
    path = tmp_path / "a.svs"
    path.write_bytes(content)
    with pytest.raises(SlideError, match=r"a\.svs"):
        open_slide(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(SlideError, match="Cannot open"):
        open_slide(tmp_path / "nowhere.svs")
    with pytest.raises(SlideError, match="Cannot open"):
        open_slide(tmp_path)


def test_offsets_beyond_the_file(tmp_path):
    path = write_generic(tmp_path / "a.tif", IMAGE, levels=1)
    patch(path, 0, 324, 2**31, index=5)
    with pytest.raises(SlideError, match=r"1 of 35 tiles .* beyond"):
        open_slide(path)


def test_absurd_dimensions(tmp_path):
    path = write_generic(tmp_path / "a.tif", IMAGE, levels=1)
    for width in (2**31 - 1, 1_900_000):
        patch(path, 0, 256, width)
        with pytest.raises(SlideError, match="pixels"):
            open_slide(path)


def test_a_tile_that_claims_to_be_larger_than_the_table_says(tmp_path):
    """A decompression bomb: 64 pixels in the TIFF, 6,000 in the JPEG."""
    bomb = imagecodecs.jpeg_encode(np.zeros((6000, 6000, 3), np.uint8), level=50)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            iter([bomb]),
            shape=(64, 64, 3),
            dtype=np.uint8,
            tile=(64, 64),
            compression="jpeg",
            photometric="rgb",
        )
    with open_slide(path, mpp=0.5) as slide, pytest.raises(SlideError, match="6,000 x 6,000"):
        slide.read_region(0, 0, 10, 10)


def test_a_jpeg_2000_bomb(tmp_path):
    bomb = imagecodecs.jpeg2k_encode(np.zeros((3000, 3000, 3), np.uint8), level=50)
    for data in (bomb, b"\0" * 40):
        path = tmp_path / "a.tif"
        with tifffile.TiffWriter(path) as writer:
            writer.write(
                iter([data]),
                shape=(64, 64, 3),
                dtype=np.uint8,
                tile=(64, 64),
                compression="jpeg2000",
                photometric="rgb",
            )
        with open_slide(path, mpp=0.5) as slide, pytest.raises(SlideError, match="Cannot decode"):
            slide.read_region(0, 0, 10, 10)


def test_missing_jpeg_tables(tmp_path):
    path = real("wsi/CMU-1-Small-Region.svs")
    copy = tmp_path / "a.svs"
    shutil.copyfile(path, copy)
    copy.chmod(0o644)
    with tifffile.TiffFile(copy) as tiff:
        tag = tiff.pages[0].tags[347]
        place = tag.offset
    with copy.open("r+b") as file:
        file.seek(place)
        file.write((65000).to_bytes(2, "little"))  # the tag is now another one
    with open_slide(copy) as slide, pytest.raises(SlideError, match="Cannot decode"):
        slide.read_region(0, 0, 10, 10)


def test_a_damaged_tile_names_itself_and_others_are_read(tmp_path):
    path = write_generic(tmp_path / "a.tif", IMAGE, levels=1, compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[9]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 40)
    with open_slide(path) as slide:
        assert (slide.read_region(0, 0, 64, 64) == IMAGE[:64, :64]).all()
        with pytest.raises(SlideError, match="segment 9"):
            slide.read_region(130, 70, 20, 20)


def test_several_pictures_of_full_size_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for _ in range(3):
            writer.write(IMAGE[..., 0], tile=(64, 64), metadata=None)
    with pytest.raises(SlideError, match="3 of 419 x 301"):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_other_kinds_of_pixels_are_refused(dtype, tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE.astype(dtype), tile=(64, 64), photometric="rgb")
    with pytest.raises(SlideError, match="8-bit"):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (-1, 5), (2**14, 2**14)])
def test_regions_have_a_size(width, height, tmp_path):
    with open_slide(write_generic(tmp_path / "a.tif", IMAGE)) as slide:
        with pytest.raises(SlideError, match="parts"):
            slide.read_region(0, 0, width, height)
        with pytest.raises(SlideError, match="corner"):
            slide.read_region(float("nan"), 0, 5, 5)
        with pytest.raises(SlideError, match="mpp"):
            slide.read_region(0, 0, 5, 5, mpp=0.0)


def test_another_vendor_without_openslide_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.mrxs"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    monkeypatch.setitem(__import__("sys").modules, "openslide", None)
    with pytest.raises(SlideError, match=r"fedjax_dp\[openslide\]"):
        slides.open_slide(path)
