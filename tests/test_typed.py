"""Wrong types and shapes of arguments are noticed wherever they are written."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from flax import nnx

from engine.conditions import weighted
from engine.models.attention import attend
from engine.models.unet import UNet2DConditionModel
from engine.models.unet_config import UNetConfig
from engine.parallel import pad
from tests.tiny import UNET


def test_arrays_that_do_not_fit_each_other():
    q, k = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 6, 2, 8))
    assert attend(q, k, k).shape == q.shape
    with pytest.raises(jaxtyping.TypeCheckError, match="attend"):
        attend(q, k, k[:, :5])
    z = np.zeros((3, 2), np.float32)
    with pytest.raises(jaxtyping.TypeCheckError, match="weighted"):
        weighted(z, z[:2], z)


def test_arrays_inside_of_other_annotations():
    """A tuple, or nothing: of arrays that have one batch."""
    net = nnx.eval_shape(lambda: UNet2DConditionModel(UNetConfig(**UNET), nnx.Rngs(0)))
    x, t, words = jnp.zeros((2, 8, 8, 4)), jnp.zeros(2), jnp.zeros((2, 3, 24))
    with pytest.raises(jaxtyping.TypeCheckError, match="added"):
        net(x, t, words, added=(jnp.zeros((3, 5)), jnp.zeros((2, 6))))


def test_arguments_of_other_types():
    with pytest.raises(BeartypeCallHintViolation, match="pad"):
        pad(np.zeros(3), "four")
