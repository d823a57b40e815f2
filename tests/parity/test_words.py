"""Which word steers what, against the attention of PyTorch diffusers; and in the model of the package."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import engine
from tests.parity.pictures import PROMPTS, SCHEDULERS, How, drawn_there, pipeline, start_noise
from tests.tiny import XL, compiled_quickly, tiny_folder

SIZE = (24, 40)  # pixels; latents of half


class Seeing:
    """An attention processor of diffusers that keeps what pixels heed of words, of one call after another."""

    def __init__(self):
        self.calls: list[list[torch.Tensor]] = [[]]

    def __call__(self, attn: Any, hidden: torch.Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        told = hidden if encoder_hidden_states is None else encoder_hidden_states
        parts = (attn.to_q(hidden), attn.to_k(told), attn.to_v(told))
        q, k, v = (attn.head_to_batch_dim(part) for part in parts)
        weights = attn.get_attention_scores(q, k)
        if encoder_hidden_states is not None:
            self.calls[-1].append(weights.unflatten(0, (len(hidden), attn.heads)).mean(1))
        return attn.to_out[0](attn.batch_to_head_dim(weights @ v))

    def watch(self, unet: torch.nn.Module) -> None:
        unet.set_attn_processor(self)
        unet.register_forward_hook(lambda *_: self.calls.append([]))

    def mean(self, calls: list[int], rows: int) -> np.ndarray:
        """Of some calls and all layers, for the last rows of the batch, which are those with the prompts."""
        height, width = (side // 2 for side in SIZE)
        total = []
        for weights in (each[-rows:] for call in calls for each in self.calls[call]):
            h = round((weights.shape[1] * height / width) ** 0.5)
            maps = weights.unflatten(1, (h, -1)).permute(0, 3, 1, 2)
            total.append(interpolate(maps, (height, width), mode="bilinear"))
        return torch.stack(total).mean(0).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("model", "scheduler", "how", "calls"),
    [
        ({}, "euler", How(size=SIZE, steps=5), [1, 2, 3, 4]),
        ({}, "euler", How(size=SIZE, steps=16), [1, 3, 5, 7, 9, 11, 13, 15]),
        ({}, "heun", How(size=SIZE, steps=4), [2, 4, 6]),  # its every second call begins an interval
        (XL, "euler", How(size=SIZE, steps=3, negatives="a blue car"), [1, 2]),
    ],
    ids=["every step", "some of many", "two calls a step", "SDXL"],
)
def test_as_in_pytorch(tmp_path, model, scheduler, how, calls):
    folder = tiny_folder(tmp_path / "model", **model, scheduler=SCHEDULERS[scheduler])
    with compiled_quickly():
        pipe = engine.load(folder)
        settings = pipe.settings(how.steps, None, how.scale, *SIZE, batch_size=2)
        given = {"seed": 0, "latents": start_noise(how), "heat": True}
        (batch,) = pipe.stream(PROMPTS, how.negatives, settings, **given)
    theirs, seeing = pipeline(folder, model, how), Seeing()
    seeing.watch(theirs.unet)
    with torch.no_grad():
        drawn_there(theirs, None, how)
    expected = seeing.mean(calls, rows=2)
    assert batch.heat.shape == expected.shape
    np.testing.assert_allclose(batch.heat, expected, atol=1e-4 * expected.max())
    np.testing.assert_allclose(batch.heat.sum(-1), 1, rtol=1e-5)


def test_things_are_where_the_model_in_the_package_heeds_their_words():
    """The fox is in the left half of the picture, and there its word is heeded; the car in the right one."""
    pipe, prompt = engine.load(), "a red fox to the left of a blue car on the beach"
    (batch,) = pipe.stream([prompt], None, pipe.settings(20), seed=4, heat=True)
    heats = {word: batch.heat[0][..., at].sum(-1) for word, at in pipe.words(prompt)}
    left = {word: heat[:, :16].sum() / heat.sum() for word, heat in heats.items()}
    assert left["fox"] > 0.65 and left["car"] < 0.35, left
