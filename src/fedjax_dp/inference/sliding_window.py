"""A model over a slide, window by window, in memory that does not know the slide's size.

Windows lie on ONE lattice over the slide. Each block of the output sees all windows that reach into
it, so a window at a border is computed for both its blocks: with blocks of 4,096 pixels and windows
of 128 that is a twentieth more work, and in return a block needs nothing of another, whatever was
done before a program was stopped.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedjax_dp.data.slides import Slide
from fedjax_dp.inference.journal import Journal
from fedjax_dp.inference.label_file import NOT_ANALYSED, LabelFile

FIELD = 512
"""Side of the fields whose uncertainty is told, output pixels."""

_BATCH_WINDOWS = 64
_MIN_WEIGHT = 1e-4

PredictFn = Callable[[np.ndarray], np.ndarray]
"""Windows uint8 [n, W, W, 3] -> probabilities float32 [n, W, W, K]."""


class Tissue(Protocol):
    """Where to look; see `data.tissue.TissueMask`."""

    def touches(self, x: float, y: float, width: float, height: float) -> bool:
        """Whether there may be tissue in a rectangle of level-0 pixels."""
        ...

    def region(
        self, x: float, y: float, width: int, height: int, scale: tuple[float, float]
    ) -> np.ndarray:
        """Which output pixels are tissue, bool [height, width]."""
        ...


class Field(NamedTuple):
    """A square of the slide and how unsure the model was of it.

    Attributes:
        x: of its corner, level-0 pixels.
        y: likewise.
        width: level-0 pixels.
        height: likewise.
        uncertainty: mean entropy of the class probabilities over its analysed pixels, in nats.
    """

    x: float
    y: float
    width: float
    height: float
    uncertainty: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """How a slide is cut.

    Attributes:
        mpp: micrometres per output pixel.
        window: side of a window, output pixels.
        overlap: fraction of a window that its neighbour covers too, 0 to 0.75.
        block: side of a block, output pixels, a multiple of `FIELD`.
    """

    mpp: float
    window: int
    overlap: float = 0.25
    block: int = 4096

    def __post_init__(self) -> None:
        if self.window < 8:
            raise ValueError(f"Expected window >= 8 pixels, got {self.window}.")
        if not 0.0 <= self.overlap <= 0.75:
            raise ValueError(f"Expected 0 <= overlap <= 0.75, got {self.overlap}.")
        if self.block < FIELD or self.block % FIELD:
            raise ValueError(f"Expected block to be a multiple of {FIELD}, got {self.block}.")

    @property
    def stride(self) -> int:
        """Distance of neighbouring windows, output pixels."""
        return max(1, round(self.window * (1.0 - self.overlap)))

    def output_size(self, slide: Slide) -> tuple[int, int]:
        """(width, height) of the label map."""
        width, height = (
            max(1, math.ceil(side * mpp / self.mpp - 1e-9))
            for side, mpp in zip(slide.dimensions, slide.mpp, strict=True)
        )
        return width, height


def segment(
    slide: Slide,
    predict_fn: PredictFn,
    tissue: Tissue,
    plan: WindowPlan,
    folder: pathlib.Path,
    *,
    num_classes: int,
    identity: Mapping[str, Any],
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LabelFile, list[Field]]:
    """Segments a slide, or goes on with it.

    Guarantees: labels do not depend on the size of blocks, nor on how often it was stopped; pixels
    outside tissue are `NOT_ANALYSED`; at the slide's edges windows see mirrored tissue. A block is
    durable before it counts as done.

    Args:
        slide: open.
        predict_fn: the model.
        tissue: pixels outside it are not analysed, and windows without it not computed.
        plan: scale, windows and blocks.
        folder: of what is remembered; the label map is its `labels.raw`.
        num_classes: K.
        identity: of slide, model and tissue: what must be the same to go on.
        tell: called with blocks done and their number.

    Returns:
        The label map, and all fields of which anything was analysed.

    Raises:
        ValueError: the folder holds the work of another slide, model or plan.
        SlideError: the slide is damaged, or changed.
        OSError: the disk is full; what is done is kept.
    """
    width, height = plan.output_size(slide)
    header = {**dataclasses.asdict(plan), **identity, "width": width, "height": height}
    header = json.loads(json.dumps(header))
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / "blocks.jsonl", header) as journal:
        path = folder / "labels.raw"
        if journal.done and not path.exists():
            raise ValueError(
                f"{folder} says that {len(journal.done)} blocks are done, but {path.name} is gone. "
                f"Delete {folder} to begin anew."
            )
        labels = LabelFile(path, height, width)
        corners = [
            (y, x) for y in range(0, height, plan.block) for x in range(0, width, plan.block)
        ]
        for number, (y, x) in enumerate(corners):
            if number not in journal.done:
                box = y, x, min(plan.block, height - y), min(plan.block, width - x)
                found, fields = _block(slide, predict_fn, tissue, plan, box, num_classes)
                if found is not None:
                    labels.write(y, x, found)
                    labels.sync()
                    slide.check_unchanged()
                journal.add(number, [list(field) for field in fields])
            tell(number + 1, len(corners))
        return labels, [Field(*f) for number in sorted(journal.done) for f in journal.done[number]]


def _block(
    slide: Slide,
    predict_fn: PredictFn,
    tissue: Tissue,
    plan: WindowPlan,
    box: tuple[int, int, int, int],
    num_classes: int,
) -> tuple[np.ndarray | None, list[Field]]:
    """Labels uint8 [h, w] of one block and its fields; None where nothing is to be analysed."""
    top, left, height, width = box
    scale = plan.mpp / slide.mpp[0], plan.mpp / slide.mpp[1]
    corner = left * scale[0], top * scale[1]
    if not tissue.touches(*corner, width * scale[0], height * scale[1]):
        return None, []
    analysed = tissue.region(*corner, width, height, scale)
    if not analysed.any():
        return None, []
    labels = np.full((height, width), NOT_ANALYSED, np.uint8)
    scores = np.zeros((height, width, num_classes), np.float32)
    weights = _gaussian(plan.window)
    for windows, places in _batches(slide, plan, box, analysed):
        probabilities = predict_fn(windows)
        for probability, (y, x) in zip(probabilities, places, strict=True):
            # The part of the window that lies in the block.
            y0, x0 = max(y, top), max(x, left)
            y1, x1 = min(y + plan.window, top + height), min(x + plan.window, left + width)
            inner = np.s_[y0 - y : y1 - y, x0 - x : x1 - x]
            scores[y0 - top : y1 - top, x0 - left : x1 - left] += (
                weights[inner][..., None] * probability[inner]
            )
    labels[analysed] = scores.argmax(-1).astype(np.uint8)[analysed]
    return labels, _fields(scores, analysed, box, scale)


def _batches(
    slide: Slide, plan: WindowPlan, box: tuple[int, int, int, int], analysed: np.ndarray
) -> Iterator[tuple[np.ndarray, list[tuple[int, int]]]]:
    """Windows uint8 [n, W, W, 3] and their corners (y, x), as far as they see what is analysed."""
    images: list[np.ndarray] = []
    places: list[tuple[int, int]] = []
    top, left, height, width = box
    for y in _lattice(top, height, plan):
        row: Any = analysed[max(y - top, 0) : max(y + plan.window - top, 0)].any(axis=0)
        columns = [
            x
            for x in _lattice(left, width, plan)
            if row[max(x - left, 0) : max(x + plan.window - left, 0)].any()
        ]
        if not columns:
            continue
        strip = _mirrored(slide, plan, y, columns[0], columns[-1] + plan.window - columns[0])
        for x in columns:
            images.append(strip[:, x - columns[0] : x - columns[0] + plan.window])
            places.append((y, x))
            if len(images) == _BATCH_WINDOWS:
                yield np.stack(images), places
                images, places = [], []
    if images:
        yield np.stack(images), places


def _lattice(start: int, length: int, plan: WindowPlan) -> range:
    """Corners of the windows along one axis that reach into an interval."""
    origin = -((plan.window - plan.stride) // 2)
    first = (start - plan.window - origin) // plan.stride + 1
    last = (start + length - 1 - origin) // plan.stride
    return range(origin + max(first, 0) * plan.stride, origin + last * plan.stride + 1, plan.stride)


def _mirrored(slide: Slide, plan: WindowPlan, y: int, x: int, width: int) -> np.ndarray:
    """uint8 [W, width, 3] of output pixels, mirrored at the slide's edges."""
    whole_width, whole_height = plan.output_size(slide)
    x0, x1 = max(x, 0), min(x + width, whole_width)
    y0, y1 = max(y, 0), min(y + plan.window, whole_height)
    pixels = slide.read_region(
        x0 * plan.mpp / slide.mpp[0], y0 * plan.mpp / slide.mpp[1], x1 - x0, y1 - y0, plan.mpp
    )
    beyond = ((y0 - y, y + plan.window - y1), (x0 - x, x + width - x1), (0, 0))
    return np.pad(pixels, beyond, mode="symmetric") if np.any(beyond) else pixels


def _gaussian(window: int) -> np.ndarray:
    """float32 [W, W]: a Gaussian of an eighth of the window about its middle."""
    place = (np.arange(window) + 0.5) / window - 0.5
    line = np.exp(-0.5 * (place / 0.125) ** 2)
    return np.maximum(np.outer(line, line), _MIN_WEIGHT).astype(np.float32)


def _fields(
    scores: np.ndarray,
    analysed: np.ndarray,
    box: tuple[int, int, int, int],
    scale: tuple[float, float],
) -> list[Field]:
    """The fields of a block of which anything was analysed."""
    top, left, height, width = box
    found = []
    for y in range(0, height, FIELD):
        for x in range(0, width, FIELD):
            some = np.s_[y : y + FIELD, x : x + FIELD]
            inside = analysed[some]
            if not inside.any():
                continue
            part = scores[some][inside]
            part = part / part.sum(-1, keepdims=True)
            entropy = -(part * np.log(np.maximum(part, 1e-12))).sum(-1).mean()
            high, wide = inside.shape
            found.append(
                Field(
                    (left + x) * scale[0],
                    (top + y) * scale[1],
                    wide * scale[0],
                    high * scale[1],
                    round(float(entropy), 6),
                )
            )
    return found
