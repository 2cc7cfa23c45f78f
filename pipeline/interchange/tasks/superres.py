"""The export of super-resolution: LDMSuperResolutionPipeline or StableDiffusionUpscalePipeline, else a loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.conditions.facts import Conditions
from pipeline.config import SuperresTask
from pipeline.interchange.tasks.base import OPTIONAL, Export, Plan
from pipeline.interchange.tasks.loops import STATES, loop_readme, pipeline_readme
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower

UPSCALE_SCALE = 0.08333
"""The scale of latents that StableDiffusionUpscalePipeline sets, whatever the folder says."""
UNSCALED = ("DDIMScheduler", "DPMSolverMultistepScheduler")
"""Schedulers that do not scale a model's input: LDMSuperResolutionPipeline would scale the small image with it."""
LDM = """\
from diffusers import LDMSuperResolutionPipeline

# small: (B, 3, h, w) float32 in [-1, 1]; a PIL picture would be resized to multiples of 32 pixels
pictures = LDMSuperResolutionPipeline.from_pretrained(folder)(small, num_inference_steps=50).images
"""
UPSCALE = """\
from diffusers import StableDiffusionUpscalePipeline

pipeline = StableDiffusionUpscalePipeline.from_pretrained(folder)
pictures = pipeline("a caption", image=small, noise_level=0).images
"""
SMALL = """\
f, s = facts["latents"]["downsampling"], facts["conditions"]["lowres"]["factor"]
image = small.float() / 127.5 - 1
"""
NOISE = """\
level = 0  # of the noise on the small image; 0 = none
if level:
    kept = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)[level - 1].float()
    image = kept.sqrt() * image + (1 - kept).sqrt() * torch.randn_like(image)
"""
PLANES = """\
planes = F.pixel_unshuffle(image, f // s) if s < f else image
if s > f:
    planes = F.interpolate(image, scale_factor=s // f, mode="bilinear", align_corners=False)
given = {"planes": planes}
"""
LEVEL = """\
given["class_labels"] = torch.full((len(image),), level)
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


class SuperresExport(Export):
    """A run on small images."""

    def plan(self, scheduler: Mapping[str, Any], first_stage: FirstStage, tower: TextTower | None) -> Plan:
        self.require_clip(tower)
        assert isinstance(self.config, SuperresTask)
        facts, text, vectors = self.contract.conditions.lowres, self.reads_states, self.vectors()
        assert facts is not None
        name, channels = scheduler["_class_name"], self.contract.latent_shape[0]
        same_size = facts.factor == self.contract.downsampling
        takes_autoencoder = first_stage.stored == "moments" and not self.contract.trimmed and "FlowMatch" not in name
        if same_size and text and vectors is not None and takes_autoencoder:
            return self._upscale(vectors)
        if same_size and not text and vectors is None and channels == 3 and name in UNSCALED:
            words = (
                "Its autoencoder's latents have the scale that the UNet was trained on, since the pipeline undoes "
                "none.\n"
            )
            text_of = pipeline_readme(LDM, words)
            return Plan(
                readme=text_of, pipeline="LDMSuperResolutionPipeline", vae="vqvae", scale=1.0, facts=self.facts()
            )
        why = self._why(same_size, text, vectors is not None, channels, name, first_stage)
        asks = f"`small` (B, 3, H / {facts.factor}, W / {facts.factor}) uint8, the small pictures"
        asks += ", and `captions`, a list of B texts" if text else ""
        code = (STATES if text else "") + SMALL + (NOISE if vectors is not None else "") + PLANES
        code += (LEVEL if vectors is not None else "") + (CAPTIONED if text else ALONE)
        unet = "UNet2DConditionModel" if text else "UNet2DModel"
        return Plan(
            readme=loop_readme(why, asks, code, scheduler, unet),
            why=why,
            text_encoder=text,
            vectors=vectors,
            facts=self.facts(),
        )

    def _upscale(self, vectors: Tensor) -> Plan:
        """For the pipeline that numbers levels from the first that has noise."""
        noise = len(vectors) - 1
        words = (
            f"noise_level is 0 to {noise - 1}: level n of the pipeline is level n + 1 of the run, whose level 0, no "
            f"noise, it cannot ask for.\nIts autoencoder's latents have the scale {UPSCALE_SCALE}, which the pipeline "
            "sets.\n"
        )
        betas = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear", "num_train_timesteps": 1000}
        added = {"_class_name": "DDPMScheduler", **betas, "clip_sample": False}
        return Plan(
            readme=pipeline_readme(UPSCALE, words),
            pipeline="StableDiffusionUpscalePipeline",
            index={
                "feature_extractor": OPTIONAL["feature_extractor"],
                "safety_checker": OPTIONAL["safety_checker"],
                "watermarker": [None, None],
                "low_res_scheduler": ["diffusers", "DDPMScheduler"],
                "max_noise_level": noise - 1,
            },
            text_encoder=True,
            scale=UPSCALE_SCALE,
            vectors=vectors[1:],
            schedulers={"low_res_scheduler": added},
            facts=self.facts(),
        )

    def _why(
        self, same_size: bool, text: bool, noise: bool, channels: int, scheduler: str, first_stage: FirstStage
    ) -> str:
        """Why neither pipeline runs it."""
        reasons = []
        if not same_size:
            reasons.append("both take the small image at the size of the latent alone")
        elif text != noise:
            reasons.append("StableDiffusionUpscalePipeline takes captions and a level of noise, both or neither")
        elif text:
            what = "attends to padding too" if self.contract.trimmed else "cannot run rectified flow"
            what = what if first_stage.stored == "moments" else "takes an AutoencoderKL alone"
            reasons.append(f"StableDiffusionUpscalePipeline {what}")
        elif channels != 3:
            reasons.append(f"LDMSuperResolutionPipeline takes latents of 3 channels alone, and these have {channels}")
        else:
            reasons.append(f"LDMSuperResolutionPipeline would scale the small image with the input of {scheduler}")
        return "; ".join(reasons)

    @classmethod
    def inputs(cls, conditions: Conditions) -> str:
        return "the small picture"

    def vectors(self) -> Tensor | None:
        return self.weights().get("embed_level.weight")


EXPORT = SuperresExport
