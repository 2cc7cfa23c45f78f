"""examples/simpletuner_latents.py, examples/mds_to_tars.py: what others wrote, as files that index and encode read."""

from __future__ import annotations

import gzip
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import mds_to_tars, simpletuner_latents
from made.encode import ENCODERS, config, png
from made.latents import CAPTIONS, conversion, half, latent, made, write_mds
from made.others import SCALE
from preprocess import encode, index

ROWS = 4


def hashed(name: str) -> str:
    return f"{hashlib.sha256(name.encode()).hexdigest()}.pt"


def write_simpletuner(folder: Path) -> tuple[Path, Path]:
    """Images with captions, and what SimpleTuner caches of them, scaled: a tensor, a gzipped one of bfloat16, a
    dictionary."""
    images, cache = folder / "photos", folder / "cache"
    for row in range(ROWS):
        place = Path("more" if row == ROWS - 1 else "") / f"{row}.png"
        for root in (images, cache):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
        (images / place).write_bytes(png((64, 64), row))
        (images / place).with_suffix(".txt").write_text(f"\n{CAPTIONS[row]}\nanother line\n")
        tensor = torch.from_numpy(latent(row) * SCALE)
        held = [tensor, tensor.bfloat16(), {"latents": tensor, "length": 3}, tensor.half()][row]
        out = io.BytesIO()
        torch.save(held, out)
        data = gzip.compress(out.getvalue()) if row == 1 else out.getvalue()
        (cache / place.parent / hashed(place.stem)).write_bytes(data)
    return images, cache


def test_simpletuners_latents_become_a_cache_with_their_captions(tmp_path: Path) -> None:
    images, cache = write_simpletuner(tmp_path)
    out = tmp_path / "out"
    assert simpletuner_latents.main([str(images), str(cache), str(out)]) == 0
    changes = {"stored": "latents", "scaled": True, "moments_member": "safetensors:latents", "caption_key": "txt"}
    tokens = {"encoders": ENCODERS, "text_storage": "tokens"}
    assert index.main(conversion(f"{out}/**/*.safetensors", tmp_path / "made", **changes, **tokens)) == 0
    manifest, records = made(tmp_path / "made")
    found, scale = {record.meta["key"]: record for record in records}, np.float32(manifest.contract.scale)
    assert sorted(found) == ["0", "1", "2", "more/3"]
    for key, record in found.items():
        row = int(key[-1])
        scaled = torch.from_numpy(latent(row) * SCALE)
        scaled = [scaled, scaled.bfloat16().float(), scaled, scaled.half().float()][row]
        assert (record.members["latents"] == half(scaled.numpy() / scale)).all()
        assert record.meta["caption"] == CAPTIONS[row]


def test_what_is_no_latent_of_simpletuner_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, cache = write_simpletuner(tmp_path)
    (cache / hashed("0")).unlink()
    torch.save(torch.zeros(16, 8, 8), cache / hashed("1"))
    torch.save({"latents": np.float64(1.0)}, cache / hashed("2"))  # more than tensors: not opened
    (images / "more/3.txt").write_text(" \n")
    assert simpletuner_latents.main([str(images), str(cache), str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "0 latents, 4 left out" in said.out
    for text in (f"{hashed('0')} is not there", "but torch.Size([16, 8, 8])", "cannot be read as tensors", "is empty"):
        assert text in said.err
    assert not (tmp_path / "out").exists()


def test_a_gzipped_file_is_not_unpacked_beyond_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, cache = write_simpletuner(tmp_path)
    monkeypatch.setattr(simpletuner_latents, "MOST", 1 << 16)
    (cache / hashed("1")).write_bytes(gzip.compress(bytes(1 << 24)))
    assert simpletuner_latents.main([str(images), str(cache), str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "3 latents, 1 left out" in said.out and "1.png: it has more than 65536 bytes" in said.err


def write_pictures(folder: Path, **changes: str) -> Path:
    columns = {"caption": "str", "jpg": "bytes", "similarity": "float64", "width": "int32", "old": "pkl"} | changes
    samples = [
        {
            "caption": CAPTIONS[row].encode(),
            "jpg": png((64, 64), row),
            "similarity": np.float64([0.3, float("nan")][row == 1]).tobytes(),
            "width": np.int32(64).tobytes(),
            "old": b"\x80\x04N.",
        }
        for row in range(ROWS)
    ]
    return write_mds(folder, columns, [samples[:3], samples[3:]], ["sha1"])


def test_pictures_of_mds_shards_become_tars_that_encode_takes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "mds/0")
    words = [f"{tmp_path}/mds/**/index.json", str(tmp_path / "shards"), "--image", "jpg"]
    assert mds_to_tars.main(words) == 0
    from dataclasses import replace

    given = config(f"{tmp_path}/shards/*.tar", tmp_path / "cache", max_rejects=0.5)
    filters = replace(given.filters, keep=("similarity>=0.2",))
    assert encode.main(replace(given, filters=filters)) == 0
    manifest, found = made(tmp_path / "cache")
    assert [record.meta["caption"] for record in found] == [CAPTIONS[row] for row in (0, 2, 3)]
    assert manifest.units[0].rejected == {"column_missing:similarity": 1}


def test_mds_columns_that_hold_no_pictures_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "mds", jpg="pil")
    words = [f"{tmp_path}/mds/index.json", str(tmp_path / "shards"), "--image", "jpg"]
    assert mds_to_tars.main(words) == 1
    assert "column 'jpg' is pil, and bytes or jpeg or png is wanted" in capsys.readouterr().err
    assert mds_to_tars.main([*words[:3], "picture"]) == 1
    assert "column 'picture' is not there" in capsys.readouterr().err
    assert list((tmp_path / "shards").iterdir()) == []
