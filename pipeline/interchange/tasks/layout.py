"""The export of layout-to-image, which no pipeline of diffusers asks for: a folder with a loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.conditions.facts import Conditions
from pipeline.config import LayoutTask
from pipeline.interchange.tasks.base import COND_STAGE, TASK_WEIGHTS, Export, Plan, beneath, under
from pipeline.interchange.tasks.loops import NETWORK, STATES, WEIGHTS, loop_readme
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower

BOXES = """\
def covered(spans, side):
    place = torch.arange(side)
    low, high = (spans[..., i, None] * side for i in range(2))
    return (torch.minimum(high, place + 1) - torch.maximum(low, place)).clamp(0, 1)


def planes_of(classes, edges, there):
    h, w = noise.shape[-2:]
    planes = []
    if facts["task"]["coordinates"]:
        y, x = ((2 * torch.arange(side) + 1) / side - 1 for side in (h, w))
        both = torch.stack([x.expand(h, w), y[:, None].expand(h, w)])
        planes.append(both.expand(len(classes), -1, -1, -1))
    if facts["task"]["paint"]:
        vectors = weights["paint.weight"][classes] * there[..., None]
        columns, rows = covered(edges[..., 0::2], w), covered(edges[..., 1::2], h)
        planes.append(torch.einsum("bnc,bnh,bnw->bchw", vectors, rows, columns))
    return torch.cat(planes, dim=1) if planes else None


def said(boxes):
    rows = torch.full((len(boxes), facts["conditions"]["boxes"]["most"], 5), -1.0)
    for row, of_picture in zip(rows, boxes):
        if len(of_picture):
            row[: len(of_picture)] = torch.tensor(of_picture).half().float()
    there, edges, classes = rows[..., 0] >= 0, rows[..., 1:], rows[..., 0].clamp(min=0).long()
    angles = edges[..., None] * (torch.pi * 2.0 ** torch.arange(4))
    features = torch.cat([edges, angles.sin().flatten(-2), angles.cos().flatten(-2)], dim=-1)
    tokens = weights["embed.weight"][classes] + linear("first", features)
    tokens = linear("last", F.silu(linear("hidden", F.silu(tokens))))
    always = weights["embed.weight"][-1].expand(len(rows), 1, -1)
    context = torch.cat([always, tokens], dim=1)
    mask = torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), there], dim=1)
    if facts["task"]["encoder"] == "transformer":
        context = transformer("transformer", context, mask[:, None, None, :])
    planes = planes_of(classes, edges, there)
    return {"planes": planes, "encoder_hidden_states": context, "encoder_attention_mask": mask}


"""
ALONE = """\
given, nothing = said(boxes), said([[]] * len(boxes))
"""
CAPTIONED = """\
def with_captions(captions):
    states, mask = states_of(captions)
    both = dict(said(boxes))
    both["encoder_hidden_states"] = torch.cat([both["encoder_hidden_states"], states], dim=1)
    both["encoder_attention_mask"] = torch.cat([both["encoder_attention_mask"], mask], dim=1)
    return both


given, nothing = with_captions(captions), with_captions([""] * len(captions))
"""


class LayoutExport(Export):
    """A run on boxes."""

    def plan(self, scheduler: Mapping[str, Any], first_stage: FirstStage, tower: TextTower | None) -> Plan:
        self.require_clip(tower)
        facts, text = self.contract.conditions.boxes, self.reads_states
        assert facts is not None and isinstance(self.config, LayoutTask)
        asks = (
            f"`boxes`, for each of B pictures a list of up to {facts.most} `[class, x0, y0, x1, y1]`\n"
            f"(classes 0 to {facts.count - 1}, edges as shares of the picture)"
        ) + (" and `captions`, a list of B texts" if text else "")
        why = "none takes boxes for a UNet that was trained with their encoder"
        code = WEIGHTS + NETWORK + (STATES if text else "") + BOXES + (CAPTIONED if text else ALONE)
        return Plan(
            readme=loop_readme(why, asks, code, scheduler, "UNet2DConditionModel"),
            why=why,
            text_encoder=text,
            tensors={TASK_WEIGHTS: self.weights()},
            facts=self.facts(),
        )

    def compvis(self) -> dict[str, Tensor]:
        return under(self.weights(), COND_STAGE)

    @classmethod
    def adopt(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        beside = ("transformer.text_model.", "model.")  # a text tower
        named = beneath(tensors, COND_STAGE)
        return {name: tensor for name, tensor in named.items() if not name.startswith(beside)}

    @classmethod
    def inputs(cls, conditions: Conditions) -> str:
        return "coordinates, then the painted boxes"

    def note(self) -> str:
        return (
            "CompVis has no encoder of boxes such as this: cond_stage_model.* has our names, which their code refuses"
        )


EXPORT = LayoutExport
