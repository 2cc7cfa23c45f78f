"""Data as others lay them out: folders of captioned pictures, and what sd-scripts, SimpleTuner, mosaicml/diffusion and
MLPerf's reference cache of them. The names are those of docs/coming_from."""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from made.encode import write_tar
from made.gathered import rows_of, write_parquet
from made.latents import CAPTIONS, half, latent, logvar, npy, npz, write_mds
from preprocess.shapes.shards import write_shards

ROWS = 8
SCALE = np.float32(0.18215)
"""Of Stable Diffusion's latents; SimpleTuner and mosaicml/diffusion store them multiplied by it."""


@cache
def pictures() -> list[bytes]:
    """Captioned shapes, which the shipped autoencoder knows, as files of pictures."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, ROWS, 1, "val", shard_size=ROWS)
        with tarfile.open(next(Path(folder).glob("*.tar"))) as tar:
            files = {member.name: tar.extractfile(member) for member in tar}
            return [file.read() for name, file in sorted(files.items()) if file and name.endswith((".png", ".jpg"))]


def write_photos(folder: Path) -> None:
    """Images with captions beside them and in metadata.jsonl."""
    folder.mkdir()
    lines = []
    for row in range(ROWS):
        caption = CAPTIONS[row % len(CAPTIONS)]
        (folder / f"{row}.png").write_bytes(pictures()[row])
        (folder / f"{row}.txt").write_text(caption)
        lines.append(f'{{"file_name": "{row}.png", "text": "{caption}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_naruto(folder: Path) -> None:
    """A data set of the hub: Parquet files of images and texts."""
    write_parquet(folder / "data/train-00000.parquet", rows_of(range(ROWS)))


def write_sd_scripts(folder: Path) -> None:
    """What sd-scripts caches beside images: .npz of one latent, its size and crop, and a mirrored one."""
    (folder / "10_things").mkdir(parents=True)
    for row in range(ROWS):
        facts = {"latents": latent(row), "original_size": np.array([64, 64]), "crop_ltrb": np.array([0, 0, 64, 64])}
        (folder / f"10_things/{row}_0064x0064_sd.npz").write_bytes(npz(False, **facts, latents_flipped=latent(row)))
        (folder / f"10_things/{row}.txt").write_text(CAPTIONS[row % len(CAPTIONS)])
    (folder / "10_things/0_te_outputs.npz").write_bytes(npz(hidden_state1=np.zeros((2, 3), np.float32)))


def write_simpletuner(folder: Path) -> None:
    """What SimpleTuner caches of `photos`: a scaled tensor by torch.save, under the SHA-256 of the image's name."""
    folder.mkdir(parents=True)
    for row in range(ROWS):
        out = io.BytesIO()
        torch.save(torch.from_numpy(latent(row) * SCALE).bfloat16(), out)
        (folder / f"{hashlib.sha256(str(row).encode()).hexdigest()}.pt").write_bytes(out.getvalue())


def write_mosaicml(folder: Path) -> None:
    """MDS shards of mosaicml/diffusion: pictures, latents that are scaled, none of them of small pictures."""
    columns = {"caption": "str", "jpg": "bytes", "latents_256": "bytes", "caption_latents": "bytes"}
    columns |= {"similarity": "float64", "width": "int32"}
    samples = [
        {
            "caption": CAPTIONS[row % len(CAPTIONS)].encode(),
            "jpg": pictures()[row],
            "latents_256": half(latent(row, 32, 32) * SCALE).tobytes() if row else b"",
            "caption_latents": np.zeros((77, 8), np.float16).tobytes(),
            "similarity": np.float64(0.3).tobytes(),
            "width": np.int32(256 if row else 64).tobytes(),
        }
        for row in range(ROWS)
    ]
    for number in range(2):
        write_mds(folder / str(number), columns, [samples[4 * number : 4 * number + 4]])


def write_mlperf(folder: Path) -> None:
    """Tars as the reference's script writes them: moments with a batch axis of one, and img2dataset's files."""
    for kind in ("webdataset-moments-filtered", "webdataset-filtered"):
        (folder / kind).mkdir()
        for tar in range(2):
            members = []
            for row in range(4 * tar, 4 * tar + 4):
                moments = np.concatenate([latent(row), logvar(row)])[None]
                picture = ("npy", npy(moments)) if "moments" in kind else ("png", pictures()[row])
                for end, data in (picture, ("txt", CAPTIONS[row % 5].encode()), ("json", b'{"status": "success"}')):
                    members.append((f"{row:09d}.{end}", data))
            write_tar(folder / kind / f"{tar:05d}.tar", members)


MAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "photos": (write_photos, "photos"),
    "naruto": (write_naruto, "naruto"),
    "cached": (write_sd_scripts, "cached"),
    "cache/vae": (write_simpletuner, "cache/vae"),
    "mds": (write_mosaicml, "mds"),
    "webdataset": (write_mlperf, ""),
}
"""Data that a page names -> what makes them, and where."""
