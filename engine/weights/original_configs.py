"""What a single file is, and the configs of the model in it, told from its keys and shapes.

Shapes tell channels, blocks, layers, and the width of the words. What they do not tell follows from what
Stable Diffusion 1, 2 and XL are (`ARCHITECTURES`): how many heads share the channels, the groups of norms,
the activation of the text encoder, the noise schedule and what is predicted.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.models.autoencoder import AutoencoderConfig
from engine.models.clip import CLIPTextConfig
from engine.models.unet_config import UNetConfig
from engine.types import UserError
from engine.weights.component import listed
from engine.weights.index import SCORED, SIZED
from engine.weights.original_names import (
    AS_IN_TRANSFORMERS,
    CLIP,
    CLIP_ACT,
    OPEN_CLIP,
    PROJECTION,
    REFINER_OPEN_CLIP,
    UNET,
    VAE,
    XL_CLIP,
    XL_OPEN_CLIP,
)
from engine.weights.random_folder import ARCHITECTURES, Architecture
from engine.weights.safetensors_io import Tensor

HEAD = 64  # channels of a head of the text encoders, and of the U-Nets of 2 and XL
OPEN_CLIP_LAYERS = 24  # of the text encoder of 2, whose last is not used
Header = Mapping[str, Tensor]
Options = dict[str, Any]


class Family(NamedTuple):
    """One of the Stable Diffusions."""

    name: str
    texts: Mapping[str, str]  # text encoder -> how its keys begin
    architecture: Architecture
    zeros: bool = False  # see engine.weights.index

    @property
    def prefixes(self) -> dict[str, str]:
        """How the keys of each network begin."""
        return {"unet": UNET, "vae": VAE, **self.texts}


FIRST = Family("Stable Diffusion 1", {"text_encoder": CLIP}, ARCHITECTURES["sd15"])
SECOND = Family("Stable Diffusion 2", {"text_encoder": OPEN_CLIP}, ARCHITECTURES["sd21"])
XL = Family(
    "Stable Diffusion XL",
    {"text_encoder": XL_CLIP, "text_encoder_2": XL_OPEN_CLIP},
    ARCHITECTURES["sdxl"],
    zeros=True,
)
REFINER = Family(
    "Stable Diffusion XL refiner", {"text_encoder_2": REFINER_OPEN_CLIP}, ARCHITECTURES["sdxl-refiner"]
)
FAMILIES = (FIRST, SECOND, XL, REFINER)

# What people give in place of a model: how its keys look -> what it is, and what to do with it.
STRANGERS = {
    r"lora_|.*[._]lora[._]|.*\.(hada_|lokr_|oft_)": "it is a LoRA: give it to --lora",
    r"emb_params$|string_to_param": "it is a word of textual inversion: give it to --embedding",
    r"control_model\.|controlnet_|input_hint_block\.": "it is a ControlNet: give it to --controlnet",
    r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|single_blocks|double_layers)\.": (
        "it is of Stable Diffusion 3, Flux or another newer family, which are not read"
    ),
    r"(down_blocks|up_blocks|mid_block|(encoder|decoder)\.(down|up)_blocks|text_model|vision_model)\.": (
        "it is one part of a diffusers folder: give the folder, the one with model_index.json"
    ),
}
_TEXTS = tuple(dict.fromkeys(prefix for family in FAMILIES for prefix in family.texts.values()))
NEEDED = {"U-Net": (UNET,), "autoencoder": (VAE,), "text encoder": _TEXTS}
BARE_VAE = re.compile(r"(encoder|decoder)\.(down|up|mid)\.")  # as autoencoders are published alone


def family_of(header: Header, path: Path) -> Family:
    """Which Stable Diffusion a file holds; UserError, with what it is instead, where it is none."""
    found = {prefix for prefix in (UNET, VAE, *_TEXTS) if any(k.startswith(prefix) for k in header)}
    lacking = [name for name, prefixes in NEEDED.items() if found.isdisjoint(prefixes)]
    if not lacking:
        texts = found - {UNET, VAE}
        if family := next((each for each in FAMILIES if set(each.texts.values()) == texts), None):
            return family
        told = [" and ".join(f"{text}*" for text in each.texts.values()) for each in FAMILIES]
        ours = " and ".join(f"{text}*" for text in _TEXTS if text in texts)
        raise UserError(
            f"{path} has the text encoders {ours}: leave those of one model, {'; or '.join(told)}"
        )
    for pattern, what in STRANGERS.items():
        if any(re.match(pattern, key) for key in header):
            raise UserError(f"{path} is no single file of Stable Diffusion 1, 2 or XL: {what}")
    if found == {VAE} or any(map(BARE_VAE.match, header)):
        raise UserError(f"{path} is an autoencoder alone: give a file with U-Net and text encoder, too")
    if not found:
        told = listed(list(header), 3) if header else "nothing"
        raise UserError(
            f"{path} is no single file of Stable Diffusion 1, 2 or XL, with {UNET}*: it holds {told}"
        )
    told = ", no ".join(f"{name} ({'* or '.join(NEEDED[name])}*)" for name in lacking)
    raise UserError(f"{path} is no whole model: it has no {told}")


def family_with(configs: Mapping[str, Any]) -> Family:
    """Which Stable Diffusion a folder with these configs becomes."""
    if "text_encoder_2" in configs:
        return XL if "text_encoder" in configs else REFINER
    return FIRST if configs["text_encoder"].hidden_act == CLIP_ACT else SECOND


def told_by_shapes(header: Header, family: Family, path: Path) -> dict[str, Options]:
    """The options of "unet", "vae", "text_encoder" and so on as shapes tell them; the rest by convention.

    Raises:
      UserError: a key that they are told from is missing, or its shape has another number of axes.
    """
    shapes = {kind: _Shapes(header, prefix, path) for kind, prefix in family.prefixes.items()}
    told = {"unet": _unet(shapes["unet"]), "vae": _vae(shapes["vae"])}
    for kind, prefix in family.texts.items():
        projected = kind == "text_encoder_2"
        read = _clip if prefix in AS_IN_TRANSFORMERS else _projected if projected else _open_clip
        told[kind] = read(shapes[kind])
        if projected:
            count = SIZED if "text_encoder" in family.texts else SCORED
            told["unet"] |= _beside(shapes["unet"], told[kind]["projection_dim"], count)
    return {kind: _options(getattr(family.architecture, kind)) | told[kind] for kind in told}


def _options(config: Any) -> Options:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def built(kind: str, options: Options, path: Path) -> UNetConfig | AutoencoderConfig | CLIPTextConfig:
    """The config of these options; UserError, with the file, where there can be no such model."""
    try:
        return {"unet": UNetConfig, "vae": AutoencoderConfig}.get(kind, CLIPTextConfig)(**options)
    except UserError as error:
        raise UserError(f"{path}: its {kind} cannot be built by convention: {error}") from None


class _Shapes:
    """The shapes of what is under one prefix."""

    def __init__(self, header: Header, prefix: str, path: Path):
        self.path, self.prefix = path, prefix
        self.shapes = {
            key.removeprefix(prefix): tensor.shape for key, tensor in header.items() if key.startswith(prefix)
        }
        if (turned := self.shapes.get(f"{PROJECTION}.weight")) is not None:  # another name, and order, of it
            self.shapes[PROJECTION] = turned[::-1]

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
        "transformer_layers_per_block": _depths(transformers, depth),
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


def _depths(transformers: Iterable[tuple[int, int, bool] | None], middle: int) -> Any:
    """Layers of attention at each size. The last is as deep as the middle; where there is none, it is one."""
    depths = [found[0] if found else None for found in transformers]
    known = {depth for depth in (*depths, middle) if depth}
    other = middle if len(known) == 1 else 1
    return _one([*(depth or other for depth in depths[:-1]), depths[-1] or middle])


def _beside(shapes: _Shapes, pooled: int, count: int) -> Options:
    """Of SDXL: the room for what the U-Net sees beside the words, and in it that of each number."""
    room = shapes("label_emb.0.0.weight", 2)[1]
    each, rest = divmod(room - pooled, count)
    told = {"projection_class_embeddings_input_dim": room}
    return told | ({"addition_time_embed_dim": each} if each > 0 and not rest else {})


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
    whole = PROJECTION in shapes and layers != OPEN_CLIP_LAYERS - 1  # some lost the last layer alone
    whole = whole or layers == OPEN_CLIP_LAYERS
    return _of_open_clip(shapes, layers - whole)


def _projected(shapes: _Shapes) -> Options:
    """The second of SDXL, all of it."""
    layers = shapes.count("transformer.resblocks")
    return _of_open_clip(shapes, layers) | {"projection_dim": shapes(PROJECTION, 2)[1]}


def _of_open_clip(shapes: _Shapes, layers: int) -> Options:
    return _text(
        shapes("token_embedding.weight", 2),
        shapes("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        layers,
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
