"""A small Stable Diffusion written by PyTorch diffusers, and small models of the engine."""

import json

import pytest

from engine.weights.folder import load_folder
from tests.tiny import tiny_folder

BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
UNET = BLOCKS | {
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "sample_size": 8,
}
VAE = BLOCKS | {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "scaling_factor": 0.3,
}
TEXT = {
    "vocab_size": 514,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 24,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}


def write_tokenizer(folder):
    """CLIP's vocabulary before its first merge: every byte, every byte at a word's end, the two marks."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.fixture(scope="session")
def torch_pipeline(tmp_path_factory):
    """A StableDiffusionPipeline with random weights, in none of which a zero hides a mistake."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = tmp_path_factory.mktemp("vocabulary") / "tokenizer"
    write_tokenizer(tokenizer)
    pipeline = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**UNET),
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter)
    return pipeline


@pytest.fixture(scope="session")
def torch_folder(torch_pipeline, tmp_path_factory):
    """The same on disk. Read it, do not write into it."""
    folder = tmp_path_factory.mktemp("torch") / "model"
    torch_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of the engine. Read it, do not write into it."""
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return load_folder(folder)
