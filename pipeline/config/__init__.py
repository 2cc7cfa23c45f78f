"""Every setting of every verb, as frozen dataclasses with a docstring per field.

`config.loading.load.load(verb, overrides)` composes the packaged YAML with Hydra, merges it into the verb's dataclass,
refuses unknown keys and wrong types, and then checks the values (config/check/). Defaults are in the dataclasses; YAML
holds only what differs. A `Literal` lists the choices, `Annotated[int, Ge(1)]` states a bound (values/bounds.py), and a
plain `str` is free text. No module here imports torch, so that a login node can submit a run.
"""

from __future__ import annotations

from pipeline.config.adoption import IndexConfig
from pipeline.config.autoencoder import (
    AutoencoderConfig,
    FirstStageConfig,
    FirstStageEvalConfig,
    FirstStageLossConfig,
    GanConfig,
)
from pipeline.config.calibrate import CalibrateConfig
from pipeline.config.cluster import ClusterConfig, SubmitConfig
from pipeline.config.columns import ColumnsConfig
from pipeline.config.converting import ConvertConfig
from pipeline.config.datasets import (
    DataVerbConfig,
    EncodeConfig,
    FetchConfig,
    FiltersConfig,
    LimitsConfig,
    ReferenceConfig,
    SynthConfig,
    VerifyConfig,
)
from pipeline.config.model import (
    DiffusionConfig,
    EncodersConfig,
    FeaturesName,
    ModelConfig,
    SamplerConfig,
    SamplerName,
)
from pipeline.config.plan import PlanConfig
from pipeline.config.results import DemoConfig, EvalRunConfig, ExportConfig, ReconstructConfig, SampleConfig
from pipeline.config.run import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EmaConfig,
    EvaluationConfig,
    GuardConfig,
    LaunchConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
)
from pipeline.config.steering import GuideConfig
from pipeline.config.tasks.base import TaskConfig
from pipeline.config.tasks.kinds import (
    ClassifierTask,
    ClassTask,
    InpaintTask,
    LayoutTask,
    SemanticTask,
    SuperresTask,
    TextTask,
    UnconditionalTask,
)
from pipeline.config.train import EvalConfig, TrainConfig

CONFIGS = {
    "synth": SynthConfig,
    "fetch": FetchConfig,
    "convert": ConvertConfig,
    "encode": EncodeConfig,
    "columns": ColumnsConfig,
    "index": IndexConfig,
    "verify": VerifyConfig,
    "reference": ReferenceConfig,
    "train": TrainConfig,
    "autoencoder": AutoencoderConfig,
    "data": DataVerbConfig,
    "eval": EvalRunConfig,
    "reconstruct": ReconstructConfig,
    "sample": SampleConfig,
    "export": ExportConfig,
    "demo": DemoConfig,
    "plan": PlanConfig,
    "calibrate": CalibrateConfig,
    "submit": SubmitConfig,
}
"""The configuration of each verb that has one."""

__all__ = [
    "CONFIGS",
    "AutoencoderConfig",
    "CalibrateConfig",
    "CheckpointConfig",
    "ClassTask",
    "ClassifierTask",
    "ClusterConfig",
    "ColumnsConfig",
    "ConvertConfig",
    "DataConfig",
    "DataVerbConfig",
    "DeepSpeedConfig",
    "DemoConfig",
    "DiffusionConfig",
    "EmaConfig",
    "EncodeConfig",
    "EncodersConfig",
    "EvalConfig",
    "EvalRunConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FeaturesName",
    "FetchConfig",
    "FiltersConfig",
    "FirstStageConfig",
    "FirstStageEvalConfig",
    "FirstStageLossConfig",
    "GanConfig",
    "GuardConfig",
    "GuideConfig",
    "IndexConfig",
    "InpaintTask",
    "LaunchConfig",
    "LayoutTask",
    "LimitsConfig",
    "ModelConfig",
    "OptimConfig",
    "PlanConfig",
    "ReconstructConfig",
    "ReferenceConfig",
    "RunConfig",
    "SampleConfig",
    "SamplerConfig",
    "SamplerName",
    "SemanticTask",
    "SubmitConfig",
    "SuperresTask",
    "SynthConfig",
    "TaskConfig",
    "TextTask",
    "TrackingConfig",
    "TrainConfig",
    "UnconditionalTask",
    "VerifyConfig",
]
