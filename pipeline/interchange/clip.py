"""An open_clip text tower as transformers' CLIPTextModel and CLIPTokenizer, which diffusers' pipelines load.

The exported model ends at the layer that the cache stores, so its last hidden state (after the final norm) is what the
UNet was trained on; Stable Diffusion 2's folders do the same with the last but one layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.encoders.text import LAYERS, TextTower
from pipeline.models.weights import save_tensors
from pipeline.storage.staging import writing

ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}  # open_clip's class -> transformers' name
BLOCK = "transformer.resblocks."
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def is_clip(tower: TextTower) -> bool:
    """Whether transformers' CLIPTextModel can hold the tower: pre-norm blocks, causal, and a GELU of either kind."""
    text = tower._tower
    return (
        type(text.ln_final).__name__.startswith("LayerNorm")
        and type(text.transformer.resblocks[0].mlp.gelu).__name__ in ACTIVATIONS
        and isinstance(text.transformer.resblocks[0].ls_1, nn.Identity)
    )


def text_model_config(tower: TextTower) -> dict[str, Any]:
    """config.json of the CLIPTextModel."""
    text = tower._tower
    block = text.transformer.resblocks[0]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": text.token_embedding.num_embeddings,
        "hidden_size": tower.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(text.transformer.resblocks) - LAYERS[tower.layer],
        "num_attention_heads": block.attn.num_heads,
        "max_position_embeddings": tower.length,
        "hidden_act": ACTIVATIONS[type(block.mlp.gelu).__name__],
        "layer_norm_eps": text.ln_final.eps,
        "projection_dim": tower.embed_dim,
        "bos_token_id": tower.tokenizer.sot,
        "eos_token_id": tower.eot,
        "pad_token_id": tower.pad,
        "dtype": "float32",
    }


def text_model_state(tower: TextTower) -> dict[str, Tensor]:
    """Weights of the CLIPTextModel: float32, on the CPU."""
    text = tower._tower
    layers = len(text.transformer.resblocks) - LAYERS[tower.layer]
    state: Mapping[str, Tensor] = text.state_dict()
    renamed = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"][: tower.length],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    for name, tensor in state.items():
        match = re.fullmatch(r"(\d+)\.(.+?)[._](weight|bias)", name.removeprefix(BLOCK))
        if not name.startswith(BLOCK) or match is None or int(match[1]) >= layers:
            continue
        layer, part, kind = f"encoder.layers.{match[1]}", match[2], match[3]
        if part == "attn.in_proj":
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{letter}_proj.{kind}"] = rows
        else:
            renamed[f"{layer}.{PARTS[part]}.{kind}"] = tensor
    return {f"text_model.{name}": t.detach().float().cpu().contiguous().clone() for name, t in renamed.items()}


def compvis_state(tower: TextTower) -> dict[str, Tensor]:
    """The tower as CompVis' checkpoints hold it, float32, on the CPU. A tower of which the last layer is read gets
    transformers' names, as in Stable Diffusion 1; one of which the last but one is read is whole and keeps open_clip's
    names, as in Stable Diffusion 2."""
    if tower.layer == "last":
        return {f"cond_stage_model.transformer.{name}": tensor for name, tensor in text_model_state(tower).items()}
    return {
        f"cond_stage_model.model.{name}": tensor.detach().float().cpu().contiguous().clone()
        for name, tensor in tower._tower.state_dict().items()
        if not name.startswith("visual.")
    }


def save_text_model(tower: TextTower, folder: Path) -> None:
    """Write the folder of the CLIPTextModel."""
    with writing(folder / "config.json"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(text_model_config(tower), indent=2) + "\n", encoding="utf-8")
    save_tensors(text_model_state(tower), folder / "model.safetensors")


def save_tokenizer(tower: TextTower, folder: Path) -> None:
    """Write the folder of the CLIPTokenizer: the same ids, padded with the same id to the same length."""
    from transformers import CLIPTokenizer

    source = tower.tokenizer
    pieces = {i: piece for piece, i in source.vocabulary.items()}
    start, end, pad = (pieces[i] for i in (source.sot, tower.eot, tower.pad))
    merges: list[Any] = list(source.merges)
    tokenizer = CLIPTokenizer(
        vocab=dict(source.vocabulary),
        merges=merges,
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=pad,
        model_max_length=tower.length,
    )
    with writing(folder):
        tokenizer.save_pretrained(folder)


def largest_difference(tower: TextTower, text_encoder: Path, tokenizer: Path, captions: list[str]) -> float:
    """Largest relative difference between the tower's states of captions and those of the written folders.

    Infinite when the token ids differ.
    """
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    token_ids = tower.tokenize(captions)
    loaded_tokenizer = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
    length = tower.length
    loaded_ids = loaded_tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    if not torch.equal(token_ids, loaded_ids):
        return float("inf")
    model = CLIPTextModel.from_pretrained(text_encoder, local_files_only=True).eval()
    with torch.no_grad():
        states = model(loaded_ids).last_hidden_state
    expected = tower.encode(token_ids).cpu()
    return float((states - expected).abs().max() / expected.abs().max())
