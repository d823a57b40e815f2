"""Names and layouts: where a parameter of a Flax module stands in a PyTorch checkpoint.

The path of an NNX attribute, joined with dots, is the key in the checkpoint, because the models name their
attributes as PyTorch does. The last part alone differs (kernel, scale, embedding -> weight), and so does
the order of the axes: PyTorch keeps the output axis first.

    ("down_blocks", 0, "conv_in", "kernel") (H, W, I, O) <-> "down_blocks.0.conv_in.weight" (O, I, H, W)
    ("time_embedding", "linear_1", "kernel")      (I, O) <-> "time_embedding.linear_1.weight"     (O, I)
"""

import re
from collections.abc import Iterable

import numpy as np

Path = tuple[str | int, ...]
Shape = tuple[int, ...]

# leaf name -> its name in PyTorch
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
LEAVES |= {"running_mean": "running_mean", "running_var": "running_var"}  # of a batch normalization
# parameters of CLIP that are no layer's
LEAVES |= {"class_embedding": "class_embedding", "logit_scale": "logit_scale"}
LEAVES |= {"latents": "latents"}  # the queries of an IP-Adapter
# of a ControlNet union, which has the attention of PyTorch
LEAVES |= {name: name for name in ("task_embedding", "in_proj_weight", "in_proj_bias")}
# of a safety checker
LEAVES |= {name: name for name in ("concept_embeds", "special_care_embeds")}
LEAVES |= {name: name for name in ("concept_embeds_weights", "special_care_embeds_weights")}

# Axes of a kernel, by rank: array.transpose(TO_TORCH[rank]) is PyTorch's, and TO_FLAX undoes it.
TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}  # Linear (I, O) -> (O, I); Conv HWIO -> OIHW
TO_FLAX = {2: (1, 0), 4: (2, 3, 1, 0)}

# Names of older or newer writers: (component, pattern, what the models say). None: no weight, not read.
_SAVED = r"(?:params(?:_ema)?\.)?"  # BasicSR's, where it saved more than one set of weights
_ATTENTION = r"(.*mid_block\.attentions\.\d+)\."
ALIASES = tuple(
    (kind, re.compile(pattern), replacement)
    for kind, pattern, replacement in (
        # diffusers before 0.17, and the folders of Stable Diffusion 1 and 2 ever since
        ("vae", _ATTENTION + r"query\.", r"\1.to_q."),
        ("vae", _ATTENTION + r"key\.", r"\1.to_k."),
        ("vae", _ATTENTION + r"value\.", r"\1.to_v."),
        ("vae", _ATTENTION + r"proj_attn\.", r"\1.to_out.0."),
        # transformers before 4.31 saved arange(77) with the weights
        ("text_encoder", r"(text_model\.)?embeddings\.position_ids$", None),
        ("clip", r"(text_model|vision_model)\.embeddings\.position_ids$", None),
        ("safety_checker", r"vision_model\.(vision_model\.)?embeddings\.position_ids$", None),
        # transformers 5 saves it without the prefix
        ("safety_checker", r"vision_model\.(?!vision_model\.)", "vision_model.vision_model."),
        ("image_encoder", r"vision_model\.embeddings\.position_ids$", None),
        # transformers 5 saves a text encoder that it built itself without the prefix; it reads both
        ("text_encoder", r"(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),
        ("text_encoder_2", r"(text_model\.)?embeddings\.position_ids$", None),
        # FID ends before the classes, and never trains
        ("inception", r"(fc|AuxLogits)\.|.*\.num_batches_tracked$", None),
        # ESRGAN's first layout, which numbers its layers, whatever the factor; then its second
        ("upscaler", _SAVED + r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
        ("upscaler", _SAVED + r"model\.1\.sub\.\d+\.(?!RDB)", "conv_body."),
        ("upscaler", _SAVED + r"model\.0\.", "conv_first."),
        ("upscaler", _SAVED + r"model\.3\.", "conv_up1."),
        ("upscaler", _SAVED + r"model\.6\.", "conv_up2."),
        ("upscaler", _SAVED + r"model\.9\.", "conv_up3."),
        ("upscaler", _SAVED + r"model\.(?:2|5|8|11)\.", "conv_hr."),
        ("upscaler", _SAVED + r"model\.(?:4|7|10|13)\.", "conv_last."),
        ("upscaler", _SAVED + r"RRDB_trunk\.(\d+)\.RDB(\d)\.", r"body.\1.rdb\2."),
        ("upscaler", _SAVED + r"trunk_conv\.", "conv_body."),
        ("upscaler", _SAVED + r"upconv(\d)\.", r"conv_up\1."),
        ("upscaler", _SAVED + r"HRconv\.", "conv_hr."),
        ("upscaler", r"params(?:_ema)?\.", ""),
    )
)
# The old autoencoders' attention, before diffusers made 1x1 convolutions of it linear.
_WAS_CONVOLUTION = re.compile(_ATTENTION + r"(to_q|to_k|to_v|to_out\.0)\.weight$")


def canonical(kind: str, key: str) -> str | None:
    """The models' name for `key` in a checkpoint of `kind` ("unet", ...); None for what is no weight."""
    for where, pattern, replacement in ALIASES:
        if where == kind and pattern.match(key):
            return None if replacement is None else pattern.sub(replacement, key, count=1)
    return key


def to_key(path: Path) -> str:
    """The checkpoint key of the parameter at `path` of a pure dict."""
    *parents, leaf = path
    return ".".join([*map(str, parents), LEAVES[str(leaf)]])


def keys(paths: Iterable[Path]) -> dict[str, Path]:
    """Checkpoint key -> path, for all parameters of a model."""
    return {to_key(path): path for path in paths}


def torch_shape(path: Path, shape: Shape) -> Shape:
    """The shape in PyTorch's order of axes of a parameter with `shape` in Flax's."""
    return tuple(shape[axis] for axis in TO_TORCH[len(shape)]) if path[-1] == "kernel" else tuple(shape)


def was_convolution(kind: str, key: str) -> bool:
    """Whether old files have the matrix `key` as a 1x1 convolution, which is the same with (1, 1) behind."""
    return kind == "vae" and bool(_WAS_CONVOLUTION.match(key))


def fits(kind: str, key: str, found: Shape, wanted: Shape) -> bool:
    """Whether a tensor of shape `found`, as stored, can be the parameter `key` of PyTorch shape `wanted`."""
    return found == wanted or (was_convolution(kind, key) and found == (*wanted, 1, 1))


def to_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """`array` with PyTorch's order of axes: a view."""
    return array.transpose(TO_TORCH[array.ndim]) if path[-1] == "kernel" else array


def to_flax(path: Path, array: np.ndarray, rank: int) -> np.ndarray:
    """`array` of a checkpoint with Flax's order of axes, in `rank` dimensions: a view."""
    array = array.reshape(array.shape[:rank])  # drops the (1, 1) of an old convolution, see `fits`
    return array.transpose(TO_FLAX[rank]) if path[-1] == "kernel" else array
