"""Axis glossary and array aliases; and, for all who import these, the one error that a user can cause.

Axes: B batch, H W height and width, C channels, T image tokens, L text tokens, D width,
N heads, K head dim. Pictures are channels-last everywhere.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int, Key, UInt8

from engine.errors import Trouble as Trouble
from engine.errors import UserError as UserError

Images = UInt8[Array, "B H W 3"]  # finished pictures, 0..255
Latents = Float[Array, "B H W C"]  # noisy or clean latents
Sigma = Float[Array, "*B"]  # noise level, () or (B,)
Context = Float[Array, "B L D"]  # text encoder output that steers the U-Net
Ids = Int[Array, "B L"]  # token ids
Keys = Key[Array, "B"]  # one PRNG key an image

# Nested dict of arrays, keyed by attribute name (str) or list index (int), from nnx.to_pure_dict.
Params = dict[str | int, Any]

# (x, sigma) -> x0: what the samplers call, whatever the model family and its parameterization.
Denoise = Callable[[Latents, Sigma], Latents]
