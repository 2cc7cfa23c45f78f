"""The text tower: captions to token ids to per-token hidden states, with open_clip (and its image tower, for scores).

Stable Diffusion 1 reads the last layer of CLIP ViT-L-14 and pads with the end token (49407); Stable Diffusion 2 reads
the last but one of OpenCLIP ViT-H-14 and pads with 0. In both the tower's final norm follows. Attention is causal, so
padding never changes the states up to the end token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import EncodersConfig
from pipeline.errors import ConfigError, WeightsError
from pipeline.models.autoencoder import weights_hash
from pipeline.models.compat import declare_torchvision_ops

declare_torchvision_ops()

import open_clip  # noqa: E402
from open_clip.pretrained import get_pretrained_cfg  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402

DEMO = Path(__file__).resolve().parent.parent / "assets" / "demo" / "clip"
CONFIG, WEIGHTS, MERGES = "open_clip_config.json", "open_clip_model.safetensors", "bpe.txt.gz"
PREPROCESS = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}  # unless a model says others
LAYERS = {"last": 0, "penultimate": 1}  # blocks at the end that are left out


class TextTower:
    """An open_clip model.

    length, width: L and D of the states. pad, eot: token ids. embed_dim: E of the shared embedding.
    weights_sha256: hash of the text tower's weights; image_sha256: of the image tower's.
    """

    def __init__(self, model: Any, tokenizer: SimpleTokenizer, config: EncodersConfig, device: torch.device) -> None:
        state = model.state_dict()
        self.model = model.to(device).eval().requires_grad_(False)
        self._tower = getattr(model, "text", model)
        self.tokenizer = tokenizer
        self.layer, self.pad, self.length = config.text_layer, config.text_pad, config.text_length
        self.eot = int(tokenizer.eot_token_id)
        most = int(self._tower.positional_embedding.shape[0])
        if self.length > most:
            raise ConfigError(f"encoders.text_length={self.length}: {config.text} reads at most {most} tokens")
        self.width = int(self._tower.ln_final.weight.shape[0])
        self.embed_dim = int(self.model.visual.output_dim)
        self.image_sha256 = weights_hash(item for item in state.items() if item[0].startswith("visual."))
        self.weights_sha256 = weights_hash(
            (name.removeprefix("text."), tensor)
            for name, tensor in state.items()
            if not name.startswith(("visual.", "logit_"))
        )
        self.device = device
        visual = self.model.visual
        size = visual.image_size
        self._image_size = (size, size) if isinstance(size, int) else tuple(size)
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1)
            for values in (visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"])
        )

    def ids(self, caption: str) -> tuple[list[int], int]:
        """One caption's L ids (start, at most L - 2 of the caption, end, padding), and how many tokens it has with
        start
        and end: more than L when it was truncated."""
        tokens = self.tokenizer.encode(caption)
        kept = [self.tokenizer.sot_token_id, *tokens[: self.length - 2], self.eot]
        return kept + [self.pad] * (self.length - len(kept)), len(tokens) + 2

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Captions -> ids (B, L) int64."""
        return torch.tensor([self.ids(caption)[0] for caption in captions], dtype=torch.int64).view(-1, self.length)

    @torch.no_grad()
    def encode(self, tokens_BL: Tensor) -> Tensor:
        """Ids (B, L) -> hidden states (B, L, D) of the configured layer after the final norm, float32."""
        return self._states(tokens_BL.to(self.device), LAYERS[self.layer])

    @torch.no_grad()
    def pooled(self, tokens_BL: Tensor) -> Tensor:
        """Ids (B, L) -> text embeddings (B, E), not normalised, float32: the end token's state, projected."""
        tokens = tokens_BL.to(self.device)
        ends = (tokens == self.eot).int().argmax(dim=1)  # the first
        x = self._states(tokens, 0)[torch.arange(len(tokens), device=self.device), ends]
        projection = self._tower.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    @torch.no_grad()
    def encode_image(self, x_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> image embeddings (B, E), not normalised, float32.

        Other sizes than the tower's are resized with antialiasing.
        """
        x = x_BCHW.to(self.device).float()
        if tuple(x.shape[-2:]) != self._image_size:
            x = F.interpolate(x, self._image_size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        return self.model.encode_image(((x + 1) / 2 - self._mean) / self._std).float()

    def _states(self, tokens_BL: Tensor, skip: int) -> Tensor:
        """Ids (B, L) -> states (B, L, D) with the last `skip` blocks left out, after the final norm."""
        tower, length = self._tower, tokens_BL.shape[1]
        x = tower.token_embedding(tokens_BL) + tower.positional_embedding[:length]
        mask = tower.attn_mask[:length, :length]
        blocks = tower.transformer.resblocks
        batch_first = tower.transformer.batch_first
        x = x if batch_first else x.transpose(0, 1)
        for block in blocks[: len(blocks) - skip]:
            x = block(x, attn_mask=mask)
        return tower.ln_final(x if batch_first else x.transpose(0, 1)).float()


def load_text(config: EncodersConfig, device: torch.device | str = "cpu") -> TextTower:
    """The tower that `config` names: "demo", a folder with open_clip_config.json, or a name and pretrained tag (or
    safetensors file) of open_clip. Raises WeightsError when its weights cannot be had as they must be."""
    if config.text_layer not in LAYERS:
        raise ConfigError(f"encoders.text_layer={config.text_layer}: choose one of {', '.join(LAYERS)}")
    folder = DEMO if config.text == "demo" else Path(config.text).expanduser()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(max(config.seed, 0))
        if config.text == "demo" or folder.is_dir():
            model, tokenizer = _load_folder(folder, weights=config.seed < 0)
        else:
            model, tokenizer = _load_named(config)
    if not isinstance(tokenizer, SimpleTokenizer):
        raise WeightsError(f"encoders.text={config.text} uses another tokenizer than CLIP's, which is not supported")
    return TextTower(model, tokenizer, config, torch.device(device))


def _load_folder(folder: Path, weights: bool) -> tuple[nn.Module, SimpleTokenizer]:
    """A folder in open_clip's layout; its own vocabulary (bpe.txt.gz) where it has one."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        model = _build(config["model_cfg"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder} is not an open_clip folder: {CONFIG}: {error!r}") from None
    model.visual.preprocess_cfg = {**PREPROCESS, **config.get("preprocess_cfg", {})}
    if weights:
        _load_weights(model, folder / WEIGHTS)
    merges = folder / MERGES
    return model, SimpleTokenizer(bpe_path=str(merges)) if merges.exists() else SimpleTokenizer()


def _load_named(config: EncodersConfig) -> tuple[nn.Module, SimpleTokenizer]:
    """An architecture of open_clip's list with a pretrained tag, a safetensors file, or random weights."""
    name, tag = config.text, config.text_pretrained
    architecture = open_clip.get_model_config(name)
    if architecture is None:
        raise WeightsError(f"encoders.text={name} is neither demo, nor a folder, nor one of open_clip's models")
    tokenizer = open_clip.get_tokenizer(name)
    quick_gelu = bool(tag) and bool(get_pretrained_cfg(name, tag).get("quick_gelu", False))
    path = Path(tag).expanduser()
    if config.seed >= 0 or (tag and path.is_file()):
        model = _build({**architecture, "quick_gelu": quick_gelu or architecture.get("quick_gelu", False)})
        model.visual.preprocess_cfg = PREPROCESS
        if config.seed < 0:
            _load_weights(model, path)
        return model, tokenizer
    try:  # open_clip itself only warns when weights want the approximate GELU
        model = open_clip.create_model(name, pretrained=tag, require_pretrained=True, force_quick_gelu=quick_gelu)
    except (RuntimeError, OSError, ValueError) as error:
        raise WeightsError(f"encoders.text={name}, encoders.text_pretrained={tag!r}: {error}") from error
    return model, tokenizer


def _build(architecture: dict[str, Any]) -> Any:
    """A model of open_clip's `model_cfg` with random weights."""
    fields = dict(architecture)
    custom = fields.pop("custom_text", False)
    if "timm_model_name" in fields["vision_cfg"]:
        fields["vision_cfg"] = {**fields["vision_cfg"], "timm_model_pretrained": False}
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**fields)


def _load_weights(model: nn.Module, path: Path) -> None:
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: only .safetensors files are read (a pickle could run code)")
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is missing or damaged: {error}") from None
    except RuntimeError as error:
        raise WeightsError(f"{path} holds another architecture: {error}") from None
