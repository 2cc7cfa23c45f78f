"""The export of text-to-image: StableDiffusionPipeline, or a loop where a transformer of the run encodes captions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.config import TextTask
from pipeline.errors import ConfigError
from pipeline.interchange import clip
from pipeline.interchange.readme import WITH_TEXT, WITH_TEXT_ALONE, WITHOUT_INDEX, WITHOUT_TEXT, readme
from pipeline.interchange.scheduler import pipeline_runs
from pipeline.interchange.tasks.base import COND_STAGE, OPTIONAL, TASK_WEIGHTS, Export, Plan, beneath
from pipeline.interchange.tasks.loops import NETWORK, STATES, TOKENIZER, WEIGHTS, loop_readme
from pipeline.log import log
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower

TRIMMED = (
    "the run attends to a caption's own tokens alone (text_storage=trimmed), and StableDiffusionPipeline to padding "
    "too, so its pictures differ: give the UNet an encoder_attention_mask"
)
CODE = (
    WEIGHTS
    + NETWORK
    + TOKENIZER
    + """\
def said(captions):
    ids = ids_of(captions)
    x = weights["tokens.embed.weight"][ids] + weights["tokens.place.weight"]
    return {"encoder_hidden_states": transformer("tokens.transformer", x)}


given, nothing = said(captions), said([""] * len(captions))
"""
)
CAPTIONED = """\
def said(captions):
    states, mask = states_of(captions)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


given, nothing = said(captions), said([""] * len(captions))
"""
BERT = (8, 64)
"""Heads and their width, which CompVis' own transformer has always."""


class TextExport(Export):
    """A run on captions."""

    def plan(self, scheduler: Mapping[str, Any], first_stage: FirstStage, tower: TextTower | None) -> Plan:
        if not self.reads_states:
            return self._learned(scheduler, tower)
        if first_stage.stored != "moments":
            self.require_clip(tower)
            why = "StableDiffusionPipeline takes an AutoencoderKL alone"
            code = STATES + CAPTIONED
            return Plan(
                readme=loop_readme(why, "`captions`, a list of B texts", code, scheduler, "UNet2DConditionModel"),
                why=why,
                text_encoder=True,
                facts=self.facts(),
            )
        runs = pipeline_runs(self.trained.info.config.diffusion)
        with_text = self.denoiser.unet.config.context_width > 0 and tower is not None and clip.is_clip(tower)
        note = WITHOUT_TEXT
        if with_text:
            note = WITH_TEXT if runs else WITH_TEXT_ALONE
            note = WITHOUT_INDEX if first_stage.shift else note
        trimmed = with_text and self.contract.trimmed
        if trimmed:
            log.warning(TRIMMED)
        text = partial(readme, note=note, trimmed=trimmed, loop="" if runs else scheduler["_class_name"])
        pipeline = "StableDiffusionPipeline" if with_text and runs and not first_stage.shift else ""
        return Plan(readme=text, pipeline=pipeline, index=OPTIONAL, text_encoder=with_text)

    def _learned(self, scheduler: Mapping[str, Any], tower: TextTower | None) -> Plan:
        """For a transformer that was trained with the UNet."""
        if tower is None:
            raise ConfigError("the run's cache names no tokenizer, so no folder could read captions")
        why = "captions are encoded by a transformer that was trained with the UNet, under task.safetensors"
        return Plan(
            readme=loop_readme(why, "`captions`, a list of B texts", CODE, scheduler, "UNet2DConditionModel"),
            why=why,
            tokenizer=True,
            tensors={TASK_WEIGHTS: self.weights()},
            facts=self.facts(),
        )

    def compvis(self) -> dict[str, Tensor]:
        return {} if self.reads_states else bert_state(self.weights(), f"{COND_STAGE}transformer.")

    @classmethod
    def adopt(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_bert(beneath(tensors, f"{COND_STAGE}transformer."))

    def note(self) -> str:
        assert isinstance(self.config, TextTask)
        if self.reads_states or (self.config.heads, self.config.head_width) == BERT:
            return ""
        return (
            f"CompVis' own transformer has {BERT[0]} heads of {BERT[1]}, and this run's {self.config.heads} of "
            f"{self.config.head_width}: their code would load the file, or refuse it, and not compute the same"
        )


def bert_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our transformer over tokens under the names of CompVis' BERTEmbedder, whose head of logits is not read."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part = name.removeprefix("tokens.")
        if part in TOKENS:
            theirs[prefix + TOKENS[part]] = tensor
            continue
        _, _, number, module, kind = part.split(".")
        if module == "qkv":
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                theirs[f"{prefix}attn_layers.layers.{2 * int(number)}.1.to_{letter}.{kind}"] = rows.clone()
        else:
            after, named = LAYERS[module]
            theirs[f"{prefix}attn_layers.layers.{2 * int(number) + after}.{named}.{kind}"] = tensor
    return theirs


def from_bert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of bert_state, without a prefix; {} for other names, such as those of CLIP's tower."""
    if not all(name in state for name in TOKENS.values()):
        return {}
    ours = {f"tokens.{mine}": state[theirs] for mine, theirs in TOKENS.items()}
    numbers = [int(name.split(".")[2]) for name in state if re.match(r"attn_layers\.layers\.\d{1,3}\.", name)]
    for number in range((max(numbers, default=-1) + 1) // 2):
        layer, block = f"attn_layers.layers.{2 * number}.1.to_", f"tokens.transformer.blocks.{number}."
        parts = [state[name] for letter in "qkv" if (name := f"{layer}{letter}.weight") in state]
        ours |= {f"{block}qkv.weight": torch.cat(parts)} if len(parts) == 3 else {}
        for mine, (after, named) in LAYERS.items():
            for kind in ("weight", "bias"):
                name = f"attn_layers.layers.{2 * number + after}.{named}.{kind}"
                ours |= {f"{block}{mine}.{kind}": state[name]} if name in state else {}
    return ours


TOKENS = {
    "embed.weight": "token_emb.weight",
    "place.weight": "pos_emb.emb.weight",
    "transformer.norm.weight": "norm.weight",
    "transformer.norm.bias": "norm.bias",
}
LAYERS = {"norm1": (0, "0"), "out": (0, "1.to_out"), "norm2": (1, "0"), "up": (1, "1.net.0.0"), "down": (1, "1.net.2")}
"""Module of a block -> which of the two layers that CompVis makes of it, and its name there."""

EXPORT = TextExport
