"""The autoencoder's latents, brought to a scale that suits the diffusion."""

import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array

from engine.parallel import Devices
from engine.train import objectives
from engine.types import Params
from engine.weights.component import Component, digest_of
from engine.weights.files import new_file
from engine.weights.safetensors_io import read_header, read_metadata, read_tensor, write

METRIC_IMAGES = 32
PARTS = ("quant_conv", "post_quant_conv")  # what the scale changes


def scaled_once(
    vae: Component, params: Params, images: Callable[[], np.ndarray], file: pathlib.Path
) -> Params:
    """`in_units_of_pixels` of an autoencoder with `params`, measured once and kept in `file`.

    The U-Net knows the latents as they were when it began: other pictures, when a run goes on or is exported,
    must not move them. Of several hosts, all have what the first has measured.

    Args:
      images: gives uint8 (N, H, W, 3) to measure with, where it was not done before.
    """
    devices, digest = Devices("jit", all_hosts=jax.process_count() > 1), digest_of(params)
    scaled = _kept(file, digest)
    if scaled is None:
        whole = in_units_of_pixels(vae, params, images())
        scaled = {part: jax.tree.map(lambda x: np.asarray(x, np.float32), whole[part]) for part in PARTS}
    scaled = jax.tree.map(devices.agree, scaled)
    if devices.leads:
        _keep(file, digest, scaled)
    return {**params, **scaled}


def _kept(file: pathlib.Path, digest: str) -> Params | None:
    """What is in the file, if it was made of the same params."""
    if not file.exists() or read_metadata(file).get("of") != digest:
        return None
    with file.open("rb") as opened:
        found = {name: read_tensor(opened, name, tensor) for name, tensor in read_header(file).items()}
    return traverse_util.unflatten_dict(found, sep="/")


def _keep(file: pathlib.Path, digest: str, scaled: Params) -> None:
    flat = traverse_util.flatten_dict(scaled, sep="/")
    shapes = {name: array.shape for name, array in flat.items()}
    with new_file(file) as new:
        write(new, shapes, dict.fromkeys(shapes, np.dtype(np.float32)), flat.__getitem__, {"of": digest})


def in_units_of_pixels(vae: Component, params: Params, images: np.ndarray) -> Params:
    """The same autoencoder with latents in which an error weighs what it costs in the picture.

    z' = (z - mean) G^(1/2) R / s, where G = E[J^T J] with the decoder's Jacobian J, R turns to the principal
    axes, and s makes the variance 1 on average over the channels. So the channels of colour are large and
    those of fine texture small, and the noise of diffusion leaves the coarse for last, as it does with
    pixels; latents of equal variance would spend most of the U-Net on texture. The map goes into the 1x1
    convolutions on both sides of the latent; the posterior's variance becomes its mean, a constant.
    """
    z, variance = _posterior(vae, params, images)
    mean, C = z.mean((0, 1, 2)), z.shape[-1]
    root = _root(pixel_metric(vae.graphdef, params, z[:METRIC_IMAGES]))
    scaled = (z - mean).reshape(-1, C) @ root
    values, axes = np.linalg.eigh(scaled.T @ scaled / len(scaled))
    to = root @ axes[:, ::-1] / np.sqrt(values.mean())
    quant, post = params["quant_conv"], params["post_quant_conv"]
    noise = np.log(np.einsum("ij,i->j", to**2, variance).mean())
    return {
        **params,
        "quant_conv": {
            "kernel": np.concatenate(
                [quant["kernel"][..., :C] @ to, np.zeros_like(quant["kernel"][..., C:])], -1
            ),
            "bias": np.concatenate([(quant["bias"][:C] - mean) @ to, np.full(C, noise, np.float32)]),
        },
        "post_quant_conv": {
            "kernel": np.linalg.inv(to) @ post["kernel"],
            "bias": post["bias"] + mean @ post["kernel"][0, 0],
        },
    }


def _posterior(vae: Component, params: Params, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The latents' means (N, h, w, C) and the mean variance of each channel (C,)."""
    parts = (images[i : i + 32] for i in range(0, len(images), 32))
    means, variances = zip(*(_encode(vae.graphdef, params, part) for part in parts), strict=True)
    return np.concatenate(means), np.mean(variances, 0)


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, params: Params, images: Array) -> tuple[Array, Array]:
    posterior = objectives.applier(graphdef)(params).encode(objectives.to_float(images))
    return posterior.mean, jnp.exp(posterior.logvar).mean((0, 1, 2))


@functools.partial(jax.jit, static_argnums=0)
def pixel_metric(graphdef: nnx.GraphDef, params: Params, z: Array) -> Array:
    """E[J^T J] (C, C): what a step in latent space costs, in squares of pixels, channel against channel."""
    decode = objectives.applier(graphdef)(params).decode
    # Random signs over the places make the places' cross terms vanish (Hutchinson 1989).
    signs = jax.random.rademacher(jax.random.key(0), (*z.shape[:-1], 1), z.dtype)
    pushed = [jax.jvp(decode, (z,), (signs * direction,))[1] for direction in jnp.eye(z.shape[-1])]
    flat = jnp.stack(pushed).reshape(z.shape[-1], -1)
    return flat @ flat.T / (z.size // z.shape[-1])


def _root(matrix: Array) -> np.ndarray:
    """The symmetric square root of a positive matrix."""
    values, axes = np.linalg.eigh(np.asarray(matrix))
    return axes * np.sqrt(np.maximum(values, values.max() * 1e-6)) @ axes.T
