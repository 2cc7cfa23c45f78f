"""The export of semantic synthesis, which no pipeline of diffusers asks for: a folder with a loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.conditions.facts import Conditions
from pipeline.config import SemanticTask
from pipeline.interchange.tasks.base import COND_STAGE, TASK_WEIGHTS, Export, Plan, beneath, under
from pipeline.interchange.tasks.loops import WEIGHTS, loop_readme
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower

CODE = (
    WEIGHTS
    + """\
table, grid = weights["embed.weight"], facts["conditions"]["labels"]["grid"]  # the table's last row is no label


def said(labels):
    cells = table[labels.long()].permute(0, 3, 1, 2)
    pooled = facts["task"]["labels"] == "average"
    return {"planes": F.avg_pool2d(cells, grid) if pooled else F.pixel_unshuffle(cells, grid)}


given, nothing = said(labels), said(torch.full(labels.shape, len(table) - 1))
"""
)


class SemanticExport(Export):
    """A run on label maps."""

    def plan(self, scheduler: Mapping[str, Any], first_stage: FirstStage, tower: TextTower | None) -> Plan:
        facts = self.contract.conditions.labels
        assert facts is not None
        asks = (
            f"`labels` (B, {facts.grid} h, {facts.grid} w),\nwhole numbers from 0 to {facts.count - 1}: the label at "
            "the middle of each cell of the map"
        )
        why = "none takes label maps"
        return Plan(
            readme=loop_readme(why, asks, CODE, scheduler, "UNet2DModel"),
            why=why,
            tensors={TASK_WEIGHTS: self.weights()},
            facts=self.facts(),
        )

    def compvis(self) -> dict[str, Tensor]:
        weights = self.weights()
        if self._averages():
            return {f"{COND_STAGE}channel_mapper.weight": weights["embed.weight"].T[:, :, None, None].contiguous()}
        return under(weights, COND_STAGE)

    @classmethod
    def adopt(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mapper = tensors.get(f"{COND_STAGE}channel_mapper.weight")
        return beneath(tensors, COND_STAGE) if mapper is None else {"embed.weight": mapper.flatten(1).T.contiguous()}

    @classmethod
    def inputs(cls, conditions: Conditions) -> str:
        return "the label map"

    def note(self) -> str:
        if self._averages():
            facts = self.contract.conditions.labels
            assert facts is not None
            return (
                f"channel_mapper has {facts.count + 1} input channels, the last of which is no label, and CompVis' "
                f"SpatialRescaler needs n_stages={facts.grid.bit_length() - 1}"
            )
        return "CompVis averages labels, and this run does not (task.labels=shuffle): their code cannot run the file"

    def _averages(self) -> bool:
        assert isinstance(self.config, SemanticTask)
        return self.config.labels == "average"


EXPORT = SemanticExport
