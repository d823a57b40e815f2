"""What pictures are measured with, in small and with random weights: a CLIP's folder, and FID's network."""

import os
import pathlib

import safetensors.torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tests.evaluate.test_clip_score import LENGTH, SEED, TEXT, VISION
from tests.parity.common import random_weights
from tests.parity.inception import original
from tests.parity.test_clip_pixels import Original as ImageProcessor
from tests.weights.conftest import write_tokenizer


def tiny_clip(folder: pathlib.Path) -> pathlib.Path:
    """A CLIP that reads LENGTH tokens, of which every letter is one; returns its folder."""
    write_tokenizer(folder / "vocabulary")
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=6)
    parts = (
        random_weights(CLIPModel(config), SEED),
        ImageProcessor(size={"shortest_edge": 20}, crop_size=20),
        CLIPTokenizer.from_pretrained(folder / "vocabulary", model_max_length=LENGTH),
    )
    for part in parts:
        part.save_pretrained(folder / "saved")
    return folder / "saved"


def random_inception(file: str | os.PathLike) -> str | os.PathLike:
    """Writes 96 MB, and returns the path."""
    safetensors.torch.save_file(original().state_dict(), file)
    return file
