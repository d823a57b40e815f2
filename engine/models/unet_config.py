"""unet/config.json: the options of a U-Net, and those that a ControlNet has too, read and checked."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from engine.config import from_json
from engine.models.layers import activation, check_positive
from engine.types import UserError

# Options of the original that other model families use, each at the value that leaves it out.
ENCODER_FIXED = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type_num_heads": (64,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
}
FIXED = ENCODER_FIXED | {
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "class_embeddings_concat": (False,),
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
TRAINED_SIZE = 64  # of the latents of Stable Diffusion 1
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What the configs of a U-Net and of a ControlNet have in common, as in PyTorch diffusers.

    `attention_head_dim` is, for historical reasons, the *number of heads* of each block.
    """

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
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
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool | None = False  # for others: here scores are float32 in any case
    resnet_time_scale_shift: str = "default"
    addition_embed_type: str | None = None  # "text_time": that of SDXL
    addition_time_embed_dim: int | None = None  # of the embedding of each of its sizes
    projection_class_embeddings_input_dim: int | None = None  # of all of them and the pooled words together

    def __post_init__(self):
        self._check_known("down_block_types", DOWN_BLOCKS)
        self._check_known("mid_block_type", MID_BLOCKS)
        self._check_known("resnet_time_scale_shift", ("default", "scale_shift"))
        self._check_known("downsample_padding", (0, 1))
        self._check_known("addition_embed_type", (None, "text_time"))
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
            *("in_channels", "block_out_channels", "layers_per_block", "norm_num_groups"),
            *("attention_head_dim", "cross_attention_dim"),
            *(name for name in added if getattr(self, name) is not None),
        )
        self._check_count("block_out_channels")
        for name in (
            "layers_per_block",
            "attention_head_dim",
            "cross_attention_dim",
            "only_cross_attention",
        ):
            self.per_block(name)
        for level in range(len(self.down_block_types)):
            self.depths(level)
        for channels, heads in zip(
            self.block_out_channels, self.per_block("attention_head_dim"), strict=True
        ):
            if channels % heads:
                raise UserError(f"attention_head_dim: {heads} heads do not divide {channels} channels")
            if channels % self.norm_num_groups:
                raise UserError(f"norm_num_groups={self.norm_num_groups} does not divide {channels} channels")

    def _check_known(self, name: str, known: tuple) -> None:
        values = getattr(self, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value not in known:
                raise UserError(f"unknown {name} {value!r}; known: {', '.join(map(str, known))}")

    def _check_count(self, name: str) -> None:
        if (count := len(getattr(self, name))) != (blocks := len(self.down_block_types)):
            raise UserError(f"{name} has {count} entries for {blocks} blocks")

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

    def depths(self, level: int) -> tuple[int, ...]:
        """Layers of the transformer behind each residual block of a level on the way down, 0 the largest."""
        name, count = "transformer_layers_per_block", self.per_block("layers_per_block")[level]
        depths = self._of_level(name, getattr(self, name), level)
        return self._checked_depths(name, depths, count, self.down_block_types[level])

    def _of_level(self, name: str, value: int | tuple, level: int) -> int | tuple[int, ...]:
        blocks = len(self.down_block_types)
        values = value if isinstance(value, tuple) else (value,) * blocks
        if len(values) != blocks:
            raise UserError(f"{name} has {len(values)} entries for {blocks} blocks")
        return values[level]

    def _checked_depths(self, name: str, depths: int | tuple, count: int, kind: str) -> tuple[int, ...]:
        depths = (depths,) * count if isinstance(depths, int) else depths
        if len(depths) != count or min(depths) < kind.startswith("CrossAttn"):
            raise UserError(
                f"{name}={getattr(self, name)}: a block has {count} residual blocks; write {count} "
                "whole numbers from 1 for it, or one"
            )
        return depths

    @property
    def skip_channels(self) -> list[int]:
        """Of what the way down keeps for the way up, from conv_in on."""
        found, last = [self.block_out_channels[0]], len(self.block_out_channels) - 1
        for level, out in enumerate(self.block_out_channels):
            found += [out] * (len(self.depths(level)) + (level < last))
        return found


@dataclasses.dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """unet/config.json, with the names and defaults of PyTorch diffusers."""

    sample_size: int | tuple[int, ...] | None = None
    out_channels: int = 4
    center_input_sample: bool = False
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    # Layers of transformers on the way up, in its order; where they differ, as in the U-Nets of Segmind.
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
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
        """Reads config.json; raises UserError for what the engine does not know.

        The first diffusers wrote a sample_size of 32 for Stable Diffusion 1, whose latents have 64; its later
        versions do not believe it, either.
        """
        size = options.get("sample_size")
        if _before_0_9(options.get("_diffusers_version")) and isinstance(size, int) and size < TRAINED_SIZE:
            options = {**options, "sample_size": TRAINED_SIZE}
        return from_json(cls, options, where, FIXED)

    def __post_init__(self):
        super().__post_init__()
        self._check_known("up_block_types", UP_BLOCKS)
        self._check_count("up_block_types")
        check_positive(self, "out_channels")
        if self.time_cond_proj_dim is not None:
            check_positive(self, "time_cond_proj_dim")
        for level in range(len(self.down_block_types)):
            self.depths(level, up=True)

    def depths(self, level: int, up: bool = False) -> tuple[int, ...]:
        """Layers of the transformer behind each residual block of a level, on either way."""
        if not up:
            return super().depths(level)
        name, value = "transformer_layers_per_block", self.transformer_layers_per_block
        own = self.reverse_transformer_layers_per_block
        if own is not None:
            name, value = f"reverse_{name}", own[::-1]
        depths = self._of_level(name, value, level)
        if own is None and not isinstance(depths, int):
            raise UserError(f"{name} has lists in it: write reverse_{name}, for the way up, too")
        count = self.per_block("layers_per_block")[level] + 1
        return self._checked_depths(name, depths, count, self.up_block_types[::-1][level])


def _before_0_9(version: Any) -> bool:
    """Of a version of diffusers, as "0.2.2"."""
    found = re.match(r"0\.(\d+)\.", version) if isinstance(version, str) else None
    return found is not None and int(found[1]) < 9
