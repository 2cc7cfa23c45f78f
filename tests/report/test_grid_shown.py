"""The captioned grid with a picture of what was given at the beginning of rows."""

from __future__ import annotations

import numpy as np

from pipeline.report.grid import MARGIN, captioned, captioned_size


def test_a_row_begins_with_what_was_given_and_rows_without_it_stay_as_they_are() -> None:
    red, blue = (np.full((2, 128, 128, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    green = np.full((128, 128, 3), (0, 255, 0), np.uint8)
    plain = np.asarray(captioned([red, blue], ["a", "b"]))
    sheet = np.asarray(captioned([red, blue], ["a", "b"], [green, None]))
    assert (sheet[MARGIN : MARGIN + 128, MARGIN : MARGIN + 128] == green).all()
    first = 2 * MARGIN + 128
    assert (sheet[MARGIN : MARGIN + 128, first : first + 258] == plain[MARGIN : MARGIN + 128, MARGIN:-MARGIN]).all()
    assert (sheet[MARGIN + 128 :, MARGIN : MARGIN + 258] == plain[MARGIN + 128 :, MARGIN:-MARGIN]).all()
    assert (np.asarray(captioned([red, blue], ["a", "b"], [None, None])) == plain).all()


def test_the_size_counts_what_was_given() -> None:
    row, given = np.zeros((3, 48, 40, 3), np.uint8), np.zeros((48, 40, 3), np.uint8)
    picture = captioned([row], ["word " * 200], [given])
    width, height = captioned_size(3, [(40, 48)], shown=True)
    assert picture.width <= width <= picture.width + 2 and picture.height == height
    assert width > captioned_size(3, [(40, 48)])[0] + 4 * 40
