"""Pictures as prompts, read on the devices by IP-Adapters (`engine.adapters`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine import adapters
from engine.parallel import Devices
from engine.parts import computed, kernels_on, module
from engine.programs import NOTHING
from engine.weights.ip_adapter import Adapter


class Prompting:
    """The program of some IP-Adapters, and what it said last."""

    def __init__(self, prompted: Sequence[Adapter], devices: Devices):
        self.program = devices.map(self._prompted)
        self._adapters, self._devices = tuple(prompted), devices
        self._seen: tuple[list[bytes], Mapping[str, Any]] | None = None

    def __call__(self, pictures: Sequence[np.ndarray]) -> Mapping[str, Any]:
        """What they make of a batch of pictures, by `adapters.pixels`; kept for the same again."""
        if not self._adapters:
            return NOTHING
        mark = [each.tobytes() for each in pictures]
        if self._seen is None or self._seen[0] != mark:
            params = tuple((each.net.params, each.encoder.params) for each in self._adapters)
            self._seen = mark, self.program(params, self._devices.shard_batch(tuple(pictures)))
        return self._seen[1]

    def _prompted(self, params: Any, pictures: Any) -> Any:
        devices, seen = self._devices, []
        for adapter, own, batch in zip(self._adapters, params, pictures, strict=True):
            whole = (computed(each, devices) for each in devices.whole(own))
            net, encoder = map(module, (adapter.net, adapter.encoder), whole)
            with kernels_on(devices):
                seen.append(adapters.seen(net, encoder, batch))
        return {"cond": tuple(s.cond for s in seen), "uncond": tuple(s.uncond for s in seen)}
