"""Typed dataclasses for every job, and the strict reader for the JSON configs of model folders."""

from engine.config.data import CROPS, DATA_KINDS, DRAWN, DataConfig
from engine.config.drawing import FORMATS, MAX_INDEX, OF_THE_WAY, SIGHTS, GenerateConfig, JobConfig
from engine.config.finetuning import (
    WHAT,
    ControlConfig,
    FinetuneConfig,
    FinetuneStage,
    PriorConfig,
    SamplesConfig,
)
from engine.config.inversion import InversionConfig
from engine.config.reader import IN_WORDS, from_json, nearest, to_json
from engine.config.training import (
    DECAYS,
    OPTIMIZERS,
    REMATS,
    TIME_SAMPLINGS,
    WEIGHTINGS,
    AutoencoderStage,
    DiffusionStage,
    LoraConfig,
    ObjectiveConfig,
    OptimConfig,
    StageConfig,
    TrainConfig,
    WordsStage,
)

__all__ = [
    "CROPS",
    "DATA_KINDS",
    "DECAYS",
    "DRAWN",
    "FORMATS",
    "IN_WORDS",
    "MAX_INDEX",
    "OF_THE_WAY",
    "OPTIMIZERS",
    "REMATS",
    "SIGHTS",
    "TIME_SAMPLINGS",
    "WEIGHTINGS",
    "WHAT",
    "AutoencoderStage",
    "ControlConfig",
    "DataConfig",
    "DiffusionStage",
    "FinetuneConfig",
    "FinetuneStage",
    "GenerateConfig",
    "InversionConfig",
    "JobConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PriorConfig",
    "SamplesConfig",
    "StageConfig",
    "TrainConfig",
    "WordsStage",
    "from_json",
    "nearest",
    "to_json",
]
