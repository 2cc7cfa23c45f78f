"""The peer of `latentmill encode`: what one writes from the documentation of diffusers, open_clip and webdataset.

One process that decodes, encodes and writes in a loop, in batches, without gradients. It keeps no contract, no index
and no hashes, rejects nothing and cannot be resumed. `workers` has a DataLoader decode in processes of its own, as
webdataset's documentation advises. Models come loaded:

    vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse", torch_dtype=torch.bfloat16).to(device)
    clip, _, _ = open_clip.create_model_and_transforms("ViT-L-14", pretrained="openai", device=device)
    tokenizer = open_clip.get_tokenizer("ViT-L-14")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor


class ResizeAndCrop:
    """Resize until the shorter side fits, crop the middle, scale to [-1, 1]: (3, side, side) float32."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> Tensor:
        scale = self.side / min(image.size)
        width, height = round(image.width * scale), round(image.height * scale)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        image = image.crop((left, top, left + self.side, top + self.side))
        pixels = torch.from_numpy(np.array(image))
        return pixels.permute(2, 0, 1).float() / 127.5 - 1


def same(value: Any) -> Any:
    """Leaves a key or a caption as it is."""
    return value


@torch.inference_mode()
def encode_shards(
    vae: Any,
    clip: Any,
    tokenizer: Callable[[list[str]], Tensor],
    urls: list[str],
    dest: Path,
    *,
    resolution: int,
    batch: int,
    shard: int,
    device: torch.device,
    workers: int = 0,
) -> int:
    """Encodes what `urls` hold into tars in `dest`, `shard` samples each. Returns how many samples."""
    dataset = (
        wds.WebDataset(urls, shardshuffle=False)
        .decode("pil")
        .to_tuple("__key__", "jpg", "txt")
        .map_tuple(same, ResizeAndCrop(resolution), same)
        .batched(batch)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers) if workers else dataset
    count = 0
    with wds.ShardWriter(str(dest / "%06d.tar"), maxcount=shard, verbose=0) as sink:
        for keys, images, captions in loader:
            posterior = vae.encode(images.to(device, vae.dtype)).latent_dist
            moments = posterior.parameters.half().cpu().numpy()
            tokens = tokenizer(list(captions)).to(device)
            states = clip.forward_intermediates(
                text=tokens, text_indices=1, normalize_intermediates=True, intermediates_only=True
            )
            text = states["text_intermediates"][-1].half().cpu().numpy()
            for i, key in enumerate(keys):
                sink.write(
                    {
                        "__key__": key,
                        "json": {"caption": captions[i]},
                        "moments.npy": moments[i],
                        "text.npy": text[i],
                    }
                )
            count += len(keys)
    return count
