"""The text tower: captions to token ids to hidden states per token, with open_clip (and its image tower, for scores).

Stable Diffusion 1 uses the last layer of CLIP ViT-L-14 and pads with the end token (49407); Stable Diffusion 2 uses the
layer before the last of OpenCLIP ViT-H-14 and pads with 0. In both, the tower's final norm follows. Attention is causal
(except in some MobileCLIP), so padding never changes the states up to the end token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pipeline.config import EncodersConfig
from pipeline.errors import ConfigError, WeightsError
from pipeline.models.encoders.described import described_tower
from pipeline.models.encoders.fetched import hub_error, quiet_hub_clients, require_hashes
from pipeline.models.encoders.tokenizer import CONFIG, MERGES, Tokenizer, find_tower, read_folder, tokenizer_of
from pipeline.models.weights import read_file, require_room, require_whole, save_tensors, weights_hash
from pipeline.parsing.text import one_line
from pipeline.storage.staging import writing

WEIGHTS = "open_clip_model.safetensors"
PREPROCESS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")  # open_clip's settings
LAYERS = {"last": 0, "penultimate": 1}  # how many of the last blocks are left out


class TextTower:
    """An open_clip model.

    tokenizer: makes its token ids. length, width: L and D of the states. pad, eot: token ids. embed_dim: E of the
    shared embedding. architecture: open_clip's `model_cfg`, or {} if it is not known. quick_gelu: whether its
    activation is the approximate GELU of OpenAI's CLIP. weights_sha256: hash of the text tower's weights; image_sha256:
    of the image tower's.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        config: EncodersConfig,
        device: torch.device,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        self.architecture = architecture or {}
        self.quick_gelu = bool(self.architecture.get("quick_gelu", False))
        state = model.state_dict()
        self.model = model.to(device).eval().requires_grad_(False)
        self._tower = getattr(model, "text", model)
        self.tokenizer = tokenizer
        self.layer = config.text_layer
        self.pad, self.eot, self.length = tokenizer.pad, tokenizer.eot, tokenizer.length
        max_length = int(self._tower.positional_embedding.shape[0])
        if self.length > max_length:
            raise ConfigError(f"encoders.text_length={self.length}: {config.text} reads at most {max_length} tokens")
        if max(self.pad, self.eot) >= self.vocabulary:
            raise ConfigError(
                f"encoders.text_pad={self.pad}, end token {self.eot}: {config.text} knows {self.vocabulary} tokens, "
                "from 0"
            )
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

    @property
    def vocabulary(self) -> int:
        """Number of token ids that it knows, from 0."""
        return int(self._tower.token_embedding.num_embeddings)

    @property
    def start(self) -> int:
        """Token id that begins every caption."""
        return self.tokenizer.sot

    def ids(self, caption: str) -> tuple[list[int], int]:
        """Tokenizer.ids of one caption."""
        return self.tokenizer.ids(caption)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Captions -> ids (B, L) int64."""
        ids = [self.tokenizer.ids(caption)[0] for caption in captions]
        return torch.tensor(ids, dtype=torch.int64).view(-1, self.length)

    @torch.no_grad()
    def encode(self, tokens_BL: Tensor) -> Tensor:
        """Token ids (B, L) -> hidden states (B, L, D) of the configured layer after the final norm, float32."""
        return self._states(tokens_BL.to(self.device), LAYERS[self.layer])

    @torch.no_grad()
    def pooled(self, tokens_BL: Tensor) -> Tensor:
        """Token ids (B, L) -> text embeddings (B, E), not normalised, float32: the projected state of the end token."""
        tokens = tokens_BL.to(self.device)
        ends = (tokens == self.eot).int().argmax(dim=1)  # of the first end token
        x = self._states(tokens, 0)[torch.arange(len(tokens), device=self.device), ends]
        projection = self._tower.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the image tower sees."""
        return self._image_size[0], self._image_size[1]

    @torch.no_grad()
    def encode_image(self, x_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> image embeddings (B, E), not normalised, float32.

        Images of other sizes than the tower's are resized with antialiasing.
        """
        x = x_BCHW.to(self.device).float()
        if tuple(x.shape[-2:]) != self._image_size:
            x = F.interpolate(x, self._image_size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        return self.encode_sized(x)

    def encode_sized(self, x_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) of the tower's own size -> embeddings as `encode_image`, differentiable in the images
        where gradients are on. Values beyond [-1, 1] are taken as they are."""
        # ((x + 1) / 2 - mean) / std in one pass
        x = torch.addcmul((0.5 - self._mean) / self._std, x_BCHW.to(self.device).float(), 0.5 / self._std)
        return self.model.encode_image(x).float()

    @torch.no_grad()
    def encode_pictures(self, images_BHWC: np.ndarray) -> Tensor:
        """Pictures (B, H, W, 3) uint8 -> image embeddings (B, E), not normalised, float32, by open_clip's own transform
        (the shorter side resized with Pillow's bicubic filter, in 8 bits, then the centre crop)."""
        from pipeline.models.encoders.packages import open_clip

        facts = open_clip.transform.PreprocessCfg(**{**self.model.visual.preprocess_cfg, "size": self._image_size})
        transform = open_clip.transform.image_transform_v2(facts, is_train=False)
        x = torch.stack([transform(Image.fromarray(image)) for image in images_BHWC])
        return self.model.encode_image(x.to(self.device)).float()

    def _states(self, tokens_BL: Tensor, skip: int) -> Tensor:
        """Token ids (B, L) -> states (B, L, D) without the last `skip` blocks, after the final norm."""
        tower, length = self._tower, tokens_BL.shape[1]
        x = tower.token_embedding(tokens_BL) + tower.positional_embedding[:length]
        mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
        blocks = tower.transformer.resblocks
        batch_first = tower.transformer.batch_first
        x = x if batch_first else x.transpose(0, 1)
        for block in blocks[: len(blocks) - skip]:
            x = block(x, attn_mask=mask)
        return tower.ln_final(x if batch_first else x.transpose(0, 1)).float()


def load_text(config: EncodersConfig, device: torch.device | str = "cpu") -> TextTower:
    """The tower that `config` names: what was fetched into `config.weights`, "demo", a folder with
    open_clip_config.json, or a name and pretrained tag (or safetensors file) of open_clip.

    Raises WeightsError when its weights cannot be had as they must be."""
    if config.text_layer not in LAYERS:
        raise ConfigError(f"encoders.text_layer={config.text_layer}: choose one of {', '.join(LAYERS)}")
    architecture, folder = find_tower(config)
    tokenizer = tokenizer_of(architecture, folder, config)
    if folder is None:
        from pipeline.models.encoders.packages import open_clip

        tag_quick_gelu = bool(
            open_clip.get_pretrained_cfg(config.text, config.text_pretrained).get("quick_gelu", False)
        )
        architecture["quick_gelu"] = tag_quick_gelu or architecture.get("quick_gelu", False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(max(config.seed, 0))
        model = _load_folder(folder, config.seed < 0) if folder else _load_named(architecture, config)
    if config.seed < 0:
        require_whole(f"encoders.text={config.text}", model.state_dict())
    tower = TextTower(model, tokenizer, config, torch.device(device), architecture)
    if config.weights:
        require_hashes(config, "text", text_sha256=tower.weights_sha256, image_sha256=tower.image_sha256)
    return tower


def save_text(tower: TextTower, folder: Path, merges: Path) -> None:
    """Write the tower, its image tower and the file `merges` of its tokenizer to a folder that `load_text` reads."""
    preprocess = dict(tower.model.visual.preprocess_cfg)
    config = {"model_cfg": tower.architecture, "preprocess_cfg": preprocess}
    with writing(folder / CONFIG):
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / MERGES).write_bytes(merges.read_bytes())
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tower.model.state_dict().items()}
    save_tensors(state, folder / WEIGHTS)


def _load_folder(folder: Path, weights: bool) -> nn.Module:
    """Load a folder in open_clip's layout; weights=False keeps random weights."""
    config = read_folder(folder)
    model = _build(config["model_cfg"], folder, folder / WEIGHTS if weights else None)
    stated = {name: value for name, value in (config.get("preprocess_cfg") or {}).items() if value is not None}
    model.visual.preprocess_cfg = {**_preprocess(), **{name: stated[name] for name in stated if name in PREPROCESS}}
    if weights:
        _load_weights(model, folder / WEIGHTS)
    return model


def _preprocess() -> dict[str, Any]:
    """How pictures are normalized, unless a model says otherwise: as for OpenAI's CLIP."""
    from pipeline.models.encoders.packages import open_clip

    return {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}


def _load_named(architecture: dict[str, Any], config: EncodersConfig) -> nn.Module:
    """An architecture of open_clip's list with a pretrained tag, a safetensors file, or random weights."""
    from pipeline.models.encoders.packages import open_clip

    name, tag = config.text, config.text_pretrained
    path = Path(tag).expanduser()
    if config.seed >= 0 or (tag and path.is_file()):
        model = _build(architecture, name, None if config.seed >= 0 else path)
        model.visual.preprocess_cfg = _preprocess()
        if config.seed < 0:
            _load_weights(model, path)
        return model
    tag_config = open_clip.get_pretrained_cfg(name, tag)
    if not tag_config:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise WeightsError(f"encoders.text_pretrained={tag!r} is neither a file nor a tag of {name}, which has: {tags}")
    try:  # open_clip only warns when weights need the approximate GELU
        with quiet_hub_clients():
            return open_clip.create_model(
                name, pretrained=tag, require_pretrained=True, force_quick_gelu=architecture["quick_gelu"]
            )
    except (RuntimeError, OSError, ValueError) as error:
        hub = tag_config.get("hf_hub", "").rstrip("/")
        source = f"the Hugging Face hub's {hub}" if hub else tag_config.get("url", "")
        raise WeightsError(
            f"encoders.text={name} {tag} cannot be fetched from {source} ({hub_error(error)}). By hand: put its "
            f"{CONFIG} and {WEIGHTS} into a folder and give encoders.text=FOLDER; or run `latentmill fetch` where "
            "there is internet, and give encoders.weights="
        ) from error


def _build(architecture: dict[str, Any], name: object, weights: Path | None = None) -> Any:
    """A model of open_clip's `model_cfg` with random weights. name: for the message of WeightsError. weights: the file
    that is to fill it, which must have the bytes for that."""
    from pipeline.models.encoders.packages import open_clip

    described_tower(architecture, f"encoders.text={name}")
    fields = dict(architecture)
    custom = fields.pop("custom_text", False)
    if "multimodal_cfg" in fields:
        raise WeightsError(f"encoders.text={name} is a CoCa model, which is not supported: choose a CLIP")
    if "timm_model_name" in fields["vision_cfg"]:
        fields["vision_cfg"] = {**fields["vision_cfg"], "timm_model_pretrained": False}

    def build() -> Any:
        return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**fields)

    try:
        if not fields["vision_cfg"].get("timm_model_name"):  # timm builds some networks from the values of tensors
            require_room(build, [custom, fields], f"encoders.text={name}", weights)
        return build()
    except WeightsError:
        raise
    except Exception as error:  # open_clip and timm check little of a configuration
        raise WeightsError(
            f"encoders.text={name} is not an architecture of open_clip: {one_line(repr(error))[:200]}"
        ) from None


def _load_weights(model: nn.Module, path: Path) -> None:
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: only .safetensors files are read (a pickle could run code)")
    state = read_file(path)[0]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"{path} holds another architecture: {one_line(str(error))[:500]}") from None
