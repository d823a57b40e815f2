"""A tiny Stable Diffusion with random weights: 16 px pictures, 8 x 8 x 4 latents, all that a real one has.

Every weight is random, the biases, the scales of norms and the last convolution of the U-Net included, so
that no zero hides a mistake. It draws noise, but not the same noise for other words.
"""

import contextlib
import dataclasses
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from engine.diffusion.scheduler_config import SchedulerConfig
from engine.models.controlnet import ControlNetConfig
from engine.models.controlnet_union import ControlNetUnionConfig
from engine.text.tokenizer import Tokenizer, train_tokenizer
from engine.weights.component import Component, abstract, save_component
from engine.weights.folder import TOKENIZERS, Model, save_folder
from engine.weights.index import PARTS
from engine.weights.kinds import KNOWN

CAPTIONS = ["a red fox at night", "a blue car on grass", "a cat above a dog at sunset", "two green trees"]
MAX_TOKENS = 16
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
VAE = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}
TEXT_ENCODER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 24,
}
TINY_VAE = {  # in place of VAE: the same sizes
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}
# The least of everything, where what surrounds the model is tested: a fourth of the time to compile a step.
SHALLOW = {
    "unet": {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    },
    "vae": {"mid_block_add_attention": False},
    "text_encoder": {"num_hidden_layers": 1},
}
# Of a tiny SDXL, and of its refiner; the U-Net beside UNET.
TEXT_ENCODER_2 = TEXT_ENCODER | {"hidden_size": 20, "projection_dim": 12, "hidden_act": "gelu"}
_ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
XL = {
    "unet": {**_ADDED, "cross_attention_dim": 44, "projection_class_embeddings_input_dim": 12 + 6 * 8},
    "text_encoder_2": {},
}
REFINER = {
    "unet": {**_ADDED, "cross_attention_dim": 20, "projection_class_embeddings_input_dim": 12 + 5 * 8},
    "text_encoder_2": {},
    "text_encoder": None,
}
# As SDXL's U-Net: the level without attention comes first.
THREE_LEVELS = {
    **XL,
    "unet": XL["unet"]
    | {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def shallow(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The least of everything, of the family of models that these overrides of `tiny_model` make."""
    return SHALLOW | overrides | {"unet": SHALLOW["unet"] | overrides.get("unet", {})}


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
    """Within, JAX compiles quickly rather than well: the time of tests on tiny models is the compiler's."""
    option = "jax_disable_most_optimizations"
    before = jax.config.read(option)
    jax.config.update(option, True)
    try:
        yield
    finally:
        jax.config.update(option, before)


def tiny_tokenizer() -> Tokenizer:
    """A real tokenizer, trained on a few captions."""
    return train_tokenizer(CAPTIONS, 560, MAX_TOKENS, CAPTIONS)


def tiny_model(seed: int = 0, **overrides: Mapping[str, Any]) -> Model:
    """The model, its params on the default device.

    Args:
      overrides: `unet`, `vae`, `text_encoder`, `text_encoder_2`: options of their configs beside or in place
        of the ones above, or with a `_class_name` all of them; `scheduler`: a whole scheduler config, in
        place of the one above. There is a `text_encoder_2` where it is named, no `text_encoder` where it is
        None: see XL and REFINER.
    """
    tokenizer = tiny_tokenizer()
    marks = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    known = {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER | marks}
    known["text_encoder_2"] = TEXT_ENCODER_2 | marks
    scheduler = SchedulerConfig.from_json(overrides.pop("scheduler", SCHEDULER), "tiny scheduler")
    if unknown := overrides.keys() - known.keys():
        raise TypeError(f"tiny_model has no {sorted(unknown)}")
    overrides = {"unet": {}, "vae": {}, "text_encoder": {}, **overrides}
    options = {
        kind: own if "_class_name" in own else {**known[kind], **own}
        for kind, own in overrides.items()
        if own is not None
    }
    parts = dict.fromkeys(PARTS) | {kind: component(kind, options[kind], seed) for kind in options}
    readers = {name: tokenizer if parts[kind] else None for kind, name in TOKENIZERS.items()}
    return Model(**parts, **readers, scheduler=scheduler, zeros=None not in parts.values())


def tiny_folder(path: str | os.PathLike, seed: int = 0, **overrides: Mapping[str, Any]) -> pathlib.Path:
    """Writes `tiny_model(seed, **overrides)` as a diffusers folder, float32, and returns its path."""
    save_folder(pathlib.Path(path), tiny_model(seed, **overrides))
    return pathlib.Path(path)


def tiny_controlnet(path: str | os.PathLike, seed: int = 0, **unet: Any) -> pathlib.Path:
    """Writes a ControlNet for the model whose U-Net has these overrides; returns the path of its folder."""
    known = {field.name for field in dataclasses.fields(ControlNetConfig)}
    options = {name: value for name, value in {**UNET, **unet}.items() if name in known}
    options["mid_block_type"] = options.get("mid_block_type", "UNetMidBlock2DCrossAttn") or "UNetMidBlock2D"
    options |= {"in_channels": 4, "conditioning_embedding_out_channels": (4, 8)}
    save_component(pathlib.Path(path), component("controlnet", options, seed))
    return pathlib.Path(path)


def tiny_union(path: str | os.PathLike, seed: int = 0, kinds: int = 4, **unet: Any) -> pathlib.Path:
    """Writes a ControlNet union for the model whose U-Net has these overrides; returns its path."""
    known = {field.name for field in dataclasses.fields(ControlNetUnionConfig)}
    options = {name: value for name, value in {**UNET, **unet}.items() if name in known}
    channels = options["block_out_channels"][0]
    options |= {"_class_name": "ControlNetUnionModel", "in_channels": 4, "num_control_type": kinds}
    options |= {"num_trans_channel": channels, "num_proj_channel": channels, "num_trans_head": 2}
    options |= {"conditioning_embedding_out_channels": (4, 8), "mid_block_type": "UNetMidBlock2DCrossAttn"}
    save_component(pathlib.Path(path), component("controlnet", options, seed))
    return pathlib.Path(path)


def tiny_t2i_adapter(path: str | os.PathLike, seed: int = 0, **options: Any) -> pathlib.Path:
    """Writes a T2I-Adapter for the U-Net of UNET, unless told; returns the path of its folder."""
    options = {"channels": (16, 32), "num_res_blocks": 1, "downscale_factor": 2} | options
    part = component("controlnet", {"_class_name": "T2IAdapter"} | options, seed)
    save_component(pathlib.Path(path), part)
    return pathlib.Path(path)


def component(kind: str, options: Mapping[str, Any], seed: int) -> Component:
    """A part of a model with random weights."""
    spec = KNOWN[kind].named(options.get("_class_name", KNOWN[kind].class_name))
    config = spec.config.from_json(options, f"tiny {kind}")
    graphdef, shapes = abstract(kind, config)
    flat = {path: jnp.asarray(random(kind, path, leaf.shape, seed)) for path, leaf in shapes.items()}
    return Component(kind, config, graphdef, traverse_util.unflatten_dict(flat))


def random(kind: str, path: tuple, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal, such that activations keep their scale; each parameter from its own seed."""
    rng = np.random.default_rng([seed, zlib.crc32(".".join(map(str, (kind, *path))).encode())])
    values = rng.standard_normal(shape, np.float32)
    if path[-1] == "embedding":
        return values
    if len(shape) > 1:
        return values / np.float32(np.prod(shape[:-1]) ** 0.5)
    return np.float32(0.2) * values + (path[-1] == "scale")
