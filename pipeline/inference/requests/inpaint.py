"""Requests of inpainting: an image, and a mask of what is made anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from pipeline.conditions.mask import hide, pack
from pipeline.inference.pictures import to_uint8
from pipeline.inference.requests.files import called
from pipeline.inference.requests.given import pasted, read_hole, read_image
from pipeline.inference.requests.request import Request, Requests, with_words
from pipeline.models.encoders.first_stage import FirstStage


class InpaintRequests(Requests):
    """An image and a mask for each row. What the mask does not hide is the given image again, to the bit: the
    autoencoder and the sampler change it, and `finish` puts it back."""

    needs = ("image", "mask")
    sized_by = "image"

    def request(self, words: Mapping[str, str], size: tuple[int, int]) -> Request:
        facts = self.contract.conditions.mask
        assert facts is not None, "a run of this task was trained on a cache with masks"
        url, mask_url = words["image"], words["mask"]
        image = read_image(url)
        height, width = image.shape[:2]
        self.require_size((width, height), f"image={called(url)} has {width} x {height} pixels")
        mask = read_hole(mask_url, image, url)
        hidden = hide(image, mask, facts.hole)  # (H, W, 3) float32
        return Request(
            label=with_words(words.get("prompt"), f"{called(url)}, {called(mask_url)}"),
            size=(width, height),
            members={"cond.mask": pack(mask) if facts.packed else mask, HIDDEN: hidden},
            shown=to_uint8(torch.from_numpy(hidden).permute(2, 0, 1)[None])[0],
            finish=partial(pasted, image_HWC=image, mask_HW=mask),
            image=image,
        )

    def encoded(self, request: Request, first_stage: FirstStage) -> Request:
        members = dict(request.members)
        x_BCHW = torch.from_numpy(members.pop(HIDDEN)).permute(2, 0, 1)[None].contiguous()
        members["cond.masked"] = first_stage.mean(x_BCHW)[0].half().cpu().numpy()
        return replace(request, members=members)


HIDDEN = "hidden"
"""The image with its hole filled, (H, W, 3) float32 in [-1, 1], which the autoencoder encodes."""


REQUESTS = InpaintRequests
