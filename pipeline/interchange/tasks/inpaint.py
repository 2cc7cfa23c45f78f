"""The export of inpainting: StableDiffusionInpaintPipeline where the masks are Stable Diffusion's, else a loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.conditions.facts import Conditions, MaskFacts
from pipeline.interchange.tasks.base import OPTIONAL, Export, Plan
from pipeline.interchange.tasks.loops import STATES, loop_readme, pipeline_readme
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower

INPAINT = """\
from diffusers import StableDiffusionInpaintPipeline

pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
pictures = pipeline("a caption", image=image, mask_image=mask, strength=1.0).images  # white is the hole
"""
WORDS = """The posterior of the folder's autoencoder has no variance: the pipeline samples the masked picture's latent,
and the run was trained on its mean. The pipeline redraws the whole picture: paste what is outside of the hole.
"""
MASKED = """\
said, f = facts["conditions"]["mask"], facts["latents"]["downsampling"]
hole = mask.float()[:, None]
pixels = image.float() / 127.5 - 1
hidden = torch.where(hole > 0, torch.tensor(-1.0 if said["hole"] == "black" else 0.0), pixels)
masked = (vae.encode(hidden).latent_dist.mean.half().float() - shift) * scale
cells = F.max_pool2d(hole, f) if said["pooling"] == "max" else hole[..., ::f, ::f]
cells = cells * (1 - said["low"]) + said["low"]
parts = [cells, masked] if said["order"] == "mask_masked" else [masked, cells]
given = {"planes": torch.cat(parts, dim=1)}
"""
ALONE = """\
nothing = given
"""
CAPTIONED = """\


def with_captions(captions):
    states, mask = states_of(captions)
    return {**given, "encoder_hidden_states": states, "encoder_attention_mask": mask}


given, nothing = with_captions(captions), with_captions([""] * len(captions))
"""
PASTE = """\
pasted = torch.where(hole > 0, pictures, pixels)
"""


class InpaintExport(Export):
    """A run on masks."""

    def plan(self, scheduler: Mapping[str, Any], first_stage: FirstStage, tower: TextTower | None) -> Plan:
        self.require_clip(tower)
        facts, text = self.contract.conditions.mask, self.reads_states
        assert facts is not None
        why = self._why(facts, first_stage, scheduler["_class_name"])
        if not why:
            return Plan(
                readme=pipeline_readme(INPAINT, WORDS),
                pipeline="StableDiffusionInpaintPipeline",
                index=OPTIONAL,
                mean_only=True,
                scale=1.0 if first_stage.shift else None,
                text_encoder=True,
                facts=self.facts(),
            )
        asks = "`image` (B, 3, H, W) uint8 and `mask`\n(B, H, W), 1 inside the hole and 0 outside of it"
        asks += ", and `captions`, a list of B texts" if text else ""
        code = (STATES if text else "") + MASKED + (CAPTIONED if text else ALONE)
        unet = "UNet2DConditionModel" if text else "UNet2DModel"
        readme = loop_readme(why, f"{asks}; `pasted` has the picture outside of the hole", code, scheduler, unet, PASTE)
        return Plan(readme=readme, why=why, text_encoder=text, facts=self.facts())

    @classmethod
    def inputs(cls, conditions: Conditions) -> str:
        assert conditions.mask is not None
        parts = ["the mask", "the masked picture's latent"]
        return ", then ".join(parts if conditions.mask.order == "mask_masked" else parts[::-1])

    def _why(self, facts: MaskFacts, first_stage: FirstStage, scheduler: str) -> str:
        """Why StableDiffusionInpaintPipeline does not run it, "" where it does."""
        channels, takes = self.contract.latent_shape[0], "StableDiffusionInpaintPipeline takes"
        if not self.reads_states:
            return f"{takes} captions, and this model none"
        if first_stage.stored != "moments":
            return f"{takes} an AutoencoderKL alone"
        if channels != 4:
            return f"{takes} latents of 4 channels alone, and these have {channels}"
        differing = [
            words
            for words, same in (
                ("the mask before the masked latent", facts.order == "mask_masked"),
                ("masks of 0 outside of the hole", facts.low == 0),
                ("grey holes", facts.hole == "grey"),
                ("masks sampled by nearest", facts.pooling == "nearest"),
                ("contexts with their padding", not self.contract.trimmed),
                ("no rectified flow", "FlowMatch" not in scheduler),
            )
            if not same
        ]
        return f"{takes} {', '.join(differing)}, and this model does not" if differing else ""


EXPORT = InpaintExport
