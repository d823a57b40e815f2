"""Sheets: every picture whole and in its cell, texts within their width, headings above their groups."""

import numpy as np
import pytest
from PIL import ImageFont

from engine.evaluate.sheet import COLUMNS, MOST_LINES, SIDE, TEXT, sheet, wrapped
from engine.finish import INK, PAPER

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200)]


def row(i, height=SIDE, width=SIDE, text="a fox"):
    return np.full((height, width, 3), COLOURS[i], np.uint8), text


def boxes(page):
    """left, top, right, bottom of each colour."""
    found = []
    for colour in COLOURS:
        ys, xs = np.nonzero((np.asarray(page) == colour).all(-1))
        if len(ys):
            found.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return found


def test_cells_of_one_size_in_rows():
    found = boxes(sheet([row(i) for i in range(6)]))
    assert [(right - left, bottom - top) for left, top, right, bottom in found] == [(SIDE, SIDE)] * 6
    assert len({top for _, top, *_ in found[:COLUMNS]}) == 1
    assert found[4][0] == found[0][0] and found[4][1] > found[0][3]
    steps = np.diff([left for left, *_ in found[:COLUMNS]])
    assert len(set(steps)) == 1 and steps[0] > SIDE


def test_pictures_keep_their_shape_and_fill_their_cell():
    wide, tall, small = boxes(sheet([row(0, 50, 100), row(1, 400, 200), row(2, 8, 8)]))
    for (left, top, right, bottom), aspect in ((wide, 2), (tall, 0.5), (small, 1)):
        assert max(right - left, bottom - top) == SIDE
        assert (right - left) / (bottom - top) == pytest.approx(aspect, rel=0.02)
    assert wide[3] == tall[3] == small[3], "they stand on their texts"


def test_a_heading_begins_a_line():
    rows = [row(i, text="") for i in range(5)]
    plain, page = sheet(rows), sheet(rows, {0: "Best", 2: "Worst"})
    tops = [top for _, top, *_ in boxes(page)]
    assert tops[0] == tops[1] < tops[2] == tops[3] == tops[4]
    assert boxes(page)[2][0] == boxes(page)[0][0]
    between = np.asarray(page)[boxes(page)[0][3] + 1 : tops[2]]
    assert (between == INK).all(-1).any() and not (np.asarray(plain) == INK).all(-1).any()


def test_texts_are_wrapped_and_stay_on_the_page():
    text = "99.9  " + "a fox on a skateboard at sunset " * 3
    page = np.asarray(sheet([row(0, text=text), row(1, text="short")]))
    bottom = boxes(page)[0][3]
    ink = (page != PAPER).any(-1)
    ink[:bottom] = False
    ys, xs = np.nonzero(ink)
    assert ys.max() < len(page) - 1 and ys.max() - bottom > 3 * TEXT
    left = boxes(page)[1][0]
    assert xs[ys > bottom + 2 * TEXT].max() < left, "it does not run under the neighbour"


@pytest.mark.parametrize(
    "text",
    [
        "a fox",
        "",
        "word " * 200,
        "x" * 500,
        "une forêt\nen été\t\x07",
        "狐",
        "W" * 30 + " and so on",
        " " * 9,
    ],
)
def test_lines(text):
    font = ImageFont.load_default(TEXT)
    lines = wrapped(text, font)
    assert len(lines) <= MOST_LINES
    assert all(font.getlength(line) <= SIDE and line.isascii() and line.isprintable() for line in lines)
    if len(text) > 200:
        assert lines[-1].endswith("...")
    else:
        assert "".join(lines).replace(" ", "")[:9] in ("afox", "", "uneforete", "WWWWWWWWW")


def test_no_picture():
    with pytest.raises(ValueError, match="no picture"):
        sheet([])
