"""A vector that is one of a known number of vectors, as the table of embeddings that other software has in its place.

Our UNet adds two linear layers of a vector to the timestep's embedding. Where the vector is a row of a learned table,
as of classes or of noise levels, another table holds the same: that of what the layers make of each row.

    diffusers   class_embedding.weight, with num_class_embeds
    compvis     model.diffusion_model.label_emb.weight, with num_classes
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pipeline.errors import WeightsError
from pipeline.interchange.unet import COMPVIS_PREFIX
from pipeline.models.unet.model import UNet

NAMES = {"diffusers": ("class_embedding", "class_embedding.weight")}
NAMES["compvis"] = (f"{COMPVIS_PREFIX}label_emb", f"{COMPVIS_PREFIX}label_emb.weight")
"""Layout -> the modules of a vector, and the tensor that takes their place."""


def refuse_table(where: str, names: Collection[str], layout: str) -> None:
    """Raise WeightsError for weights with such a table, from which no layers of a vector can be made."""
    name = NAMES[layout][1]
    if name in names:
        raise WeightsError(
            f"{where} holds {name}, one table in place of the layers of our vector, which cannot be made of it: begin "
            "with the run itself"
        )


@torch.no_grad()
def class_table(unet: UNet, vectors_NV: Tensor) -> Tensor:
    """What is added to the timestep's embedding for each vector (N, V): (N, 4 channels) float32, on the CPU."""
    assert unet.embed_vector is not None, "this network takes no vector"
    return unet.embed_vector(vectors_NV.to(unet.norm_out.weight)).float().cpu()


def with_class_table(state: Mapping[str, Tensor], table: Tensor, layout: str) -> dict[str, Tensor]:
    """The UNet's weights in a layout, with the table in place of the layers of its vector."""
    layers, name = NAMES[layout]
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(f"{layers}.")}
    return kept | {name: table.clone()}
