"""Folders of known architectures with random weights: benchmarks and tests that need no download."""

import dataclasses
import string
import zlib
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from engine.config import nearest
from engine.diffusion.scheduler_config import SchedulerConfig
from engine.models.autoencoder import AutoencoderConfig
from engine.models.autoencoder_tiny import AutoencoderTinyConfig
from engine.models.clip import CLIPTextConfig
from engine.models.unet_config import UNetConfig
from engine.text.tokenizer import BOS, BYTES, END_OF_WORD, EOS, Merges, Tokenizer
from engine.types import UserError
from engine.weights import names
from engine.weights.arrays import cast
from engine.weights.component import abstract, write_config, write_weights
from engine.weights.files import new_folder
from engine.weights.folder import TOKENIZERS, write_rest
from engine.weights.index import FILE, PARTS
from engine.weights.safetensors_io import as_dtype


class Architecture(NamedTuple):
    """The configs of a folder."""

    unet: UNetConfig
    vae: AutoencoderConfig | AutoencoderTinyConfig
    text_encoder: CLIPTextConfig | None
    scheduler: dict[str, Any]  # scheduler_config.json
    text_encoder_2: CLIPTextConfig | None = None  # of SDXL


_VAE = AutoencoderConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=512,
)
_XL_VAE = dataclasses.replace(_VAE, sample_size=1024, scaling_factor=0.13025)
_CLIP = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_SPACING = {"steps_offset": 1, "set_alpha_to_one": False}
# Of SDXL, and of its refiner.
_XL_UNET = {
    "sample_size": 128,
    "use_linear_projection": True,
    "upcast_attention": None,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
_XL_TEXT = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
_XL_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **_BETAS,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}

ARCHITECTURES = {
    "sd15": Architecture(
        UNetConfig(sample_size=64, cross_attention_dim=768),
        _VAE,
        _CLIP,
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **_BETAS, **_SPACING},
    ),
    "sd21": Architecture(
        UNetConfig(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
            upcast_attention=True,
        ),
        _VAE,
        CLIPTextConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
        ),
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", **_BETAS, **_SPACING},
    ),
    "sdxl": Architecture(
        UNetConfig(
            **_XL_UNET,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            projection_class_embeddings_input_dim=2816,
        ),
        _XL_VAE,
        _CLIP,
        _XL_EULER,
        _XL_TEXT,
    ),
    "sdxl-refiner": Architecture(
        UNetConfig(
            **_XL_UNET,
            block_out_channels=(384, 768, 1536, 1536),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(6, 12, 24, 24),
            transformer_layers_per_block=4,
            cross_attention_dim=1280,
            projection_class_embeddings_input_dim=2560,
        ),
        _XL_VAE,
        None,
        _XL_EULER,
        _XL_TEXT,
    ),
    "tiny": Architecture(  # 17 million parameters in the U-Net, for CPUs
        UNetConfig(
            sample_size=32,
            block_out_channels=(96, 160, 192),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            attention_head_dim=4,
            cross_attention_dim=256,
        ),
        dataclasses.replace(
            _VAE,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 64, 128),
            layers_per_block=1,
            sample_size=128,
        ),
        CLIPTextConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            projection_dim=256,
            vocab_size=4096,
        ),
        {"_class_name": "DDIMScheduler", **_BETAS, **_SPACING},
    ),
}


def random_folder(
    path: str | Path,
    architecture: str | Architecture,
    dtype: DTypeLike = np.float16,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Writes a folder that loads like a real one and draws noise. Memory: one tensor at a time.

    Kernels are normal with variance 1 / fan-in, embeddings with 0.02^2; biases 0, norms 1.

    Args:
      architecture: a name in ARCHITECTURES, or configs of your own.
      dtype: of the weights on disk: float32, float16 or bfloat16.
      seed: the same seed writes the same bytes.

    Raises:
      UserError: an unknown name or dtype, a negative seed, or the folder exists.
    """
    if isinstance(architecture, str):
        if architecture not in ARCHITECTURES:
            raise UserError(
                f"unknown architecture {architecture!r}{nearest(architecture, ARCHITECTURES)}; "
                f"known: {', '.join(ARCHITECTURES)}"
            )
        architecture = ARCHITECTURES[architecture]
    if seed < 0:
        raise UserError(f"seed={seed}: write a number from 0")
    dtype = as_dtype(dtype)
    scheduler = SchedulerConfig.from_json(architecture.scheduler, "scheduler")
    with new_folder(Path(path), FILE, overwrite) as new:
        configs = {kind: getattr(architecture, kind) for kind in PARTS if getattr(architecture, kind)}
        for kind, config in configs.items():
            (new / kind).mkdir()
            _write_component(new / kind, kind, config, dtype, seed)
        tokenizers = {kind: _tokenizer(config) for kind, config in configs.items() if kind in TOKENIZERS}
        write_rest(new, tokenizers, scheduler, configs, "text_encoder" in configs and len(tokenizers) > 1)


def _write_component(folder: Path, kind: str, config: Any, dtype: np.dtype, seed: int) -> None:
    _, shapes = abstract(kind, config)
    paths = names.keys(shapes)

    def tensor(key: str) -> np.ndarray:
        path = paths[key]
        rng = np.random.default_rng([seed, zlib.crc32(f"{kind}.{key}".encode())])
        values = _values(path[-1], names.torch_shape(path, shapes[path].shape), rng)
        return cast(values, dtype, f"{kind}: {key}")

    write_config(folder, kind, config)
    write_weights(folder, kind, shapes, dict.fromkeys(paths, dtype), tensor)


def _values(leaf: str | int, shape: names.Shape, rng: np.random.Generator) -> np.ndarray:
    if leaf in ("bias", "scale"):
        return np.full(shape, leaf == "scale", np.float32)
    values = rng.standard_normal(shape, np.float32)
    values *= np.float32(0.02 if leaf == "embedding" else np.prod(shape[1:]) ** -0.5)
    return values


def _tokenizer(config: CLIPTextConfig) -> Tokenizer:
    """A tokenizer of `vocab_size` ids, whose words are letters in every order: aa, ab, ..., aaa, ..."""
    symbols = [*BYTES, *(byte + END_OF_WORD for byte in BYTES)]
    merges: Merges = []
    room = config.vocab_size - len(symbols) - 2
    if room < 0:
        raise UserError(f"vocab_size={config.vocab_size} is too small: write at least {len(symbols) + 2}")
    heads = deque(string.ascii_lowercase)
    while len(merges) < room:
        head = heads.popleft()
        for letter in string.ascii_lowercase:
            merges += [(head, letter), (head, letter + END_OF_WORD)]
            heads.append(head + letter)
    merges = merges[:room]
    symbols += [left + right for left, right in merges]
    vocab = {symbol: i for i, symbol in enumerate([*symbols, BOS, EOS])}
    return Tokenizer(vocab, merges, config.max_position_embeddings)
