"""Images and masks from files, recognised by what they contain and never by their name."""

import pathlib

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

MAX_PIXELS = 80_000_000
"""Images with more pixels are refused; whole slides are read tile by tile, not from here."""

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
)


class ImageError(ValueError):
    """A file that cannot be read as an image or a mask; the message names it and the remedy."""


def read_image(path: str | pathlib.Path) -> np.ndarray:
    """Reads an RGB image.

    Transparent pixels are laid on white, as glass without tissue looks; gray and palette images
    become RGB; 16-bit images keep their high byte. Orientation tags are ignored: the mask beside
    the image has none, and both must lie on the same pixel grid.

    Args:
        path: a PNG, JPEG, TIFF or BMP file, whatever its extension.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: missing, truncated, not an image, or more than `MAX_PIXELS` pixels.
    """
    path = pathlib.Path(path)
    kind = _kind(path)
    if kind == "TIFF":
        return _on_white(_to_uint8(_read_tiff(path, expand_palette=True), path), path)
    with _open(path, kind) as image:
        _load(image, path)
        if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
            return _on_white(_to_uint8(np.asarray(image).astype(np.uint16), path), path)
        has_alpha = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
        if has_alpha:
            return _on_white(np.asarray(image.convert("RGBA")), path)
        return np.array(image.convert("RGB"))


def image_size(path: str | pathlib.Path) -> tuple[int, int]:
    """Height and width that the header of a file states; its pixels are not decoded.

    Args:
        path: as of `read_image`.

    Raises:
        ImageError: missing, not an image, or more than `MAX_PIXELS` pixels.
    """
    path = pathlib.Path(path)
    kind = _kind(path)
    if kind != "TIFF":
        with _open(path, kind) as image:
            return image.height, image.width
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            shape = dict(zip(page.axes, page.shape, strict=True))
            height, width = int(shape["Y"]), int(shape["X"])
    except Exception as error:  # tifffile raises many types
        raise ImageError(
            f"Cannot read {path} (TIFF): {error}. The file is damaged or of a kind that is not "
            "supported; export it again."
        ) from error
    _check_size(height, width, path)
    return height, width


def read_mask(path: str | pathlib.Path) -> np.ndarray:
    """Reads a mask of labels or of instance numbers; the numbers in the file are returned as is.

    An alpha channel is dropped, palette masks give the palette index, and a colour mask is
    accepted where its channels are equal.

    Args:
        path: a PNG, TIFF or BMP file, whatever its extension.

    Returns:
        uint8, uint16 or int32 [H, W].

    Raises:
        ImageError: as `read_image`; also for JPEG, whose labels are only approximate, for colour
            masks and for floating-point numbers.
    """
    path = pathlib.Path(path)
    kind = _kind(path)
    if kind == "JPEG":
        raise ImageError(
            f"Expected a lossless mask, got {path}, which holds JPEG data: its labels are changed "
            "by the compression. Export the mask as PNG or TIFF."
        )
    if kind == "TIFF":
        return _one_channel(_read_tiff(path, expand_palette=False), path)
    header = path.read_bytes()[:26] if kind == "PNG" else b""
    bit_depth, colour_type = (header[24], header[25]) if len(header) == 26 else (8, 0)
    with _open(path, kind) as image:
        _load(image, path)
        mask = np.asarray(image)
    if kind == "PNG" and bit_depth == 16 and colour_type in (2, 4, 6):
        # Pillow keeps only the high byte of 16-bit PNGs with more than one channel.
        mask = np.asarray(imagecodecs.png_decode(path.read_bytes()))
    if kind == "PNG" and colour_type == 0 and bit_depth in (2, 4):
        mask = mask // (255 // (2**bit_depth - 1))  # Pillow stretches these grays to 0..255.
    return _one_channel(mask, path)


def _kind(path: pathlib.Path) -> str:
    """Name of the file format, from its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise ImageError(f"Cannot open {path}: {error.strerror or error}.") from error
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head.startswith((b"\x93NUMPY", b"\x80", b"PK")):
        raise ImageError(
            f"Expected a PNG, JPEG or TIFF file, got {path}, a NumPy, pickle or zip file. Those "
            "can run code when they are opened and are never read; export it as PNG or TIFF."
        )
    raise ImageError(
        f"Expected a PNG, JPEG or TIFF file, got {path}, which begins with {head!r}"
        + ("; the file is empty." if not head else ". Export it as PNG or TIFF.")
    )


def _check_size(height: int, width: int, path: pathlib.Path) -> None:
    if height * width > MAX_PIXELS or height < 1 or width < 1:
        raise ImageError(
            f"Expected 1 to {MAX_PIXELS:,} pixels, got {path} with {width:,} x {height:,}. Cut it "
            "into regions, or treat it as a slide."
        )


def _open(path: pathlib.Path, kind: str) -> Image.Image:
    try:
        image = Image.open(path, formats=(kind,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"Expected at most {MAX_PIXELS:,} pixels, got {path}: {error} Cut it into regions."
        ) from error
    except Exception as error:
        raise ImageError(f"Cannot read {path} as {kind}: {error}. Export it again.") from error
    _check_size(image.height, image.width, path)
    return image


def _load(image: Image.Image, path: pathlib.Path) -> None:
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise half a dozen types.
        raise ImageError(
            f"Cannot decode {path} ({image.format}): {error}. The file is truncated or damaged; "
            "copy it again."
        ) from error


def _read_tiff(path: pathlib.Path, *, expand_palette: bool) -> np.ndarray:
    """First page of a TIFF, [H, W] or [H, W, S]; further pages may only be smaller (a pyramid)."""
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            shape, axes = page.shape, page.axes
            if set(axes) - set("YXS") or "Y" not in axes or "X" not in axes:
                raise ImageError(
                    f"Expected one plane of pixels, got {path} with axes {axes} of shape {shape}. "
                    "Export a single plane."
                )
            _check_size(shape[axes.index("Y")], shape[axes.index("X")], path)
            if any(other.shape == shape for other in tiff.pages[1:]):
                raise ImageError(
                    f"Expected one image, got {path} with {len(tiff.pages)} pages of which several "
                    f"have the shape {shape}. Export the page you mean."
                )
            end = max(a + b for a, b in zip(page.dataoffsets, page.databytecounts, strict=True))
            if end > path.stat().st_size:
                raise ImageError(
                    f"Cannot decode {path} (TIFF): its pixels end at byte {end:,} but the file has "
                    f"{path.stat().st_size:,}. It is truncated; copy it again."
                )
            pixels = page.asarray()
            if "S" in axes:
                pixels = np.moveaxis(pixels, axes.index("S"), -1)
            if expand_palette and page.colormap is not None:
                return np.moveaxis(page.colormap, 0, -1)[pixels]
            if expand_palette and page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
                return np.invert(pixels)
            return pixels
    except ImageError:
        raise
    except Exception as error:  # tifffile and its codecs raise many types.
        raise ImageError(
            f"Cannot decode {path} (TIFF): {error}. The file is truncated, damaged or of a kind "
            "that is not supported; export it again, for instance with LZW compression."
        ) from error


def _to_uint8(pixels: np.ndarray, path: pathlib.Path) -> np.ndarray:
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint16:
        return (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ImageError(
            f"Expected 8- or 16-bit pixels, got {path} with {pixels.dtype}. Export it as 8-bit RGB."
        )
    return pixels


def _on_white(pixels: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """uint8 [H, W] or [H, W, 1..4] to RGB [H, W, 3], transparent pixels on white."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels = pixels.shape[-1]
    if channels not in (1, 2, 3, 4):
        raise ImageError(f"Expected 1 to 4 channels, got {path} with {channels}. Export it as RGB.")
    colour = pixels[..., : 3 if channels >= 3 else 1]
    rgb = np.array(np.broadcast_to(colour, (*pixels.shape[:2], 3)))
    if channels in (2, 4):
        alpha = pixels[..., -1:].astype(np.uint16)
        blended = rgb * alpha + np.uint16(255) * (255 - alpha)
        rgb = ((blended + 127) // 255).astype(np.uint8)
    return rgb


def _one_channel(mask: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """[H, W] or [H, W, S] to integer [H, W]."""
    if mask.ndim == 3:
        colour = mask[..., : 1 if mask.shape[-1] in (1, 2) else 3]
        if (colour != colour[..., :1]).any():
            some = np.unique(colour[:: max(1, len(colour) // 64)].reshape(-1, 3), axis=0)[:6]
            raise ImageError(
                f"Expected one label per pixel, got the colour mask {path} with colours like "
                f"{[tuple(map(int, c)) for c in some]}. Replace each colour by its class index "
                "(0 background, 1, 2, ...; 255 ignore) and save it as 8-bit grayscale PNG."
            )
        mask = colour[..., 0]
    if mask.dtype == np.bool_:
        mask = mask.astype(np.uint8)
    if mask.dtype.kind not in "ui":
        raise ImageError(
            f"Expected whole numbers, got the mask {path} with {mask.dtype}. Save it as 8- or "
            "16-bit PNG."
        )
    if mask.dtype in (np.uint8, np.uint16):
        return np.ascontiguousarray(mask)
    if mask.size and (int(mask.max()) > 2**31 - 1 or int(mask.min()) < -(2**31)):
        raise ImageError(f"Expected labels below 2**31, got {path} with {int(mask.max())}.")
    return np.ascontiguousarray(mask, np.int32)
