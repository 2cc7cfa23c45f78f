"""The page of `latentmill verify`: what was checked, and images beside their decoded latents, worst first."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape

import numpy as np

from pipeline.data.manifest import Manifest
from pipeline.report.grid import png, tile
from pipeline.report.page import STYLE
from pipeline.storage import open_storage, split_url

MOST_PAIRS = 48


@dataclass
class Pair:
    """A source image and what its cached latent decodes to, (R, R, 3) uint8 each."""

    key: str
    caption: str
    image: np.ndarray
    decoded: np.ndarray
    psnr: float = field(init=False)
    """In dB, peak 255."""

    def __post_init__(self) -> None:
        error = (self.image.astype(np.float64) - self.decoded) ** 2
        self.psnr = float(10 * np.log10(255**2 / max(error.mean(), 1e-10)))


def write_page(dest: str, dataset: str, manifest: Manifest, checks: list[tuple[str, str]], pairs: list[Pair]) -> None:
    """Writes one self-contained HTML file to a path or URL."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td class=text>{escape(result)}</td></tr>" for name, result in checks)
    tiles = "".join(_pair(pair) for pair in pairs[:MOST_PAIRS])
    body = (
        f"<h1>{escape(dataset)}</h1><p class=soft>{manifest.samples:,} records, digest {manifest.digest}</p>"
        f"<h2>Checks</h2><div class=scroll><table>{rows}</table></div>"
        f"<h2>Images and decoded latents, worst first</h2><div class=samples>{tiles or 'No source was compared.'}</div>"
    )
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
    title = f"<title>verify {escape(dataset)}</title>"
    page = f"<!doctype html><html lang=en>{head}{title}<style>{STYLE.read_text()}</style><main>{body}</main></html>"
    root, key = split_url(dest)
    open_storage(root).put(key, page.encode())


def _pair(pair: Pair) -> str:
    picture = base64.b64encode(png(tile(np.stack([pair.image, pair.decoded]), 2))).decode()
    return (
        f"<div class=sample><img class='tile crisp' alt='' src='data:image/png;base64,{picture}'>"
        f"{pair.psnr:.1f} dB · {escape(pair.key)}<br>{escape(pair.caption)}</div>"
    )
