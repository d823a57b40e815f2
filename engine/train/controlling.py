"""A ControlNet (Zhang et al. 2023) in training: a copy of the U-Net's way down learns to heed a picture.

The U-Net stays as it is. What the ControlNet is shown of each training picture is a function of it
(`engine.sights`), computed on the devices, so that any pictures with captions will do; or a picture that is
given beside it: its depth, its poses, whatever goes with it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from engine import sights
from engine.config import ControlConfig
from engine.controls import said
from engine.models.controlnet import ControlNetConditioningEmbedding, ControlNetConfig, ControlNetModel
from engine.models.layers import host_rngs
from engine.train.step import Batch
from engine.types import UserError
from engine.weights.component import Component, abstract
from engine.weights.controlnet import config_for, load_controlnet
from engine.weights.folder import Model


def begin(model: Model, config: ControlConfig, seed: int) -> Component:
    """The ControlNet as it begins: that of a folder or file, or a copy of the U-Net that adds nothing yet.

    Raises:
      UserError: there is none for this model.
    """
    if config.start:
        found = load_controlnet(model, config.start, place=lambda name, array: array)
        if not isinstance(found.config, ControlNetConfig):
            raise UserError(f"controlnet.start={config.start!r} is a T2I-Adapter, which is not trained")
        return found
    own, rngs = config_for(model), host_rngs(seed)
    graphdef, shapes = abstract("controlnet", own)
    # Only what the U-Net lacks is drawn: all of it would be the memory and the time of a second one.
    lacks = {"controlnet_cond_embedding": ControlNetConditioningEmbedding(own, rngs)}
    if model.unet.config.mid_block_type is None:
        lacks["mid_block"] = ControlNetModel(own, rngs).mid_block
    drawn = {name: nnx.to_pure_dict(nnx.state(each, nnx.Param)) for name, each in lacks.items()}
    known = traverse_util.flatten_dict(model.unet.params) | traverse_util.flatten_dict(drawn)
    params = {
        path: np.asarray(known.get(path, np.zeros(leaf.shape, leaf.dtype))) for path, leaf in shapes.items()
    }
    return Component("controlnet", own, graphdef, traverse_util.unflatten_dict(params))


def control(graphdef: nnx.GraphDef, sight: str) -> Callable:
    """(frozen, batch) -> (x, t, words, added) -> what is added to the U-Net; frozen has "controlnet".

    sight: what is shown of batch["control"], or without one of batch["image"], see `engine.sights`.
    """

    def of_batch(frozen: Mapping[str, Any], batch: Batch) -> Callable:
        net = nnx.merge(graphdef, nnx.State(frozen["controlnet"]))
        shown = net.look(sights.seen(sight, batch.get("control", batch["image"])) / jnp.float32(255))
        return lambda x, t, words, added: said(
            lambda: [net], x, t, [words], [shown], jnp.ones(1, jnp.float32), added
        )

    return of_batch
