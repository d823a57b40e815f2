"""Pictures as prompts, read on the devices by IP-Adapters (`engine.adapters`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine import adapters
from engine.parts import computed, module
from engine.programs import NOTHING, Programs


class Prompting:
    """The program of the IP-Adapters that are beside some others, and what it said last."""

    def __init__(self, beside: Programs):
        self.program = beside.devices.map(self._prompted)
        self._beside = beside
        self._seen: tuple[list[bytes], Mapping[str, Any]] | None = None

    def __call__(self, pictures: Sequence[np.ndarray]) -> Mapping[str, Any]:
        """What they make of a batch of pictures, by `adapters.pixels`; kept for the same again."""
        beside = self._beside
        if not beside.adapters:
            return NOTHING
        mark = [each.tobytes() for each in pictures]
        if self._seen is None or self._seen[0] != mark:
            params = tuple((each.net.params, each.encoder.params) for each in beside.adapters)
            self._seen = mark, self.program(params, beside.devices.shard_batch(tuple(pictures)))
        return self._seen[1]

    def _prompted(self, params: Any, pictures: Any) -> Any:
        devices, seen = self._beside.devices, []
        for adapter, own, batch in zip(self._beside.adapters, params, pictures, strict=True):
            whole = (computed(each, devices) for each in devices.whole(own))
            net, encoder = map(module, (adapter.net, adapter.encoder), whole)
            with self._beside.kernels_here():
                seen.append(adapters.seen(net, encoder, batch))
        return {"cond": tuple(s.cond for s in seen), "uncond": tuple(s.uncond for s in seen)}
