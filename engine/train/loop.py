"""The loop around the steps: progress, checkpoints, and a way out that loses nothing."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

from engine.config import StageConfig
from engine.models.kernels import kernels
from engine.parallel import SPLIT, Devices
from engine.train import ema
from engine.train import step as steps
from engine.train.checkpoint import Checkpoints
from engine.train.data import BatchAt, batches
from engine.train.progress import Progress, arithmetic
from engine.types import Params, UserError


class Watch(NamedTuple):
    """Something to draw with the averaged params now and then."""

    every: int  # steps; 0: never
    call: Callable[[int, Params], pathlib.Path]  # (steps done, params) -> the picture


class Program(NamedTuple):
    """A training step for the devices at hand."""

    devices: Devices
    init: Callable[[Params], steps.TrainState]
    step: Callable[..., tuple[steps.TrainState, steps.Metrics]]  # gives back the memory of its state


def program(
    name: str,
    loss: steps.Loss,
    params: Params,
    optimizer: optax.GradientTransformation,
    config: StageConfig,
    chips: Sequence[jax.Device] | None = None,
    around: steps.Around = steps.itself,
) -> Program:
    """Builds the step; compiles nothing. With config.shard_params each device keeps a part of the state.

    Args:
      chips: the devices to work on; None: all that there are.
      around: see `train_step`.
    """
    # Mode jit: the compiler adds the sum of the gradients over the devices.
    rules = SPLIT if config.shard_params else None
    devices = Devices("jit", chips, rules, all_hosts=jax.process_count() > 1)
    _check_batch(name, config, devices.count)
    init = functools.partial(steps.init, optimizer=optimizer, config=config)
    places = devices.shardings(jax.eval_shape(init, params))

    def on_devices(params: Params, frozen: Any, batch: steps.Batch, key: Any) -> Any:
        # These are of the dtype that is computed in: of half precision, half as much travels.
        params, frozen = (devices.whole(each, parts=devices.shardings(each)) for each in (params, frozen))
        with kernels(devices.platform, devices.over_batch):
            return loss(params, frozen, batch, key)

    step = steps.train_step(on_devices, optimizer, config, around)
    return Program(
        devices,
        jax.jit(init, out_shardings=places),
        jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(places, devices.whole_sharding),
            compiler_options=devices.compiler_options,
        ),
    )


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, so that the loop can save before it ends."""
    stop = threading.Event()
    previous = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def placed(tree: Any, shardings: Any) -> Any:
    """Arrays or their shapes as shapes that know where they lie; `shardings`: a tree of shapes -> where."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings(shapes)
    )


def fit(
    name: str,
    loss: steps.Loss,
    params: Params,
    frozen: Any,
    optimizer: optax.GradientTransformation,
    config: StageConfig,
    *,
    seed: int,
    batch_at: BatchAt,
    workdir: pathlib.Path,
    watch: Watch | None = None,
    around: steps.Around = steps.itself,
) -> Params | None:
    """Trains `params` to the end of the stage, from its newest checkpoint if there is one.

    Where several processes have met (`engine.parallel.meet`), they train together: each calls this with the
    same arguments but for its data.

    Args:
      batch_at: the data, see `engine.train.data`; of several processes, the part of the batch that is this
        one's.
      around: see `train_step`.

    Returns:
      The averaged params, or None when a signal stopped the run (the checkpoint is then saved).
    """
    devices, init, step = program(name, loss, params, optimizer, config, around=around)
    base_key = jax.random.key(seed, impl="threefry2x32")
    with Checkpoints(workdir / name, config.keep_last, config.keep_best) as checkpoints:
        # A fresh state beside the one that is read would be twice the memory that the run began with.
        state = checkpoints.restore(placed(jax.eval_shape(init, params), devices.shardings))
        if state is None:
            state = init(devices.place_tree(params))
        elif devices.leads:
            print(f"{name}: goes on from step {int(state.step)}", flush=True)
        frozen = devices.place_tree(frozen)
        first = int(state.step)
        if first < config.steps:
            progress = Progress(name, workdir, first, config, None, devices.leads)
            run = _Run(name, config, seed, devices, workdir, checkpoints, progress, watch)
            with (
                stop_signals() as stop,
                contextlib.closing(progress),
                contextlib.closing(batches(batch_at, first)) as data,
            ):
                own = map(devices.shard_own, data)
                head = next(own)
                # Traced here, and with a batch that lies where it will, the step is not traced again.
                progress.arithmetic = arithmetic(step, devices.devices, state, frozen, head, base_key)
                rest = itertools.chain([head], own)
                ended = run.to_end(state, lambda state: step(state, frozen, next(rest), base_key), stop)
            if ended is None:
                return None
            state = ended
            if devices.leads:
                from engine.train.plot import loss_plot  # matplotlib takes a second to import

                loss_plot(workdir, name)
    return on_this_host(devices, state.ema_params[ema.chosen(config)])


@dataclasses.dataclass
class _Run:
    """What happens around the steps of a stage."""

    name: str
    config: StageConfig
    seed: int
    devices: Devices
    workdir: pathlib.Path
    checkpoints: Checkpoints
    progress: Progress
    watch: Watch | None

    def to_end(
        self,
        state: steps.TrainState,
        step: Callable[[steps.TrainState], tuple[steps.TrainState, steps.Metrics]],
        stop: threading.Event,
    ) -> steps.TrainState | None:
        """The state after the last step; None when `stop` was set, and the state is saved."""
        config, before, stopped = self.config, None, Stopped(self.devices, stop)
        for done in range(int(state.step) + 1, config.steps + 1):
            state, metrics = step(state)
            last = done == config.steps
            # One step may be under way while the next is prepared, not dozens: a signal waits for them.
            if before is not None:
                self._completed(done - 1, before)
            before = metrics
            if last:
                self._completed(done, metrics)
            self.progress.report(done, metrics, force=last)
            if config.ema_snapshot_every and (last or done % config.ema_snapshot_every == 0):
                self._keep_averages(done, state)
            stopping = stopped(last)
            if last or stopping or (done % config.checkpoint_every == 0 and _is_sound(metrics)):
                self._save(done, state)
            if self.watch and self.watch.every and (last or done % self.watch.every == 0):
                with self._kept_whatever_happens(done, state):
                    self._show(done, state, self.watch)
            if stopping:
                if self.devices.leads:
                    print(
                        f"{self.name}: stopped and saved at step {done}; the same command goes on",
                        flush=True,
                    )
                return None
        return state

    @contextlib.contextmanager
    def _kept_whatever_happens(self, done: int, state: steps.TrainState) -> Iterator[None]:
        """Steps are not lost with a picture that cannot be drawn, but where other hosts would wait."""
        try:
            yield
        except Exception:
            if self.devices.alone:
                self._save(done, state)
            raise

    def _save(self, done: int, state: steps.TrainState) -> None:
        self.checkpoints.save(state, {"seed": self.seed, "data": {"next": done * self.config.batch_size}})

    def _completed(self, step: int, metrics: steps.Metrics) -> None:
        _check_skipped(self.name, step, metrics, self.config)
        self.progress.add(step, metrics)

    def _keep_averages(self, done: int, state: steps.TrainState) -> None:
        kept = map(ema.power_name, self.config.ema_sigma_rel)
        averages = {name: on_this_host(self.devices, state.ema_params[name]) for name in kept}
        if self.devices.leads:
            ema.save_snapshots(self.workdir / self.name / "ema", done, averages, self.config)

    def _show(self, done: int, state: steps.TrainState, watch: Watch) -> None:
        params = on_this_host(self.devices, state.ema_params[ema.chosen(self.config)])
        if self.devices.leads:
            self.progress.picture(done, watch.call(done, params))


class Stopped:
    """Whether the run is to stop: a signal to any host stops all, at the same step.

    Several hosts ask at each step and read the answer at the next, when their devices have it: nobody waits
    for devices that are at work.
    """

    def __init__(self, devices: Devices, stop: threading.Event):
        self._devices, self._stop = devices, stop
        self._before: Any = False

    def __call__(self, last: bool) -> bool:
        """To be called after each step. Waits for the last one: no other would tell of its signal."""
        now = self._devices.ask(self._stop.is_set())
        answer, self._before = now if last or self._devices.alone else self._before, now
        return bool(answer)


def on_this_host(devices: Devices, params: Params) -> Params:
    """Params that this host can read by itself. Where there are several, all must ask."""
    return params if devices.alone else devices.fetch(params)


def _check_batch(name: str, config: StageConfig, devices: int) -> None:
    if config.batch_size % (devices * config.accumulate):
        parts = f" times accumulate={config.accumulate}" if config.accumulate > 1 else ""
        raise UserError(
            f"{name}.batch_size={config.batch_size}: write a multiple of the {devices} devices here{parts}"
        )


def _is_sound(metrics: steps.Metrics) -> bool:
    """Whether the last step's gradients were finite. Waits for them."""
    return int(metrics["skipped_in_a_row"]) == 0


def _check_skipped(name: str, step: int, metrics: steps.Metrics, config: StageConfig) -> None:
    """Waits for the step; UserError if it was the last straw. The newest checkpoint is from before them."""
    if (skipped := int(metrics["skipped_in_a_row"])) < config.max_skipped:
        return
    raise UserError(
        f"{name}: stopped at step {step}, where the gradients were not finite for the {skipped}. time in a "
        f"row; the checkpoint from before stays: try a lower {name}.optim.learning_rate, a longer "
        f"warmup_steps, or compute_dtype=float32"
    )
