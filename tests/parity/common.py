"""Twins: a Flax module and the PyTorch original that it must equal, with the same random weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from engine.models.layers import host_rngs
from engine.types import Params
from engine.weights import names

torch.set_num_threads(1)

# max |ours - theirs| <= TOLERANCE * max |theirs|, in float32.
TOLERANCE = 1e-4


def compiled(function: Callable) -> Callable:
    """jax.jit, without LLVM's optimizations: the time of these tests is the compiler's, not the models'."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def random_weights(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills every parameter, norms and biases included, such that activations keep their scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:  # kernels and embeddings
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:  # the weights among vectors are the scales of norms, about 1
                parameter.copy_(0.3 * noise + name.endswith("weight"))
    return module.eval()


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def nchw(x) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class Twin:
    """Our module, called as a pure function of `params`, and the original with the same random weights."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], original: torch.nn.Module, kind: str = ""):
        """kind: the part of a model folder, whose exceptions from the rules for names apply."""
        self.kind = kind
        self.original = random_weights(original)
        abstract = nnx.eval_shape(lambda: build(host_rngs()))
        self.graphdef, state, rest = nnx.split(abstract, nnx.Param, ...)
        assert not jax.tree.leaves(rest), "the module holds state that is no parameter"
        self.shapes = nnx.to_pure_dict(state)
        self.params = self.converted()

    def converted(self) -> Params:
        """The original's parameters in our layout: all of them, and no others."""
        weights = {names.canonical(self.kind, k): v.numpy() for k, v in self.original.state_dict().items()}
        weights.pop(None, None)

        def take(path, leaf):
            path = tuple(entry.key for entry in path)
            array = names.to_flax(path, weights.pop(names.to_key(path)), leaf.ndim)
            assert array.shape == leaf.shape, f"{path}: {array.shape} for {leaf.shape}"
            return jnp.asarray(array)

        params = jax.tree.map_with_path(take, self.shapes)
        assert not weights, f"our model has no {sorted(weights)}"
        return params

    def apply(self, params, *args, method: str = "__call__", **kwargs):
        model = nnx.merge(self.graphdef, nnx.State(params))
        return getattr(model, method)(*args, **kwargs)

    def __call__(self, *args, method: str = "__call__", **kwargs):
        """The output of our module, compiled; `kwargs` are static."""
        return compiled(lambda p, *a: self.apply(p, *a, method=method, **kwargs))(self.params, *args)

    def theirs(self, *args, **kwargs):
        """The original's output, without gradients. Arrays become tensors."""
        as_tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args]
        with torch.no_grad():
            return self.original(*as_tensors, **kwargs)


def difference(ours, theirs) -> float:
    """max |ours - theirs| / max |theirs|, for arrays of one shape."""
    ours = np.asarray(ours, np.float32)
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{ours.shape} for {theirs.shape}"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_same(ours, theirs, tolerance: float = TOLERANCE, where: str = "") -> None:
    """Fails for NaN too, which compares as false."""
    found = difference(ours, theirs)
    assert found <= tolerance, f"{where} differs by {found:.1e} of the output's scale"
