"""How fast the U-Net trains, alone or beside a peer."""

import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.benchmark import compiled, outline, timing
from engine.benchmark.drawing import peak_memory, utilisation
from engine.benchmark.peer import PeerTraining
from engine.benchmark.report import Row
from engine.loading import SHIPPED
from engine.parallel import Devices
from engine.weights.folder import Model, load_trainable

STEPS = 3  # a round


def rows(
    folder: pathlib.Path | None,
    batch_sizes: Sequence[int],
    side: int | None,
    dtype: str,
    remat: str,
    rounds: int,
    peers: Sequence[str],
) -> Iterator[Row]:
    """One for each batch size: steps of AdamW on cached latents and contexts, without averages."""
    jax.config.update("jax_enable_compilation_cache", False)
    folder = folder or SHIPPED
    model, devices = load_trainable(folder), Devices("jit")
    side = side or model.default_size[0]
    for batch in batch_sizes:
        run, work = Run(model, devices, side, batch, remat, dtype), batch * devices.count
        first = timing.first_call(run)
        calls: dict[str, Callable[[], Any]] = {"ours": run}
        for name in peers:
            compiled_too = name.endswith("compiled")
            calls[name] = PeerTraining(folder, dtype, compiled_too, run.batch, STEPS)
            calls[name]()
        seconds = timing.in_turn(calls, rounds)
        ours = statistics.median(seconds["ours"]) / STEPS
        found: dict[str, Any] = {
            "batch": batch,
            "pixels": side,
            "dtype": dtype,
            "compile s": first.compiling,
            "images/s": work / ours,
            "steps/s": 1 / ours,
            "TFLOP an image": run.arithmetic / work / 1e12,
            "TFLOP/s a device": run.arithmetic / ours / devices.count / 1e12,
            "MFU": utilisation(devices, run.arithmetic / ours),
            "peak GB": peak_memory(devices, alone=not peers),
            "loss": run.loss,
            "_seconds": seconds,
        }
        for name in peers:
            found[f"{name} images/s"] = work / (statistics.median(seconds[name]) / STEPS)
            found[f"times {name}"] = str(timing.ratio(seconds[name], seconds["ours"]))
        yield found


class Run:
    """Our training; a call is STEPS steps."""

    def __init__(self, model: Model, devices: Devices, side: int, batch: int, remat: str, dtype: str):
        program = outline.training(model, devices, side, batch, remat, dtype)
        assert program.init is not None
        self.arithmetic = compiled.arithmetic(program)
        shapes = program.arguments[2]
        rng = np.random.default_rng(0)
        self.batch = {name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in shapes.items()}
        if "sizes" in self.batch:  # of whole pictures
            self.batch["sizes"][:] = side, side, 0, 0, side, side
        self._step = program.function
        self._state = program.init(devices.place_tree(model.unet.params))
        rows = {name: array.astype(shapes[name].dtype) for name, array in self.batch.items()}
        self._rows = devices.shard_batch(rows)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.arguments[1])
        self._frozen = devices.share(empty)
        self._key = jax.random.key(0, impl="threefry2x32")
        self.loss = float("nan")

    def __call__(self) -> None:
        for _ in range(STEPS):
            self._state, metrics = self._step(self._state, self._frozen, self._rows, self._key)
        self.loss = float(metrics["loss"])  # waits
