"""Writes pipeline/assets/demo/hashes.json: the files that ship, and how they were made."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

from demo_encoders.data import save_json, sha256


def record(dest: Path, part: str, figures: dict[str, float], *, seed: int, steps: int) -> None:
    """Writes or replaces the entry of `part` ("vae" or "clip"): SHA-256 of its files, command, versions and figures."""
    path = dest / "hashes.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    files = sorted(file for file in (dest / part).iterdir() if not file.name.endswith(".partial"))
    content[part] = {
        "files": {f"{part}/{file.name}": sha256(file) for file in files},
        "command": f"python scripts/train_demo_encoders.py {part} --seed {seed} --steps {steps}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "open_clip_torch", "numpy")},
        },
        "figures": figures,
    }
    save_json(content, path)
    print(json.dumps(content[part], indent=2), flush=True)
