"""The text encoder against transformers': random weights, one config a row."""

import json

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig as OriginalConfig
from transformers import CLIPTextModel as Original

from engine.models.clip import CLIPTextConfig, CLIPTextModel
from tests.parity.common import Twin, assert_same

BASE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 11,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 49,
}
BOS, EOS = 48, 49

CONFIGS = {
    # 2 is what configs said before transformers 4.31; the end of the text is then the largest id
    "stable diffusion 1": {
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "stable diffusion 2": {"hidden_act": "gelu", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "padded with its end": {"hidden_act": "quick_gelu"},
    "padded with 0, wide epsilon": {"pad_token_id": 0, "layer_norm_eps": 0.1, "num_attention_heads": 1},
    "end in the middle of the words": {"eos_token_id": 7, "pad_token_id": 0, "hidden_act": "gelu"},
    "projection, which the U-Net does not see": {"projection_dim": 6, "num_hidden_layers": 1},
}


def ids(pad: int, length: int) -> np.ndarray:
    """Texts of several lengths: start, words, end, padding. The last one is full and has no end."""
    texts = np.random.default_rng(0).integers(3, 40, (4, length))
    texts[:, 0] = BOS
    for text, end in zip(texts, (1, length // 2, length - 1), strict=False):
        text[end], text[end + 1 :] = EOS, pad
    return texts.astype(np.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_whole(name):
    """Every layer's output, the last one's after the norm, and the vector at the end of the text."""
    theirs = OriginalConfig(**BASE | CONFIGS[name])
    config = CLIPTextConfig.from_json(json.loads(theirs.to_json_string()), "text_encoder/config.json")
    twin = Twin(lambda rngs: CLIPTextModel(config, rngs), Original(theirs), "text_encoder")
    for length in (11, 8):  # all positions, and fewer
        texts = ids(theirs.pad_token_id, length)
        expected = twin.theirs(texts, output_hidden_states=True)
        found = twin(texts)
        assert_same(found.last_hidden_state, expected.last_hidden_state)
        assert_same(found.pooled, expected.pooler_output)
        assert len(found.hidden_states) == len(expected.hidden_states) == config.num_hidden_layers + 1
        for ours, their in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert_same(ours, their)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip(clip_skip):
    """The context as the pipelines of diffusers make it: an earlier layer, then the final norm."""
    theirs = OriginalConfig(**BASE)
    config = CLIPTextConfig(**BASE)
    twin = Twin(lambda rngs: CLIPTextModel(config, rngs), Original(theirs), "text_encoder")
    texts = ids(EOS, 11)
    states = twin.theirs(texts, output_hidden_states=True).hidden_states
    # transformers before 5 keeps the transformer in an attribute of its own
    norm = getattr(twin.original, "text_model", twin.original).final_layer_norm
    with torch.no_grad():
        expected = norm(states[-(clip_skip + 1)])
    assert_same(twin(texts, method="context", clip_skip=clip_skip), expected)
