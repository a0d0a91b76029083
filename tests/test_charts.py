"""Charts and pictures of the page: their numbers, colours and where a click lands."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from routing.charts import load_bars, pair_table, weight_table
from routing.figures import expert_colors
from routing.overlay import contact_sheet, legend, overlay, painted_side, patch_at, picture_at

NAN, NAMES = float("nan"), ["0", "1", "U"]


def parts(svg: str) -> ET.Element:
    """Parse a chart, which must be well-formed."""
    return ET.fromstring(svg)


def texts(svg: str) -> list[str]:
    return [str(text.text) for text in parts(svg).iter("text")]


def test_bars_are_as_long_as_the_load_and_say_it() -> None:
    svg = load_bars(torch.tensor([6, 0, 3]), 3.0, expert_colors(3), NAMES)
    widths = [float(bar.get("width", "0")) for bar in parts(svg).iter("rect")]
    assert widths[0] == 2 * widths[2] > 0 == widths[1]
    assert texts(svg) == ["0", "1", "U", "even: 3", "6", "0", "3"]


def test_an_even_line_above_every_bar_is_within_the_chart() -> None:
    svg = load_bars(torch.tensor([0, 0, 0]), 3.0, expert_colors(3), NAMES)
    line = next(parts(svg).iter("line"))
    assert 0 < float(line.get("x1", "0")) < 360


def test_the_table_of_pairs_has_each_pair_once() -> None:
    pairs = torch.tensor([[9, 5, 0], [5, 7, 2], [0, 2, 4]])
    svg = pair_table(pairs, NAMES)
    assert len(list(parts(svg).iter("rect"))) == 3
    assert texts(svg) == ["1", "5", "U", "0", "2", "0", "1"]


def test_the_table_of_weights_has_a_cell_for_each_expert_chosen_and_frames_the_step() -> None:
    weights = torch.tensor([[0.5, NAN], [NAN, NAN], [0.25, -0.5]])
    svg = weight_table(weights, 2, [1.0, 0.6, 0.3], NAMES[:2])
    boxes = list(parts(svg).iter("rect"))
    cells = [box for box in boxes if box.get("fill-opacity")]
    assert [box.get("fill-opacity") for box in cells] == ["1.000", "0.540", "1.000"]
    frame = next(box for box in boxes if box.get("fill") == "none")
    assert frame.get("x") == cells[1].get("x") == cells[2].get("x")
    assert {"0.50", "0.25", "-0.50", "1", "0.6", "0.3"} <= set(texts(svg))


@pytest.mark.parametrize("num_steps", [1, 2, 50, 250])
def test_the_table_of_weights_fits_any_number_of_steps(num_steps: int) -> None:
    times = torch.linspace(1, 0.01, num_steps).tolist()
    svg = weight_table(torch.rand(num_steps, 3), 0, times, NAMES)
    assert all(float(box.get("x", "0")) <= 360 for box in parts(svg).iter("rect"))
    assert 2 <= len(texts(svg)) <= 3 * 2 + 12


# ------------------------------------------------------------------------------ pixels


def test_each_patch_is_painted_in_the_colour_of_its_heaviest_expert() -> None:
    colors = expert_colors(3)
    weights = torch.tensor([[0.2, 0.7, NAN], [NAN, NAN, 0.1], [0.9, NAN, NAN], [NAN, NAN, NAN]])
    painted = overlay(np.zeros((8, 8, 1), np.uint8), weights, colors, NAMES)
    side = painted_side(4)
    assert painted.shape == (side, side, 3)
    rgb = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in colors]
    half = side // 2
    corners = {1: (9, 9), 2: (9, half + 9), 0: (half + 9, 9)}
    for expert, corner in corners.items():
        nearest = min(range(3), key=lambda e: abs(painted[corner].astype(int) - rgb[e]).sum())
        assert nearest == expert
    red, green, blue = painted[half + 9, half + 9]
    assert red == green == blue  # a patch that no expert chose


def test_lighter_experts_are_squares_along_the_bottom_in_their_colours() -> None:
    colors = expert_colors(3)
    weights = torch.full((4, 3), NAN)
    weights[0] = torch.tensor([0.2, 0.7, 0.1])
    painted = overlay(np.zeros((8, 8, 3), np.uint8), weights, colors, NAMES)
    seen = {tuple(pixel) for pixel in painted[: painted_side(4) // 2].reshape(-1, 3).tolist()}
    for expert in (0, 2):
        assert tuple(int(colors[expert][i : i + 2], 16) for i in (1, 3, 5)) in seen


def test_the_chosen_patch_alone_is_framed() -> None:
    weights = torch.rand(16, 3)
    picture = np.zeros((8, 8, 1), np.uint8)
    plain, framed = (
        overlay(picture, weights, expert_colors(3), NAMES, chosen) for chosen in (None, 5)
    )
    rows, columns = np.nonzero((plain != framed).any(axis=-1))
    cell = painted_side(16) // 4
    assert (rows.min(), rows.max()) == (columns.min(), columns.max()) == (cell, 2 * cell - 1)


def test_a_picture_of_a_thousand_patches_is_painted_too() -> None:
    names = [str(expert) for expert in range(16)]
    picture, weights = np.zeros((64, 64, 3), np.uint8), torch.rand(1024, 16)
    assert overlay(picture, weights, expert_colors(16), names).shape == (448, 448, 3)


def test_a_click_finds_its_patch_row_by_row_and_edges_count_in() -> None:
    assert [patch_at(x, y, 16, 400) for x, y in ((0, 0), (399, 0), (150, 250), (400, 400))] == [
        *(0, 3, 9, 15)
    ]
    assert patch_at(-1, 1e9, 16, 400) == 12


def test_a_click_finds_its_picture_and_a_hole_the_last() -> None:
    pictures = np.zeros((3, 8, 8, 1), np.uint8)
    size = contact_sheet(pictures).shape[:2]
    near, far = 5, size[0] - 5
    clicks = [picture_at(x, y, 3, size) for x, y in ((near, near), (far, near), (near, far))]
    assert clicks == [0, 1, 2] and picture_at(far, far, 3, size) == 2


def test_a_sheet_enlarges_small_pictures_by_whole_numbers_and_frames_the_chosen() -> None:
    pictures = np.stack([np.full((8, 8, 1), level, np.uint8) for level in (10, 20, 30, 40)])
    sheet = contact_sheet(pictures, chosen=3)
    values, counts = np.unique(sheet[..., 0], return_counts=True)
    area = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert area[10] == area[40] and area[10] % 64 == 0
    assert 213 in area and 213 not in contact_sheet(pictures)


def test_the_legend_names_every_expert() -> None:
    text = legend(expert_colors(3), NAMES)
    assert text.count("background:") == 3 and "U</span>" in text
