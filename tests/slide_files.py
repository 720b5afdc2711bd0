"""Slides that tests write: small pictures in the containers that scanners and converters use."""

import numpy as np
import tifffile

RESOLUTION = (1e4 / 0.5, 1e4 / 0.5)  # pixels per centimetre at 0.5 micrometres


def painted(height, width, seed=0):
    """uint8 [height, width, 3]: smooth, so that lossy codecs keep it, and nowhere alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = rng.uniform(0.01, 0.08, (3, 2))
    picture = [127 + 100 * np.sin(a * x + b * y + i) for i, (a, b) in enumerate(waves)]
    return np.stack(picture, -1).astype(np.uint8)


def halved(image):
    """The next level of a pyramid: means of four."""
    height, width = (side // 2 * 2 for side in image.shape[:2])
    parts = image[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
    return parts.mean((1, 3)).round().astype(np.uint8)


def pyramid(image, levels):
    images = [image]
    for _ in range(levels - 1):
        images.append(halved(images[-1]))
    return images


def write_generic(path, image, *, levels=3, tile=64, resolution=RESOLUTION, unit="CENTIMETER", **o):
    """A pyramidal TIFF, its levels as pages of their own."""
    options = {"photometric": "rgb", "tile": tile and (tile, tile), "compression": "jpeg", **o}
    with tifffile.TiffWriter(path) as writer:
        for number, level in enumerate(pyramid(image, levels)):
            writer.write(
                level,
                subfiletype=1 if number else 0,
                resolution=resolution,
                resolutionunit=unit,
                metadata=None,
                **options,
            )
    return path


def write_ome(path, image, *, levels=3, tile=64, mpp=0.5, unit="µm", **options):
    """An OME-TIFF, its levels as SubIFDs."""
    options = {"photometric": "rgb", "tile": (tile, tile), "compression": "lzw", **options}
    metadata = {
        "axes": "YXS",
        "PhysicalSizeX": mpp,
        "PhysicalSizeXUnit": unit,
        "PhysicalSizeY": mpp,
        "PhysicalSizeYUnit": unit,
    }
    first, *others = pyramid(image, levels)
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as writer:
        writer.write(first, subifds=len(others), metadata=metadata, **options)
        for level in others:
            writer.write(level, subfiletype=1, **options)
    return path


def write_svs(path, image, *, levels=2, tile=64, mpp=0.5, thumbnail=True, text="", **options):
    """An SVS: tiled levels, a thumbnail between them, and macro pictures after them."""
    options = {"photometric": "rgb", "compression": "jpeg", **options}
    height, width = image.shape[:2]
    stated = f"|MPP = {mpp}" if mpp else ""
    description = (
        f"Aperio Image Library v12\n{width}x{height} ({tile}x{tile})|AppMag = 20{stated}{text}"
    )
    first, *others = pyramid(image, levels)
    with tifffile.TiffWriter(path) as writer:
        settings = {"metadata": None, **options}
        writer.write(first, tile=(tile, tile), description=description, **settings)
        if thumbnail:
            writer.write(image[::8, ::8], description="Aperio thumbnail", **settings)
        for level in others:
            writer.write(level, tile=(tile, tile), description="Aperio level", **settings)
        if thumbnail:
            label = np.zeros((90, 100, 3), np.uint8)
            writer.write(label, description="Aperio\nlabel 100x90", subfiletype=1, **settings)
    return path


def patch(path, page, code, value, index=0):
    """Overwrites the `index`-th number of a tag in place, whatever its place in the file."""
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[page].tags[code]
        width = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        place, order = tag.valueoffset + index * width, tiff.byteorder
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(int(value).to_bytes(width, "little" if order == "<" else "big"))
