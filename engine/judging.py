"""Pictures judged on the devices by a CLIP: how well they show what was asked for, and which is the best.

A picture depends on its noise, and of several some follow their words better: so N candidates of each are
drawn, and the one that is kept is an ordinary picture with an address of its own. (Best of N, or rejection
sampling; with CLIP as the judge it began with DALL-E, Ramesh et al. 2021, section 2.6.)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from engine.parallel import Devices, pad
from engine.parts import computed, kernels_on, module
from engine.requests import Candidates, Finished, Request
from engine.sizing import for_clip
from engine.weights.clip import Clip
from engine.weights.clip_pixels import filter_of


class Judging:
    """The programs of a CLIP, in float32."""

    def __init__(self, clip: Clip, devices: Devices):
        """Raises UserError where the CLIP wants its pictures as devices cannot make them."""
        if clip.pixels.do_resize:
            filter_of(clip.pixels)
        self._clip, self._devices = clip, devices
        self._texts_program = devices.map(self._text_features)
        self._scores_program = devices.map(self._cosines)
        self._choose_program = devices.map(self._chosen)

    def read(self, texts: Sequence[str], size: int) -> list[Float[np.ndarray, " P"]]:
        """The vectors of texts, of which as many go to the devices at once as `size` says."""
        devices, found = self._devices, []
        ids = self._clip.tokenizer.encode(list(texts))
        for first in range(0, len(texts), size):
            part = devices.shard_batch(pad(ids[first : first + size], size))
            found += list(devices.fetch(self._texts_program(self._clip.model.params, part)))
        return found[: len(texts)]

    def scores(self, images: UInt8[Array, "B H W 3"], vectors: Float[np.ndarray, "B P"]) -> jax.Array:
        """100 cos of each picture and of what it is to show (B,): the CLIP score, which ends at 0.

        Args:
          vectors: from `read`.
        """
        batched = {"images": images, "vectors": self._devices.shard_batch(vectors)}
        return self._scores_program(self._clip.model.params, batched)

    def choose(self, best: Candidates, new: Candidates) -> Candidates:
        """Of two candidates in each place of a batch, the better one."""
        return self._choose_program((), (best, new))

    def _chosen(self, _: Any, two: Any) -> Any:
        return better(*two)

    def _text_features(self, params: Any, ids: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return self._module(params).text_features(ids)

    def _cosines(self, params: Any, batched: Any) -> Any:
        # Candidates are alike: no accelerator may round the factors of these products.
        with kernels_on(self._devices), jax.default_matmul_precision("highest"):
            seen = self._module(params).image_features(for_clip(batched["images"], self._clip.pixels))
            return 100 * jnp.sum(seen * batched["vectors"], axis=-1)

    def _module(self, params: Any) -> Any:
        return module(self._clip.model, self._devices.whole(computed(params, self._devices)))


def better(best: Candidates, new: Candidates) -> Candidates:
    """In each place the one that ranks higher; of equal ones the first."""
    taken = rank(new) > rank(best)

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(taken.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    return jax.tree.map(pick, best, new)


def rank(of: Candidates | Finished) -> Any:
    """What candidates are chosen by: a NaN's are the last, before them those that are held back."""
    xp = np if isinstance(of.scores, np.ndarray) else jnp
    return xp.where(of.finite, of.scores - 1e3 * ~of.safe, -1e6)


def spread(
    requests: Sequence[Request], best_of: int, size: int
) -> tuple[list[list[Request]], Int32[np.ndarray, " S"]]:
    """Batches of `size` that draw every candidate, and which request each of their places is of.

    The candidates of a request have its index and those behind it. Where the requests leave room in a batch,
    several candidates of each are drawn at once; what room is left then is filled with the last.
    """
    count, at_once = len(requests), drawn_at_once(len(requests), best_of, size)
    places = np.minimum(np.arange(size), at_once * count - 1)
    of, which = np.int32(places % count), places // count
    batches = []
    for first in range(0, best_of, at_once):
        numbers = (first + which) % best_of
        pairs = zip(of.tolist(), numbers.tolist(), strict=True)
        batches.append([requests[i]._replace(index=requests[i].index + number) for i, number in pairs])
    return batches, of


def drawn_at_once(count: int, best_of: int, size: int) -> int:
    """Candidates of each of `count` requests for which a batch has room."""
    return max(1, min(best_of, size // count))


def arrived(finished: Finished, count: int) -> Finished:
    """On the host, of each of `count` requests what is to be kept. Waits for it."""
    found = jax.tree.map(np.asarray, jax.block_until_ready(finished))
    chosen: Any = slice(count)  # not copied
    if found.of is not None:
        ranks = rank(found)
        chosen = np.array([np.where(found.of == i, ranks, -np.inf).argmax() for i in range(count)], int)
    return jax.tree.map(lambda array: array[chosen], found)
