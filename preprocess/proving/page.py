"""The page of `latentmill verify`: the checks, and images beside their decoded latents, worst first."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipeline.data.format.manifest import Manifest
from pipeline.report.elements import document, prose, table, text
from pipeline.report.grid import png, tile
from pipeline.report.publish import put_page
from pipeline.report.samples import CRISP_BELOW

MARK = "<title>verify "
"""How an earlier page of this verb is known."""
MOST_PAIRS = 48
LARGEST = 256  # pixels of the longer side of an image on the page; larger ones would make it tens of megabytes


@dataclass
class Pair:
    """A source image and its decoded cached latent, (H, W, 3) uint8 each. Pairs may differ in size."""

    key: str
    caption: str
    image: np.ndarray
    decoded: np.ndarray
    psnr: float = field(init=False)
    """Peak signal-to-noise ratio in dB, for a peak of 255."""

    def __post_init__(self) -> None:
        error = (self.image.astype(np.float64) - self.decoded) ** 2
        self.psnr = float(10 * np.log10(255**2 / max(error.mean(), 1e-10)))


def write_page(dest: str, dataset: str, manifest: Manifest, checks: list[tuple[str, str]], pairs: list[Pair]) -> None:
    """Writes one self-contained HTML file to a path or URL, over an earlier one and nothing else. Raises
    DestinationExists."""
    rows = (f"<tr><td>{text(name)}</td>{prose(result, 2000)}</tr>" for name, result in checks)
    tiles = "".join(map(_pair, pairs[:MOST_PAIRS]))
    shown = f'<div class="samples pairs">{tiles}</div>' if tiles else "<p>No source was compared.</p>"
    body = (
        f"<h1>{text(dataset)}</h1>"
        f'<p class="soft hash">{manifest.samples:,} records · dataset {manifest.digest}</p>'
        f"<h2>Checks</h2>{table((), rows)}"
        f"<h2>Images and decoded latents, worst first</h2>{shown}"
    )
    put_page(dest, document(f"verify {dataset}", body), MARK)


def _pair(pair: Pair) -> str:
    sheet = tile(np.stack([_small(pair.image), _small(pair.decoded)]), 2)
    crisp = " crisp" if max(pair.image.shape) < CRISP_BELOW else ""
    return (
        f'<div class="sample" dir="auto"><img class="tile{crisp}" alt="" src="data:image/png;base64,'
        f'{base64.b64encode(png(sheet)).decode()}">{pair.psnr:.1f} dB · {text(pair.key)}<br>{text(pair.caption)}</div>'
    )


def _small(image_HWC: np.ndarray) -> np.ndarray:
    """The image, shrunk to at most LARGEST pixels on the longer side."""
    picture = Image.fromarray(image_HWC)
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return np.asarray(picture)
