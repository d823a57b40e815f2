"""A ControlNet (Zhang et al. 2023) in training: a copy of the U-Net's way down learns to heed a picture.

Or a T2I-Adapter (Mou et al. 2023), a small network of its own. The U-Net stays as it is. What is shown of
each picture of the training is a function of it (`engine.sights`), computed on the devices, so that any
pictures with captions will do; or a picture that is given beside it: its depth, its poses, whatever goes with
it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from engine import sights
from engine.config import ControlConfig
from engine.controls import said
from engine.models.controlnet import ControlNetConditioningEmbedding, ControlNetModel
from engine.models.controlnet_union import ControlNetUnionConfig
from engine.models.layers import host_rngs
from engine.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from engine.train.step import Batch
from engine.types import UserError
from engine.weights import t2i_adapter
from engine.weights.component import Component, abstract
from engine.weights.controlnet import config_for, load_controlnet
from engine.weights.folder import Model


def begin(model: Model, config: ControlConfig, seed: int) -> Component:
    """The ControlNet as it begins: that of a folder or file, or a copy of the U-Net that adds nothing yet.

    An adapter begins with random weights, and is heard from the first step on.

    Raises:
      UserError: there is none for this model.
    """
    if config.start:
        found = load_controlnet(model, config.start, place=lambda name, array: array)
        if (is_one := isinstance(found.config, T2IAdapterConfig)) != config.adapter:
            what = "a T2I-Adapter" if is_one else "a ControlNet"
            raise UserError(f"controlnet.start={config.start!r} is {what}: write controlnet.adapter={is_one}")
        if isinstance(found.config, ControlNetUnionConfig):
            raise UserError(f"controlnet.start={config.start!r} is a union of many kinds, and is not trained")
        return found
    rngs = host_rngs(seed)
    if config.adapter:
        own = t2i_adapter.config_for(model)
        graphdef, _ = abstract("controlnet", own)
        params = nnx.to_pure_dict(nnx.state(T2IAdapter(own, rngs), nnx.Param))
        return Component("controlnet", own, graphdef, jax.tree.map(np.asarray, params))
    own = config_for(model)
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
        nets = [net] if isinstance(net, ControlNetModel) else []
        return lambda x, t, words, added: said(
            lambda: nets, x, t, [words] * len(nets), [shown], jnp.ones(1, jnp.float32), added
        )

    return of_batch
