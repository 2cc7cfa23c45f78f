"""The shipped demo encoders: their quality on pictures that they were not trained on, and their recorded hashes."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from made.places import REPOSITORY
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops

declare_torchvision_ops()

import open_clip  # noqa: E402  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402  # noqa: E402

from pipeline.config.loading.load import load  # noqa: E402
from pipeline.evaluation.shapes.oracle import attribute_accuracy  # noqa: E402
from pipeline.models.encoders.text import load_text  # noqa: E402
from preprocess.shapes.captions import COLOURS, PLACE_WORDS, PREFIXES, SHAPE_WORDS, SIZE_WORDS, holds  # noqa: E402
from preprocess.shapes.drawing import Scene, render, scene  # noqa: E402

DEMO = REPOSITORY / "pipeline" / "assets" / "demo"
UNSEEN_SEED = 31_337
COUNT = 256


@pytest.fixture(scope="module")
def unseen() -> tuple[np.ndarray, list[Scene]]:
    scenes = [scene(UNSEEN_SEED, index, "heldout" if index % 2 else "all") for index in range(COUNT)]
    return np.stack([render(truth) for truth in scenes]), scenes


@pytest.fixture(scope="module")
def vae() -> Any:
    return AutoencoderKL.from_pretrained(DEMO / "vae").eval()


@pytest.fixture(scope="module")
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(bpe_path=str(DEMO / "clip" / "bpe.txt.gz"), context_length=32)


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    config = json.loads((DEMO / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**config).eval()
    state = load_file(DEMO / "clip" / "open_clip_model.safetensors")
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model


def as_input(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def decoded(vae: Any, latent: torch.Tensor) -> np.ndarray:
    pixels = torch.cat([vae.decode(part).sample for part in latent.split(64)])
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-10))).mean())


@pytest.fixture(scope="module")
def posterior(vae: Any, unseen: tuple[np.ndarray, list[Scene]]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        found = [vae.encode(part).latent_dist for part in as_input(unseen[0]).split(64)]
    return torch.cat([d.mean for d in found]), torch.cat([d.std for d in found])


def test_encoders_are_small_and_are_the_ones_recorded() -> None:
    recorded = json.loads((DEMO / "hashes.json").read_text())
    files = {name: digest for part in recorded.values() for name, digest in part["files"].items()}
    there = {str(p.relative_to(DEMO)) for p in DEMO.rglob("*") if p.is_file()} - {"hashes.json"}
    assert there == set(files)
    assert {name: hashlib.sha256((DEMO / name).read_bytes()).hexdigest() for name in files} == files
    assert sum((DEMO / name).stat().st_size for name in files) <= 6_000_000
    assert set(recorded) == {"vae", "clip"}
    assert all("scripts/train_demo_encoders.py" in part["command"] for part in recorded.values())


def test_autoencoder_makes_8x8x4_latents_of_unit_spread(vae: Any, posterior: tuple[torch.Tensor, torch.Tensor]) -> None:
    mean, std = posterior
    assert mean.shape == (COUNT, 4, 8, 8)
    sampled = (
        mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    ) * vae.config.scaling_factor
    assert float(sampled.std()) == pytest.approx(1, abs=0.05)
    assert abs(float(sampled.mean())) < 0.2


@torch.no_grad()
def test_autoencoder_reconstructs_unseen_shapes_at_27_db(
    vae: Any, posterior: tuple[torch.Tensor, torch.Tensor], unseen: tuple[np.ndarray, list[Scene]]
) -> None:
    images, scenes = unseen
    reconstructed = decoded(vae, posterior[0])
    assert psnr(reconstructed, images) >= 27
    assert attribute_accuracy(reconstructed, [truth.caption for truth in scenes])["overall"] >= 0.99


@torch.no_grad()
def test_decoder_forgives_slightly_wrong_latents(
    vae: Any, posterior: tuple[torch.Tensor, torch.Tensor], unseen: tuple[np.ndarray, list[Scene]]
) -> None:
    images, scenes = unseen
    noise = torch.randn(posterior[0].shape, generator=torch.Generator().manual_seed(1))
    captions = [truth.caption for truth in scenes]
    for wrong in (posterior[1] * noise, 0.2 / vae.config.scaling_factor * noise):
        pictures = decoded(vae, posterior[0] + wrong)
        assert psnr(pictures, images) >= 27
        assert attribute_accuracy(pictures, captions)["overall"] >= 0.97


@torch.no_grad()
def test_clip_picks_the_right_caption_of_sixteen(
    clip: open_clip.CLIP, tokenizer: SimpleTokenizer, unseen: tuple[np.ndarray, list[Scene]]
) -> None:
    images, scenes = unseen
    pictured = clip.encode_image(as_input(images), normalize=True)
    said = clip.encode_text(tokenizer([truth.caption for truth in scenes]), normalize=True)
    scores = (pictured @ said.T).numpy()
    rng = np.random.default_rng(0)
    picked = 0
    for i, truth in enumerate(scenes):
        false = [j for j in rng.permutation(COUNT) if not holds(scenes[j].facts, truth.objects)][:15]
        picked += scores[i, i] > scores[i, false].max()
    assert picked / COUNT >= 0.95


@torch.no_grad()
def test_clip_is_read_by_open_clips_own_folder_loader(clip: open_clip.CLIP) -> None:
    loaded = open_clip.create_model(f"local-dir:{DEMO / 'clip'}").eval()
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(loaded.encode_image(picture), clip.encode_image(picture))


def test_every_word_of_the_world_is_one_token(tokenizer: SimpleTokenizer) -> None:
    assert tokenizer.vocab_size <= 1024
    words = {word for prefix in PREFIXES for word in prefix.split()} | set(COLOURS) | {",", "left", "over", "middle"}
    words |= {word for group in (*SHAPE_WORDS.values(), *SIZE_WORDS.values()) for word in group}
    assert {word: len(tokenizer.encode(word)) for word in words} == dict.fromkeys(words, 1)


def test_captions_are_padded_with_the_end_token_as_the_tower_was_trained(tokenizer: SimpleTokenizer) -> None:
    config = load("encode", ["source=s", "dest=d"]).encoders
    assert config.text_pad == tokenizer.eot_token_id


@torch.no_grad()
def test_every_end_token_tells_where_a_lone_object_is(unseen: tuple[np.ndarray, list[Scene]]) -> None:
    """A linear map of the mean state, which untrained attention reads."""
    tower = load_text(load("encode", ["source=s", "dest=d"]).encoders)
    facts = [scene(UNSEEN_SEED, index, "all").facts for index in range(1200)]
    captions = [scene(UNSEEN_SEED, index, "all").caption for index in range(1200)]
    placed = [i for i, one in enumerate(facts) if one.place]
    states = tower.encode(tower.tokenize([captions[i] for i in placed])).mean(dim=1)
    places = sorted(PLACE_WORDS)
    wanted = F.one_hot(torch.tensor([places.index(str(facts[i].place)) for i in placed])).float()
    x = torch.cat([states, torch.ones(len(states), 1)], dim=1)
    half = len(x) // 2
    w = torch.linalg.solve(x[:half].T @ x[:half] + 0.1 * torch.eye(x.shape[1]), x[:half].T @ wanted[:half])
    right = (x[half:] @ w).argmax(dim=1) == wanted[half:].argmax(dim=1)
    assert right.float().mean() >= 0.95


def test_every_caption_of_the_world_fits_the_context(tokenizer: SimpleTokenizer) -> None:
    longest = max(len(tokenizer.encode(scene(UNSEEN_SEED, i, "heldout").caption)) for i in range(3000))
    assert longest + 2 <= 32


@pytest.mark.parametrize(
    "text", ["左边有一个红色的圆", "un cercle rouge à gauche", "красный круг", "🟥 🔵", "دائرة", ""]
)
def test_tokenizer_takes_any_script(tokenizer: SimpleTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")
    tokens = tokenizer(text)[0]
    assert tokens.shape == (32,)
    assert int(tokens[0]) == tokenizer.sot_token_id
    assert int(tokens.max()) == tokenizer.eot_token_id == tokenizer.vocab_size - 1


@pytest.mark.long
def test_committed_command_rebuilds_the_tokenizer_byte_for_byte(tmp_path: Path) -> None:
    script = DEMO.parent.parent.parent / "scripts" / "train_demo_encoders.py"
    subprocess.run([sys.executable, str(script), "tokenizer", "--dest", str(tmp_path)], check=True, capture_output=True)
    rebuilt = (tmp_path / "clip" / "bpe.txt.gz").read_bytes()
    assert rebuilt == (DEMO / "clip" / "bpe.txt.gz").read_bytes()
