"""What compilers for TPUs say of the programs of a model, and the least time that these take."""

import time
from collections.abc import Iterator, Sequence

import jax

from engine import chips
from engine.benchmark import compiled, kernel_traffic, outline, tpu_compiler
from engine.benchmark.report import Row
from engine.config import nearest
from engine.models import merging
from engine.parallel import SPLIT, Devices
from engine.types import UserError

DRAWING = ("text", "unet", "sampler", "decoder", "upscaler")
PARTS = (*DRAWING, "train")
GB, MILLISECOND = 1e9, 1e-3


def rows(
    name: str,
    topology: str,
    batch_sizes: Sequence[int],
    side: int | None,
    parts: Sequence[str],
    remat: str,
    quantize: str = "",
    merge: float = 0.0,
    split: bool = False,
    controlnets: int = 0,
) -> Iterator[Row]:
    """One for each program and batch size, as they are compiled; a training splits its state over the chips.

    Args:
      quantize, merge, controlnets: for drawing, see `outline`.
      split: for drawing: the chips share the model.

    Raises:
      UserError: a name is unknown, or the model cannot do it.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(
                f"parts={part!r} is unknown{nearest(part, PARTS)}; write some of {','.join(PARTS)}"
            )
    if not 0 <= merge <= merging.MOST:
        raise UserError(f"merge_tokens={merge}: write a share of the tokens, from 0 to {merging.MOST}")
    if (quantize or merge or split) and "train" in parts:
        raise UserError("quantize, merge_tokens and split_params are for drawing: leave train out of parts")
    if controlnets and "sampler" not in parts:
        raise UserError(f"controlnets={controlnets} go with the sampler: write it among parts")
    if controlnets < 0:
        raise UserError(f"controlnets={controlnets}: write a number from 0")
    if quantize and split:
        raise UserError(f"quantize={quantize!r} with split_params: leave one of them out")
    model, found = outline.model(name, quantize=quantize), tpu_compiler.chips(topology)
    side = side or model.default_size[0]
    sharing = Devices("jit", found, rules=SPLIT)
    devices = sharing if split else Devices("shard_map", found)
    for batch in batch_sizes:
        drawing = outline.drawing(model, devices, side, batch, merge=merge, controlnets=controlnets)
        for part in parts:
            if part == "train":
                program = outline.training(model, sharing, side, batch, remat)
            elif part == "upscaler":
                program = outline.enlarging(model, devices, side, batch)
            else:
                program = drawing[part]
            beside = {"controlnets": controlnets if part == "sampler" else 0} if controlnets else {}
            yield {"model": name, "pixels": side, **beside, **row(part, batch, program, found[0])}


def row(part: str, batch: int, program: outline.Program, chip: jax.Device) -> Row:
    """Compiles a program. What kernels move is counted here, not as they tell the compiler."""
    if chip.device_kind not in chips.CHIPS:
        raise UserError(f"nothing is known of {chip.device_kind}: add it to engine/chips.py")
    start = time.perf_counter()
    cost = compiled.cost(program)
    seconds = time.perf_counter() - start
    moved, told = kernel_traffic.traffic(program.function, *program.arguments)
    main_memory = cost.main_memory + moved
    least = compiled.least_seconds(cost, main_memory, chips.CHIPS[chip.device_kind])
    limit = max(least, key=least.__getitem__)
    return {
        "program": part,
        "batch a chip": batch,
        "TFLOP": cost.flops / 1e12,
        "GB accessed": (cost.accessed + moved - told) / GB,
        "GB main memory": main_memory / GB,
        "GB temporaries": cost.temporaries / GB,
        "GB arguments": cost.arguments / GB,
        "collectives": " ".join(f"{count} {kind}" for kind, count in cost.collectives.items()) or "none",
        "GB over links": cost.moved / GB,
        **{f"{what} ms": value / MILLISECOND for what, value in least.items()},
        "held by": limit,
        "_chip": chip.device_kind,
        "_compile seconds": seconds,
        "_kernels": moved,
        "_kernels tell": told,
    }
