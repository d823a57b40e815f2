"""What a single file is, and the configs of the model in it, told from its keys and shapes.

Shapes tell channels, blocks, layers, and the width of the words. What they do not tell follows from what
Stable Diffusion 1 and 2 are (`ARCHITECTURES`): how many heads share the channels, the groups of norms, the
activation of the text encoder, the noise schedule and what is predicted.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.models.autoencoder import AutoencoderConfig
from engine.models.clip import CLIPTextConfig
from engine.models.unet import UNetConfig
from engine.types import UserError
from engine.weights.component import listed
from engine.weights.original_names import CLIP, OPEN_CLIP, UNET, VAE
from engine.weights.random_folder import ARCHITECTURES, Architecture
from engine.weights.safetensors_io import Tensor

HEAD = 64  # channels of a head of the text encoders, and of the U-Net of 2
OPEN_CLIP_LAYERS = 24  # of the text encoder of 2, whose last is not used
Header = Mapping[str, Tensor]
Options = dict[str, Any]


class Family(NamedTuple):
    """One of the two Stable Diffusions."""

    name: str
    text: str  # how the keys of its text encoder begin
    architecture: Architecture


FAMILIES = (
    Family("Stable Diffusion 1", CLIP, ARCHITECTURES["sd15"]),
    Family("Stable Diffusion 2", OPEN_CLIP, ARCHITECTURES["sd21"]),
)

# What people give in place of a model: how its keys look -> what it is, and what to do with it.
STRANGERS = {
    r"conditioner\.embedders\.|model\.diffusion_model\.label_emb\.0\.": "SDXL single files are not read yet",
    r"lora_|.*[._]lora[._]|.*\.(hada_|lokr_|oft_)": "it is a LoRA: give it to --lora",
    r"emb_params$|string_to_param": "it is a word of textual inversion: give it to --embedding",
    r"control_model\.|controlnet_|input_hint_block\.": "it is a ControlNet, which is not read yet",
    r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|single_blocks|double_layers)\.": (
        "it is of Stable Diffusion 3, Flux or another newer family, which are not read"
    ),
    r"(down_blocks|up_blocks|mid_block|(encoder|decoder)\.(down|up)_blocks|text_model|vision_model)\.": (
        "it is one part of a diffusers folder: give the folder, the one with model_index.json"
    ),
}
NEEDED = {"U-Net": (UNET,), "autoencoder": (VAE,), "text encoder": (CLIP, OPEN_CLIP)}
BARE_VAE = re.compile(r"(encoder|decoder)\.(down|up|mid)\.")  # as autoencoders are published alone


def family_of(header: Header, path: Path) -> Family:
    """Which Stable Diffusion a file holds; UserError, with what it is instead, where it is none."""
    found = {prefix for prefix in (UNET, VAE, CLIP, OPEN_CLIP) if any(k.startswith(prefix) for k in header)}
    lacking = [name for name, prefixes in NEEDED.items() if found.isdisjoint(prefixes)]
    if not lacking:
        if found >= {CLIP, OPEN_CLIP}:
            raise UserError(f"{path} has two text encoders, {CLIP}* and {OPEN_CLIP}*: leave one")
        return next(family for family in FAMILIES if family.text in found)
    for pattern, what in STRANGERS.items():
        if any(re.match(pattern, key) for key in header):
            raise UserError(f"{path} is no single file of Stable Diffusion 1 or 2: {what}")
    if found == {VAE} or any(map(BARE_VAE.match, header)):
        raise UserError(f"{path} is an autoencoder alone: give a file with U-Net and text encoder, too")
    if not found:
        told = listed(list(header), 3) if header else "nothing"
        raise UserError(f"{path} is no single file of Stable Diffusion 1 or 2, with {UNET}*: it holds {told}")
    told = ", no ".join(f"{name} ({'* or '.join(NEEDED[name])}*)" for name in lacking)
    raise UserError(f"{path} is no whole model: it has no {told}")


def told_by_shapes(header: Header, family: Family, path: Path) -> dict[str, Options]:
    """The options of "unet", "vae" and "text_encoder" as the shapes tell them; the rest by convention.

    Raises:
      UserError: a key that they are told from is missing, or its shape has another number of axes.
    """
    unet = _unet(_Shapes(header, UNET, path))
    vae = _vae(_Shapes(header, VAE, path))
    text = (_clip if family.text == CLIP else _open_clip)(_Shapes(header, family.text, path))
    told = {"unet": unet, "vae": vae, "text_encoder": text}
    return {kind: _options(getattr(family.architecture, kind)) | told[kind] for kind in told}


def _options(config: Any) -> Options:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def built(kind: str, options: Options, path: Path) -> UNetConfig | AutoencoderConfig | CLIPTextConfig:
    """The config of these options; UserError, with the file, where there can be no such model."""
    classes = {"unet": UNetConfig, "vae": AutoencoderConfig, "text_encoder": CLIPTextConfig}
    try:
        return classes[kind](**options)
    except UserError as error:
        raise UserError(f"{path}: its {kind} cannot be built by convention: {error}") from None


class _Shapes:
    """The shapes of what is under one prefix."""

    def __init__(self, header: Header, prefix: str, path: Path):
        self.path, self.prefix = path, prefix
        self.shapes = {
            key.removeprefix(prefix): tensor.shape for key, tensor in header.items() if key.startswith(prefix)
        }

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def __call__(self, key: str, rank: int) -> tuple[int, ...]:
        """The shape of `key`, which must be there, and have `rank` axes."""
        if key not in self.shapes:
            raise UserError(f"{self.path} is not whole: {self.prefix}{key} is missing, which tells its shape")
        if len(self.shapes[key]) != rank:
            raise UserError(
                f"{self.path}: {self.prefix}{key} is {self.shapes[key]}, where {rank} numbers should be"
            )
        return self.shapes[key]

    def count(self, block: str) -> int:
        """How many there are of `block`.0, `block`.1, ..."""
        numbered = re.compile(re.escape(block) + r"\.(\d+)\.", re.ASCII)
        return len({match[1] for match in map(numbered.match, self.shapes) if match})


def _unet(shapes: _Shapes) -> Options:
    levels = _unet_levels(shapes)
    mid = "middle_block.1"
    depth, context, linear = _transformer(shapes, mid)
    attends = [any(at for _, at in level) for level in levels]
    transformers = [next((_transformer(shapes, at) for _, at in level if at), None) for level in levels]
    channels = tuple(level[-1][0] for level in levels)
    heads = tuple(max(1, width // HEAD) for width in channels) if linear else 8
    kinds = ["CrossAttn" * attention for attention in attends]
    return {
        "in_channels": shapes("input_blocks.0.0.weight", 4)[1],
        "out_channels": shapes("out.2.weight", 4)[0],
        "block_out_channels": channels,
        "layers_per_block": _one(len(level) for level in levels),
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in kinds[::-1]),
        "cross_attention_dim": _one(found[1] if found else context for found in transformers),
        "transformer_layers_per_block": _one(found[0] if found else depth for found in transformers),
        "attention_head_dim": _one(heads) if linear else heads,
        "use_linear_projection": linear,
    }


def _unet_levels(shapes: _Shapes) -> list[list[tuple[int, str]]]:
    """For each size on the way down, the channels of each residual block, and its attention's name or ""."""
    levels: list[list[tuple[int, str]]] = [[]]
    for n in range(1, shapes.count("input_blocks")):
        if f"input_blocks.{n}.0.op.weight" in shapes:
            levels.append([])
            continue
        attention = f"input_blocks.{n}.1"
        width = shapes(f"input_blocks.{n}.0.out_layers.3.weight", 4)[0]
        levels[-1].append((width, attention if f"{attention}.proj_in.weight" in shapes else ""))
    if not all(levels):
        raise UserError(
            f"{shapes.path}: {shapes.prefix}input_blocks.* are not those of a U-Net of Stable Diffusion: "
            "two changes of size follow each other"
        )
    return levels


def _transformer(shapes: _Shapes, at: str) -> tuple[int, int, bool]:
    """Of the attention named `at`: its layers, the width of the words, and whether proj_in is a matrix."""
    context = shapes(f"{at}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    linear = len(shapes.shapes.get(f"{at}.proj_in.weight", ())) == 2
    return shapes.count(f"{at}.transformer_blocks"), context, linear


def _one(values: Iterable[Any]) -> Any:
    """One value for all blocks where they are alike, as configs are written; else one for each."""
    values = tuple(values)
    return values[0] if len(set(values)) == 1 else values


def _vae(shapes: _Shapes) -> Options:
    levels = shapes.count("encoder.down")
    if not levels:
        shapes("encoder.down.0.block.0.conv1.weight", 4)  # says that it is missing
    channels = tuple(shapes(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
    return {
        "in_channels": shapes("encoder.conv_in.weight", 4)[1],
        "out_channels": shapes("decoder.conv_out.weight", 4)[0],
        "latent_channels": shapes("decoder.conv_in.weight", 4)[1],
        "block_out_channels": channels,
        "layers_per_block": shapes.count("encoder.down.0.block"),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "decoder.mid.attn_1.q.weight" in shapes,
    }


def _clip(shapes: _Shapes) -> Options:
    # transformers 5 leaves text_model out, in what it builds itself
    at = "text_model." if any(key.startswith("text_model.") for key in shapes.shapes) else ""
    width, wide = (
        shapes(f"{at}{key}.weight", 2) for key in ("embeddings.token_embedding", "encoder.layers.0.mlp.fc1")
    )
    return _text(
        width,
        wide[0],
        shapes.count(f"{at}encoder.layers"),
        shapes(f"{at}embeddings.position_embedding.weight", 2)[0],
    )


def _open_clip(shapes: _Shapes) -> Options:
    """The original draws from the last layer but one; the very last is in whole files all the same.

    What diffusers' converter writes has neither it nor the projection that would follow.
    """
    layers = shapes.count("transformer.resblocks")
    whole = "text_projection" in shapes and layers != OPEN_CLIP_LAYERS - 1  # some lost the last layer alone
    whole = whole or layers == OPEN_CLIP_LAYERS
    return _text(
        shapes("token_embedding.weight", 2),
        shapes("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        layers - whole,
        shapes("positional_embedding", 2)[0],
    )


def _text(words: tuple[int, ...], wide: int, layers: int, length: int) -> Options:
    vocab_size, width = words
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": length,
    }
