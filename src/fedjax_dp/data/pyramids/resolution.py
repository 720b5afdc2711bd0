"""How large a pixel is, as TIFF files say it: micrometres per pixel, or nothing.

Whatever is no plausible size of a slide's pixel counts as not said: 72 dpi and other resolutions of
screens and printers, numbers without a unit, and anything outside `manifest.MIN_MPP` to `MAX_MPP`.
A guess would scale every tile and every area.
"""

import math
import re
from collections.abc import Mapping

import defusedxml.ElementTree
import tifffile

from fedjax_dp.data.manifest import MAX_MPP, MIN_MPP

_APERIO = re.compile(r"\|\s*MPP\s*=\s*([0-9.eE+-]+)", re.IGNORECASE)
_MICROMETRES: Mapping[str, float] = {
    "nm": 1e-3,
    "µm": 1.0,
    "μm": 1.0,  # the other of Unicode's two letters
    "um": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "in": 25_400.0,
}
_TAG_UNITS = {2: 25_400.0, 3: 10_000.0}  # inch, centimetre, in micrometres

Resolution = tuple[float, float] | None


def plausible(x: float, y: float) -> Resolution:
    """(x, y) where both are sizes that a slide's pixel can have, else None."""
    is_possible = all(math.isfinite(v) and MIN_MPP <= v <= MAX_MPP for v in (x, y))
    return (x, y) if is_possible else None


def of_aperio(description: str) -> Resolution:
    """From the text of an SVS file, "... |MPP = 0.2525|..."."""
    found = _APERIO.search(description)
    if found is None:
        return None
    try:
        value = float(found.group(1))
    except ValueError:
        return None
    return plausible(value, value)


def of_ome(xml: str, width: int, height: int) -> Resolution:
    """From the OME-XML's image of this size; its units default to micrometres.

    Args:
        xml: the OME-XML.
        width: of level 0, pixels.
        height: of level 0, pixels.
    """
    try:
        root = defusedxml.ElementTree.fromstring(xml)
    except Exception:  # broken, or refused: the size is then not known, pixels still are
        return None
    for element in root.iter():
        if element.tag.rpartition("}")[2] != "Pixels":
            continue
        if (element.get("SizeX"), element.get("SizeY")) == (str(width), str(height)):
            x, y = (_ome_size(element, axis) for axis in "XY")
            return plausible(x, y)
    return None


def _ome_size(element: object, axis: str) -> float:
    unit = element.get(f"PhysicalSize{axis}Unit", "µm")  # type: ignore[attr-defined]
    try:
        size = float(element.get(f"PhysicalSize{axis}", "nan"))  # type: ignore[attr-defined]
    except ValueError:
        return math.nan
    return size * _MICROMETRES.get(unit.strip(), math.nan)


def of_tags(page: tifffile.TiffPage) -> Resolution:
    """From XResolution, YResolution and ResolutionUnit of a TIFF page."""
    unit = page.tags.valueof(296)
    if unit not in _TAG_UNITS:  # 1 is "no unit", and without the tag nobody meant anything
        return None
    try:
        (xn, xd), (yn, yd) = page.tags.valueof(282), page.tags.valueof(283)
        return plausible(_TAG_UNITS[unit] * xd / xn, _TAG_UNITS[unit] * yd / yn)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
