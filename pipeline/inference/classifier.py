"""A run's trained classifier of noisy latents, which eval measures and which guides other models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import ClassifierTask, DiffusionConfig, TrainConfig
from pipeline.data.format.contract import Contract
from pipeline.data.format.contract_json import contract_from_json
from pipeline.diffusion.prediction import make_prediction
from pipeline.errors import RunError
from pipeline.models.classifier import Classifier
from pipeline.runs.averages import label, load_average
from pipeline.runs.directory import load_classifier_run


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier's run and one of its checkpoints, in evaluation mode, its weights without gradients.

    config: the noise levels that it knows. contract: of the cache that it was trained on, which names the autoencoder
    of its latents. classes: their names, () where the cache has none. n: samples seen by the weights. weights: "ema",
    "raw", or an average such as "ema=0.1".
    """

    network: Classifier
    config: DiffusionConfig
    contract: Contract
    n: int
    weights: str

    @property
    def classes(self) -> tuple[str, ...]:
        facts = self.contract.conditions.classes
        return facts.names if facts is not None else ()

    @property
    def count(self) -> int:
        """Number of classes."""
        return self.network.classes

    def logits(self, x_BCHW: Tensor, timestep: float, sigma: float) -> Tensor:
        """(B, classes) for x = alpha x_0 + sigma noise (B, C, h, w), as training makes it, of variance 1 in the
        discrete process. timestep: the network's timestep input there. Differentiable in x."""
        x = make_prediction(self.config).scale(x_BCHW, sigma)
        return self.network(x, torch.full((len(x),), timestep, dtype=torch.float32, device=x.device))

    def log_probability(self, x_BCHW: Tensor, timestep: float, sigma: float, classes_B: Tensor) -> Tensor:
        """log p(class | x, t) (B,) of each image's class (B,) int64, in nats; x, timestep, sigma as for `logits`.
        Differentiable in x."""
        logits = self.logits(x_BCHW, timestep, sigma)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        return F.log_softmax(logits, dim=1).gather(1, classes_B[:, None]).squeeze(1)


def load_classifier(
    url: str, at: int = 0, which: str = "ema", device: torch.device | str = "cpu", ema: float = 0.0
) -> TrainedClassifier:
    """The classifier of the run at `url` and its checkpoint at `at` samples (0: the newest that has these weights
    whole). which, ema: as in load_average. Raises RunError also for a run that is none of a classifier's."""
    info = load_classifier_run(url)
    n, state = load_average(info.storage, at, which, ema)
    contract = contract_from_json(info.contract)
    network = build_classifier(info.config, contract, state, device)
    return TrainedClassifier(network, info.config.diffusion, contract, n, label(which, ema))


def build_classifier(
    config: TrainConfig, contract: Contract, state: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> Classifier:
    """A classifier in evaluation mode that holds the tensors of `state`, not copies, where they are on `device`."""
    task = config.task
    assert isinstance(task, ClassifierTask), task
    with torch.device("meta"):
        classifier = Classifier(config.model, task.classes(contract), task.pool)
    try:
        classifier.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        raise RunError(f"the checkpoint's weights are not those of the run's configuration: {error}") from None
    return classifier.to(device).eval().requires_grad_(False)
