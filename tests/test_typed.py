"""Wrong types and shapes of arguments are noticed wherever they are written."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation

from engine.conditions import weighted
from engine.models.attention import attend
from engine.parallel import pad


def test_arrays_that_do_not_fit_each_other():
    q, k = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 6, 2, 8))
    assert attend(q, k, k).shape == q.shape
    with pytest.raises(jaxtyping.TypeCheckError, match="attend"):
        attend(q, k, k[:, :5])
    z = np.zeros((3, 2), np.float32)
    with pytest.raises(jaxtyping.TypeCheckError, match="weighted"):
        weighted(z, z[:2], z)


def test_arguments_of_other_types():
    with pytest.raises(BeartypeCallHintViolation, match="pad"):
        pad(np.zeros(3), "four")
