"""A ControlNet (Zhang et al. 2023) in training: a copy of the U-Net's way down learns to heed a picture.

The U-Net stays as it is. What the ControlNet is shown of each training picture is a function of it
(`engine.sights`), computed on the devices, so that any pictures with captions will do.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from engine import sights
from engine.config import ControlConfig
from engine.controls import said
from engine.models.controlnet import ControlNetModel
from engine.models.layers import host_rngs
from engine.train.step import Batch
from engine.types import Params
from engine.weights.component import Component, abstract, save_component
from engine.weights.controlnet import config_for, load_controlnet
from engine.weights.folder import Model


def begin(model: Model, config: ControlConfig, seed: int) -> Component:
    """The ControlNet as it begins: that of a folder, or a copy of the U-Net that adds nothing yet.

    Raises:
      UserError: the folder holds none for this model.
    """
    if config.start:
        return load_controlnet(model, config.start, place=lambda name, array: array)
    own = config_for(model)
    graphdef, shapes = abstract("controlnet", own)
    fresh = nnx.to_pure_dict(nnx.state(ControlNetModel(own, host_rngs(seed)), nnx.Param))
    leaves, unet = traverse_util.flatten_dict(fresh), traverse_util.flatten_dict(model.unet.params)
    params = {path: np.asarray(unet.get(path, leaves[path])) for path in shapes}
    return Component("controlnet", own, graphdef, traverse_util.unflatten_dict(params))


def control(graphdef: nnx.GraphDef, kind: str) -> Callable:
    """(frozen, batch) -> (x, t, words, added) -> what is added to the U-Net; frozen has "controlnet".

    kind: what is shown of batch["image"], see `engine.sights`.
    """

    def of_batch(frozen: Mapping[str, Any], batch: Batch) -> Callable:
        net = nnx.merge(graphdef, nnx.State(frozen["controlnet"]))
        shown = net.look(sights.seen(kind, batch["image"]) / jnp.float32(255))
        return lambda x, t, words, added: said(
            lambda: [net], x, t, [words], [shown], jnp.ones(1, jnp.float32), added
        )

    return of_batch


def export(net: Component, params: Params, folder: pathlib.Path, overwrite: bool) -> pathlib.Path:
    """Writes the ControlNet for `--controlnet` and for PyTorch diffusers, in float16."""
    save_component(folder, dataclasses.replace(net, params=params), jnp.float16, overwrite=overwrite)
    return folder
