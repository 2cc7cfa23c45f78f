"""The export of class-conditional models: UNet2DConditionModel and a table of tokens, or UNet2DModel with classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.interchange.tasks.base import CLASSES, COND_STAGE, Export, Plan
from pipeline.interchange.tasks.loops import loop_readme
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower

TOKEN = """\
table = load_file(f"{folder}/class_embedding.safetensors")["weight"]  # the last row is no class


def said(numbers):
    return {"encoder_hidden_states": table[torch.as_tensor(numbers)][:, None]}


given, nothing = said(classes), said([len(table) - 1] * len(classes))
"""
VECTOR = """\
no_class = unet.config.num_class_embeds - 1
given = {"class_labels": torch.as_tensor(classes)}
nothing = {"class_labels": torch.full((len(classes),), no_class)}
"""


class ClassExport(Export):
    """A run on classes."""

    def plan(self, scheduler: Mapping[str, Any], first_stage: FirstStage, tower: TextTower | None) -> Plan:
        facts = self.contract.conditions.classes
        assert facts is not None
        asks = f"`classes`, a list of B numbers from 0 to {facts.count - 1}"
        asks += " (task.json has their names)" if facts.names else ""
        if self.config.makes_context:
            why = "none asks for a class of a UNet that attends"
            text = loop_readme(why, asks, TOKEN, scheduler, "UNet2DConditionModel")
            return Plan(readme=text, why=why, tensors={CLASSES: {"weight": self._table()}}, facts=self.facts())
        why = "none asks for a class of a UNet2DModel and an autoencoder"
        text = loop_readme(why, asks, VECTOR, scheduler, "UNet2DModel")
        return Plan(readme=text, why=why, vectors=self.vectors(), facts=self.facts())

    def vectors(self) -> Tensor | None:
        return None if self.config.makes_context else self._table()

    def compvis(self) -> dict[str, Tensor]:
        return {f"{COND_STAGE}embedding.weight": self._table()} if self.config.makes_context else {}

    @classmethod
    def adopt(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = f"{COND_STAGE}embedding.weight"
        return {"embed.weight": tensors[name]} if name in tensors else {}

    def _table(self) -> Tensor:
        return self.weights()["embed.weight"]


EXPORT = ClassExport
