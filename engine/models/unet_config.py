"""unet/config.json: the options of a U-Net, read and checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.config import from_json
from engine.models.layers import activation, check_positive
from engine.types import UserError

# Options of the original that other model families use, each at the value that leaves it out.
FIXED = {
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type_num_heads": (64,),
    "class_embeddings_concat": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """unet/config.json, with the names and defaults of PyTorch diffusers.

    `attention_head_dim` is, for historical reasons, the *number of heads* of each block.
    """

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    # Of each block, or of each of its residual blocks.
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    # The same on the way up, in its order; where it differs, as in the pruned U-Nets of Segmind.
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool | None = False  # for others: here scores are float32 in any case
    resnet_time_scale_shift: str = "default"
    addition_embed_type: str | None = None  # "text_time": that of SDXL
    addition_time_embed_dim: int | None = None  # of the embedding of each of its sizes
    projection_class_embeddings_input_dim: int | None = None  # of all of them and the pooled words together
    time_cond_proj_dim: int | None = None  # of the embedding of a guidance scale that was distilled into it

    def finest_attention(self, height: int, width: int) -> tuple[int, int]:
        """The size of the largest feature maps whose pixels attend, for latents of that size."""
        kinds = zip(self.down_block_types, reversed(self.up_block_types), strict=True)
        attends = [any(kind.startswith("CrossAttn") for kind in level) for level in kinds]
        level = attends.index(True) if True in attends else len(attends) - 1
        return -(-height // 2**level), -(-width // 2**level)

    @property
    def deep_channels(self) -> int:
        """Of what goes into the last block of the way up."""
        return self.block_out_channels[:2][-1]

    @classmethod
    def from_json(cls, options: Mapping[str, Any], where: str) -> "UNetConfig":
        """Reads config.json; raises UserError for what the engine does not know."""
        return from_json(cls, options, where, FIXED)

    def __post_init__(self):
        def check(name, known):
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value not in known:
                    raise UserError(f"unknown {name} {value!r}; known: {', '.join(map(str, known))}")

        check("down_block_types", DOWN_BLOCKS)
        check("up_block_types", UP_BLOCKS)
        check("mid_block_type", MID_BLOCKS)
        check("resnet_time_scale_shift", ("default", "scale_shift"))
        check("downsample_padding", (0, 1))
        check("addition_embed_type", (None, "text_time"))
        added = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        for name in added:
            if (getattr(self, name) is None) == (self.addition_embed_type == "text_time"):
                raise UserError(
                    f"{name}={getattr(self, name)} with addition_embed_type={self.addition_embed_type!r}: "
                    "the two go together"
                )
        activation(self.act_fn, "act_fn")
        check_positive(
            self,
            *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups"),
            *("attention_head_dim", "cross_attention_dim"),
            *(name for name in (*added, "time_cond_proj_dim") if getattr(self, name) is not None),
        )
        for name in ("block_out_channels", "up_block_types"):
            if len(getattr(self, name)) != len(self.down_block_types):
                raise UserError(
                    f"{name} has {len(getattr(self, name))} entries for {len(self.down_block_types)} blocks"
                )
        for name in (
            "layers_per_block",
            "attention_head_dim",
            "cross_attention_dim",
            "only_cross_attention",
        ):
            self.per_block(name)
        for up in (False, True):
            for level in range(len(self.down_block_types)):
                self.depths(level, up)
        for channels, heads in zip(
            self.block_out_channels, self.per_block("attention_head_dim"), strict=True
        ):
            if channels % heads:
                raise UserError(f"attention_head_dim: {heads} heads do not divide {channels} channels")
            if channels % self.norm_num_groups:
                raise UserError(f"norm_num_groups={self.norm_num_groups} does not divide {channels} channels")

    def per_block(self, name: str) -> tuple:
        """The option `name` as one value a block, whether it is written as one value or as a list."""
        value, blocks = getattr(self, name), len(self.down_block_types)
        if not isinstance(value, tuple):
            value = (value,) * blocks
        if len(value) != blocks:
            raise UserError(f"{name} has {len(value)} entries for {blocks} blocks")
        if not all(isinstance(v, bool | int) for v in value):
            raise UserError(f"{name}={getattr(self, name)!r}: write one whole number, or one for each block")
        return value

    def depths(self, level: int, up: bool = False) -> tuple[int, ...]:
        """Layers of the transformer behind each residual block of a level, 0 the largest, on either way."""
        name = "transformer_layers_per_block"
        value, count = getattr(self, name), self.per_block("layers_per_block")[level] + up
        own = self.reverse_transformer_layers_per_block
        if up and own is not None:
            name, value = f"reverse_{name}", own[::-1]
        blocks = len(self.down_block_types)
        values = value if isinstance(value, tuple) else (value,) * blocks
        if len(values) != blocks:
            raise UserError(f"{name} has {len(values)} entries for {blocks} blocks")
        depths = values[level]
        if isinstance(depths, int):
            depths = (depths,) * count
        elif up and own is None:
            raise UserError(f"{name} has lists in it: write reverse_{name}, for the way up, too")
        kinds = self.up_block_types[::-1] if up else self.down_block_types
        if len(depths) != count or min(depths) < kinds[level].startswith("CrossAttn"):
            raise UserError(
                f"{name}={getattr(self, name)}: a block has {count} residual blocks; write {count} "
                "whole numbers from 1 for it, or one"
            )
        return depths
