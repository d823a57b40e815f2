"""torch-fidelity's network with random weights, without its download."""

import pathlib
import tempfile

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tests.parity.common import random_weights


class _Unfilled(FeatureExtractorInceptionV3):
    def load_state_dict(self, state_dict, *args, **kwargs):
        """Not from the empty file: `original` fills it."""


def original() -> FeatureExtractorInceptionV3:
    """Calls take uint8 (B, 3, H, W) and give ((B, 2048),). Its features tell pictures apart."""
    with tempfile.TemporaryDirectory() as folder:
        empty = pathlib.Path(folder) / "empty.pth"
        torch.save({}, empty)
        module = random_weights(_Unfilled("inception", ["2048"], str(empty)))
    generator = torch.Generator().manual_seed(1)
    for name, buffer in module.named_buffers():
        noise = torch.rand(buffer.shape, generator=generator)
        if name.endswith("running_mean"):
            buffer.copy_(noise - 0.5)
        elif name.endswith("running_var"):  # about what a ReLU leaves: the scale stays
            buffer.copy_(0.2 + 0.4 * noise)
    return module
