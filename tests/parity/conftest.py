"""What all tests beside PyTorch need to be quick."""

import numpy as np
import pytest
from diffusers import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler


@pytest.fixture(scope="package", autouse=True)
def numbers_instead_of_tensors():
    """These schedulers hand NumPy each noise level as a tensor, whereupon PyTorch throws an exception in C++
    and catches it. Among the thousands of programs that tests have compiled, each takes 50 ms."""
    with pytest.MonkeyPatch.context() as patch:
        for scheduler in (KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler):
            patch.setattr(scheduler, "_sigma_to_t", _of_arrays(scheduler._sigma_to_t))
        yield


def _of_arrays(look_up):
    return lambda scheduler, sigma, log_sigmas: look_up(scheduler, np.asarray(sigma), log_sigmas)
