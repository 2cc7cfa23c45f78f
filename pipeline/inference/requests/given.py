"""Pictures that `sample` is given to begin from or to change a part of, and masks of that part."""

from __future__ import annotations

import numpy as np

from pipeline.conditions.mask import mask_of_file
from pipeline.errors import ConfigError
from pipeline.inference.requests.files import called, picture_size, read_file, read_rgb


def read_image(url: str) -> np.ndarray:
    """The picture image=, (H, W, 3) uint8. Raises ConfigError."""
    return read_rgb("image", url, read_file("image", url))


def read_hole(url: str, image: np.ndarray, image_url: str) -> np.ndarray:
    """What mask= says of the picture `image`: (H, W) uint8, 1 where it is made anew. Raises ConfigError for a mask of
    another size, and for one that hides nothing."""
    height, width = image.shape[:2]
    data = read_file("mask", url)
    size = picture_size("mask", url, data)
    if size != (width, height):
        raise ConfigError(
            f"mask={called(url)} has {size[0]} x {size[1]} pixels and image={called(image_url)} has {width} x "
            f"{height}: give a mask of the image's size"
        )
    hole = mask_of_file(data, f"mask={called(url)}")
    if not hole.any():
        raise ConfigError(f"mask={called(url)} hides nothing: it is white where the image is made anew")
    return hole


def pasted(pictures: np.ndarray, image_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The pictures (n, H, W, 3) where mask_HW (H, W) is 1, and the image (H, W, 3) elsewhere."""
    return np.where(mask_HW[None, :, :, None] != 0, pictures, image_HWC)
