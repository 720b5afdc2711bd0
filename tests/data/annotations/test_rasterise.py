"""Pixels whose centre a polygon holds: against shapely, at borders, in parts."""

import numpy as np
import pytest
import shapely

from fedjax_dp.data.annotations.rasterise import Grid, covered, rasterise


def star(rng, centre, points=12, radius=30.0):
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    radii = rng.uniform(0.3, 1.0, points) * radius
    return shapely.Polygon(np.stack([np.cos(angles), np.sin(angles)], -1) * radii[:, None] + centre)


def oracle(geometry, grid):
    x = grid.x + (np.arange(grid.width) + 0.5) * grid.scale[0]
    y = grid.y + (np.arange(grid.height) + 0.5) * grid.scale[1]
    return shapely.contains_xy(geometry, *np.meshgrid(x, y))


def paint(geometry, grid):
    return rasterise([(geometry, 1)], grid)[0] == 1


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.37, 0.37), (2.6, 1.9)])
def test_random_polygons_equal_shapely(scale):
    """Their coordinates are no multiples of anything, so no centre lies on an edge."""
    rng = np.random.default_rng(0)
    grid = Grid(-7.3, 4.1, 90, 70, scale)
    middle = np.array([-7.3 + 45 * scale[0], 4.1 + 35 * scale[1]])
    for _ in range(40):
        shape = star(rng, middle + rng.normal(0, 20, 2))
        if rng.random() < 0.5:
            shape = shape.difference(star(rng, middle, radius=12.0))
        if rng.random() < 0.3:
            shape = shape.union(star(rng, middle + 40, radius=12.0))
        assert (paint(shape, grid) == oracle(shape, grid)).all()


def test_a_square_of_whole_pixels_is_these_pixels():
    expected = np.zeros((8, 10), bool)
    expected[2:5, 3:7] = True
    assert (paint(shapely.box(3, 2, 7, 5), Grid(0, 0, 10, 8, (1, 1))) == expected).all()
    assert (paint(shapely.box(2.5, 1.5, 6.5, 4.5), Grid(0, 0, 10, 8, (1, 1)))[1:4, 2:6]).all()


def test_neighbours_share_every_pixel_of_their_border():
    """Triangles, rectangles and their borders through pixel centres: no gap and no overlap."""
    rng = np.random.default_rng(1)
    points = rng.integers(0, 81, (60, 2)) / 2
    points = np.concatenate([points, [(0, 0), (0, 40), (40, 0), (40, 40)]])
    triangles = shapely.get_parts(shapely.delaunay_triangles(shapely.MultiPoint(points)))
    for scale in ((1.0, 1.0), (0.5, 0.25), (0.7, 1.3)):
        size = int(40 / scale[0]), int(40 / scale[1])
        grid = Grid(0.0, 0.0, *size, scale)
        counts = sum(paint(triangle, grid).astype(int) for triangle in triangles)
        assert (counts == 1).all()


def test_a_part_of_a_grid_is_the_part():
    rng = np.random.default_rng(2)
    shape = star(rng, (50, 40))
    whole = paint(shape, Grid(0, 0, 100, 80, (1.0, 1.0)))
    part = paint(shape, Grid(20, 30, 50, 40, (1.0, 1.0)))
    assert (part == whole[30:70, 20:70]).all()
    box, inside = covered(shape, Grid(0, 0, 100, 80, (1.0, 1.0)))
    assert (whole[box] == inside).all()
    assert inside.sum() == whole.sum()
    _, nothing = covered(shape, Grid(500, 500, 10, 10, (1.0, 1.0)))
    assert nothing.size == 0


def test_the_last_one_wins_and_what_it_covers_is_counted():
    first, second = shapely.box(0, 0, 6, 6), shapely.box(4, 4, 8, 8)
    labels, overlaps = rasterise([(first, 1), (second, 2)], Grid(0, 0, 10, 10, (1, 1)))
    assert overlaps == 4
    assert (labels[4:8, 4:8] == 2).all()
    assert (
        labels.tolist()
        != rasterise([(second, 2), (first, 1)], Grid(0, 0, 10, 10, (1, 1)))[0].tolist()
    )
    again, overlaps = rasterise(
        [(first, 1), (first, 1)], Grid(0, 0, 10, 10, (1, 1)), background=255
    )
    assert overlaps == 0
    assert again[9, 9] == 255


def test_a_comb_of_long_edges_is_painted_in_portions(monkeypatch):
    """Every row crosses every tooth."""
    teeth = np.arange(0.25, 60, 1.0)
    comb = shapely.union_all([shapely.box(x, 1.5, x + 0.5, 90.5) for x in teeth])
    comb = comb.union(shapely.box(0, 0, 61, 1.5))
    grid = Grid(0, 0, 244, 380, (0.25, 0.25))
    whole = paint(comb, grid)
    assert (whole == oracle(comb, grid)).mean() > 0.99  # centres on edges are not shapely's
    monkeypatch.setattr("fedjax_dp.data.annotations.rasterise._CROSSINGS", 100)
    assert (paint(comb, grid) == whole).all()


def test_a_million_vertices():
    angle = np.linspace(0, 2 * np.pi, 1_000_000, endpoint=False)
    radius = 400 + 3 * np.sin(5000 * angle)
    shape = shapely.Polygon(np.stack([np.cos(angle), np.sin(angle)], -1) * radius[:, None] + 500)
    found = paint(shape, Grid(0, 0, 1000, 1000, (1.0, 1.0)))
    assert found.sum() == pytest.approx(shape.area, rel=1e-3)
