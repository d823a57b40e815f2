"""Keys of a model in one file, in the layout in which Stable Diffusion was first published.

    model.diffusion_model.input_blocks.1.1.proj_in.weight   unet: down_blocks.0.attentions.0.proj_in.weight
    first_stage_model.encoder.down.0.block.0.norm1.weight   vae: encoder.down_blocks.0.resnets.0.norm1.weight
    cond_stage_model.transformer.text_model.*               text_encoder: text_model.* (1, CLIP)
    cond_stage_model.model.ln_final.*                       text_encoder: text_model.final_layer_norm.* (2)
    conditioner.embedders.0.transformer.*                   text_encoder of XL, as that of 1
    conditioner.embedders.1.model.*                         text_encoder_2 of XL, as that of 2
    conditioner.embedders.0.model.*                         text_encoder_2 of its refiner
    control_model.*, or without that in front               a ControlNet, its blocks as those of the U-Net

The original U-Net counts its blocks through (github.com/CompVis/latent-diffusion, openaimodel.py): each
residual block with its attention, and each change of size on the way down, has a number. Which number that is
follows from how many blocks and layers a model has, and is derived from its config here.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from engine.models.autoencoder import AutoencoderConfig
from engine.models.clip import CLIPTextConfig
from engine.models.controlnet import ControlNetConfig
from engine.models.unet_config import EncoderConfig, UNetConfig
from engine.types import UserError
from engine.weights import names

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER_OPEN_CLIP = "conditioner.embedders.0.model."
CONTROLNET = "control_model."
AS_IN_TRANSFORMERS = (CLIP, XL_CLIP)  # the text encoders whose keys are ours
CLIP_ACT = "quick_gelu"  # OpenAI's CLIP, and none else

# block's name -> its name in the original; within a block, the first part of what follows
Blocks = dict[str, str]
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_PARTS = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
OPEN_CLIP_PARTS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}
FUSED = ("q_proj", "k_proj", "v_proj")  # above one another in in_proj_weight and in_proj_bias
THIRDS = len(FUSED)
PROJECTION = "text_projection"  # of the second text encoder


class Slot(NamedTuple):
    """Where a tensor of ours is in the file: the whole of `key`, or a third of its rows."""

    key: str
    third: int | None = None
    tail: names.Shape = ()  # its shape ends in these ones there: what was a 1x1 convolution
    transposed: bool = False

    def shape(self, shape: names.Shape) -> names.Shape:
        """The shape of `key` in the file, where `shape` is that of our tensor."""
        shape = shape[::-1] if self.transposed else shape
        rows, *rest = shape
        return (rows * (1 if self.third is None else THIRDS), *rest, *self.tail)


def slots(kind: str, config: Any, keys: Iterable[str], prefix: str) -> dict[str, Slot]:
    """Each key of a model in the diffusers layout -> where the original layout has it.

    Args:
      kind: "unet", "vae", "text_encoder", "text_encoder_2" or "controlnet".
      config: the model's.
      keys: all of the model's.
      prefix: how they begin in the file: UNET, VAE, or one of the text encoders; CONTROLNET, or nothing.

    Raises:
      UserError: a U-Net that the original layout does not know.
    """
    if kind in ("unet", "controlnet"):
        blocks = _unet_blocks(config) if kind == "unet" else _controlnet_blocks(config)
        return {key: Slot(prefix + _renamed(key, blocks, UNET_RESNET)) for key in keys}
    if kind == "vae":
        blocks = _vae_blocks(config)
        return {key: Slot(prefix + _renamed(key, blocks, VAE_PARTS), tail=_vae_tail(key)) for key in keys}
    if prefix in AS_IN_TRANSFORMERS:
        return {key: Slot(prefix + key) for key in keys}
    blocks = _open_clip_blocks(config)
    return {key: _open_clip_slot(key, blocks, prefix) for key in keys}


def _renamed(key: str, blocks: Blocks, parts: dict[str, str]) -> str:
    """`key`, with the names of its block and of the part of the block replaced."""
    words = key.split(".")
    for end in range(len(words), 0, -1):
        block = blocks.get(".".join(words[:end]))
        if block is not None:
            part = [parts.get(word, word) for word in words[end : end + 1]]
            return ".".join([block, *part, *words[end + 1 :]])
    raise ValueError(f"no block of the original layout has {key}")  # a mistake of ours: configs were checked


def _unet_blocks(config: UNetConfig) -> Blocks:
    blocks = _way_down(config) | {"conv_norm_out": "out.0", "conv_out": "out.2"}
    layers, last, n = config.per_block("layers_per_block"), len(config.block_out_channels) - 1, 0
    for i, kind in enumerate(config.up_block_types):
        for j in range(layers[last - i] + 1):
            blocks |= _layer(f"up_blocks.{i}", j, f"output_blocks.{n}")
            n += 1
        after = 2 if kind.startswith("CrossAttn") else 1  # the residual block, and the attention if there is
        blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{after}.conv"
    return blocks


def _controlnet_blocks(config: ControlNetConfig) -> Blocks:
    blocks = _way_down(config) | {"controlnet_mid_block": "middle_block_out.0"}
    hints, hint = 2 * (len(config.conditioning_embedding_out_channels) - 1), "controlnet_cond_embedding"
    blocks |= {f"{hint}.conv_in": "input_hint_block.0"}
    blocks |= {f"{hint}.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(hints)}
    blocks |= {f"{hint}.conv_out": f"input_hint_block.{2 * hints + 2}"}
    count = len(config.skip_channels)
    return blocks | {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(count)}


def _way_down(config: EncoderConfig) -> Blocks:
    """And the middle."""
    if config.mid_block_type != "UNetMidBlock2DCrossAttn":
        raise UserError(
            f"mid_block_type={config.mid_block_type!r}: a single file in the original layout always has "
            "attention in the middle; this U-Net stays a folder"
        )
    if getattr(config, "time_cond_proj_dim", None) is not None:
        raise UserError(
            f"time_cond_proj_dim={config.time_cond_proj_dim}: a single file in the original layout has no "
            "place for the guidance scale that this U-Net is told; it stays a folder"
        )
    blocks = {"conv_in": "input_blocks.0.0"}
    embeddings = {"time_embedding": "time_embed", "add_embedding": "label_emb.0"}  # the second of SDXL
    blocks |= {f"{name}.linear_{n}": f"{old}.{2 * n - 2}" for name, old in embeddings.items() for n in (1, 2)}
    middle = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    blocks |= {block: f"middle_block.{n}" for n, block in enumerate(middle)}
    layers, last = config.per_block("layers_per_block"), len(config.block_out_channels) - 1
    n = 1  # conv_in is the first of the input blocks
    for i in range(last + 1):
        for j in range(layers[i]):
            blocks |= _layer(f"down_blocks.{i}", j, f"input_blocks.{n}")
            n += 1
        if i < last:
            blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    return blocks


def _layer(block: str, j: int, original: str) -> Blocks:
    return {f"{block}.resnets.{j}": f"{original}.0", f"{block}.attentions.{j}": f"{original}.1"}


def _vae_blocks(config: AutoencoderConfig) -> Blocks:
    blocks = {conv: conv for conv in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        blocks |= {f"{side}.{conv}": f"{side}.{conv}" for conv in ("conv_in", "conv_out")}
        blocks |= {f"{side}.conv_norm_out": f"{side}.norm_out"}
        blocks |= {f"{side}.mid_block.resnets.{j}": f"{side}.mid.block_{j + 1}" for j in range(2)}
        attention = f"{side}.mid_block.attentions.0"
        blocks |= {attention: f"{side}.mid.attn_1", f"{attention}.to_out.0": f"{side}.mid.attn_1.proj_out"}
    last = len(config.block_out_channels) - 1
    for i in range(last + 1):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{i}"
        original = f"decoder.up.{last - i}"  # counted from the picture, in the decoder too
        for j in range(config.layers_per_block + 1):
            blocks[f"{down}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            blocks[f"{up}.resnets.{j}"] = f"{original}.block.{j}"
        blocks[f"{down}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        blocks[f"{up}.upsamplers.0.conv"] = f"{original}.upsample.conv"
    return blocks


def _vae_tail(key: str) -> names.Shape:
    return (1, 1) if names.was_convolution("vae", key) else ()


def _open_clip_blocks(config: CLIPTextConfig) -> Blocks:
    blocks = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
    }
    for i in range(config.num_hidden_layers):
        layer, original = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        blocks |= {layer: original, f"{layer}.self_attn": f"{original}.attn"}
        blocks |= {f"{layer}.mlp.fc1": f"{original}.mlp.c_fc", f"{layer}.mlp.fc2": f"{original}.mlp.c_proj"}
    return blocks


def _open_clip_slot(key: str, blocks: Blocks, prefix: str) -> Slot:
    if key == f"{PROJECTION}.weight":
        return Slot(prefix + PROJECTION, transposed=True)
    original = prefix + _renamed(key, blocks, OPEN_CLIP_PARTS)
    for third, part in enumerate(FUSED):
        attention, found, leaf = original.partition(f".{part}.")
        if found:
            return Slot(f"{attention}.in_proj_{leaf}", third)
    return Slot(original)
