"""The export of unconditional models: LDMPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.interchange.tasks.base import Export, Plan
from pipeline.interchange.tasks.loops import loop_readme, pipeline_readme
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower

LDM = """\
from diffusers import LDMPipeline

pictures = LDMPipeline.from_pretrained(folder)(batch_size=4, num_inference_steps=50).images
"""
CODE = """\
given = nothing = {}
"""


class UnconditionalExport(Export):
    """A run without conditioning."""

    def plan(self, scheduler: Mapping[str, Any], first_stage: FirstStage, tower: TextTower | None) -> Plan:
        if scheduler["_class_name"] == "DDIMScheduler":
            words = "The UNet is unconditional: there is no text encoder, and nothing to ask for.\n"
            scale = 1.0 if first_stage.shift else None  # the pipeline knows no shift
            readme = pipeline_readme(LDM, words)
            return Plan(readme=readme, pipeline="LDMPipeline", vae="vqvae", scale=scale, facts=self.facts())
        why = f"LDMPipeline takes DDIM alone, and this folder's scheduler is {scheduler['_class_name']}"
        text = loop_readme(why, "nothing else", CODE, scheduler, "UNet2DModel")
        return Plan(readme=text, why=why, facts=self.facts())


EXPORT = UnconditionalExport
