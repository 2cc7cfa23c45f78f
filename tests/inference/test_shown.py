"""Pictures of what a model was given."""

from __future__ import annotations

import numpy as np

from pipeline.inference.shown import PAPER, coloured, enlarged, outlined, palette


def test_labels_have_colours_of_their_own() -> None:
    colours = palette()
    assert len({tuple(colour) for colour in colours.tolist()}) == 256
    neighbours = np.abs(colours[1:64].astype(int) - colours[:63].astype(int)).max(axis=1)
    assert neighbours.min() > 40
    labels = np.array([[0, 3], [255, 3]], np.uint8)
    shown = coloured(labels, (4, 4))
    assert shown.shape == (4, 4, 3) and (shown[:, 2:] == colours[3]).all() and (shown[2:, :2] == colours[255]).all()
    assert (shown[:2, :2] == PAPER).all()


def test_labels_and_classes_whose_names_say_a_colour_have_it() -> None:
    names = ("background", "Red square", "thing")
    shown = coloured(np.array([[0, 1, 2]], np.uint8), (3, 1), names)[0]
    assert shown.tolist() == [list(PAPER), [255, 0, 0], palette()[2].tolist()]
    box = np.array([[1, 0, 0, 1, 1]], np.float16)
    assert (outlined(np.zeros((1, 8, 8, 3), np.uint8), box, names)[0, 0] == (255, 0, 0)).all()


def test_small_boxes_are_drawn_over_large_ones() -> None:
    boxes = np.array([[0, 0, 0, 0.5, 0.5], [1, 0, 0, 1, 1]], np.float16)
    for order in (boxes, boxes[::-1]):
        drawn = outlined(np.zeros((1, 8, 8, 3), np.uint8), order)[0]
        assert (drawn[0, :4] == palette()[1]).all() and (drawn[0, 4:] == palette()[2]).all()


def test_pictures_are_enlarged_pixel_by_pixel() -> None:
    small = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert (enlarged(small, (12, 8)) == small.repeat(4, axis=0).repeat(4, axis=1)).all()


def test_outlines_are_one_pixel_wide_and_lie_inside_of_their_boxes_and_of_the_picture() -> None:
    black = np.zeros((2, 32, 64, 3), np.uint8)
    boxes = np.array([[3, 0.25, 0.25, 0.5, 0.75], [4, 0.75, 0, 1, 1], [5, 1, 1, 1, 1], [-1] * 5], np.float16)
    drawn = outlined(black, boxes)
    ink = (drawn != 0).any(axis=-1)
    assert (black == 0).all() and (drawn[0] == drawn[1]).all()
    assert ink[0, 8:24, 16:32].sum() == 2 * 16 + 2 * 14 and not ink[0, 9:23, 17:31].any()
    assert ink[0, :, 48].all() and ink[0, :, 63].all() and ink[0, 0, 48:].all()
    assert ink[0].sum() == 60 + 2 * 32 + 2 * 14
