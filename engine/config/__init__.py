"""Typed dataclasses for every job, and the strict reader for the JSON configs of model folders."""

from engine.config.drawing import FORMATS, GenerateConfig, JobConfig
from engine.config.reader import IN_WORDS, from_json, nearest, to_json
from engine.config.training import (
    AutoencoderStage,
    DiffusionStage,
    OptimConfig,
    StageConfig,
    TrainConfig,
    WordsStage,
)

__all__ = [
    "FORMATS",
    "IN_WORDS",
    "AutoencoderStage",
    "DiffusionStage",
    "GenerateConfig",
    "JobConfig",
    "OptimConfig",
    "StageConfig",
    "TrainConfig",
    "WordsStage",
    "from_json",
    "nearest",
    "to_json",
]
