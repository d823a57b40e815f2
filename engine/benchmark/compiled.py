"""What a compiled program takes: arithmetic, memory, what goes over links; and the time that is at least."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax

from engine import chips, flops
from engine.benchmark.memory_traffic import arrays, main_memory
from engine.benchmark.outline import Program

# kind -> (bytes that it gives, devices) -> bytes that each of them sends (Thakur et al. 2005, in a ring)
SENT: dict[str, Callable[[int, int], float]] = {
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-gather": lambda size, n: size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(SENT)})(-start)?\((?:.*?channel_id=(\d+))?")
_MEANWHILE = re.compile(r"%(fused_computation|async_collective_fusion)")
_SCATTERS = re.compile(r"%all-reduce-scatter\S* \(")  # how a reduce-scatter begins in a program for TPUs


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device. A scan's body counts once."""

    flops: float  # as the compiler counts them
    accessed: float  # bytes read and written, wherever they lie, as the compiler counts them
    main_memory: int  # bytes of these in main memory, without those of kernels; for TPUs
    temporaries: int  # bytes of memory beside arguments and results
    arguments: int  # bytes
    results: int  # bytes, those that reuse the memory of arguments left out
    collectives: dict[str, int]  # kind -> how many
    moved: int  # bytes that the collectives send from one device to others


def least_seconds(cost: Cost, main_memory: float, chip: chips.Chip) -> dict[str, float]:
    """What arithmetic, memory and links would take alone, at their best.

    The longest is the least that the whole takes (Williams et al. 2009, roofline).
    """
    return {
        "arithmetic": cost.flops / chip.flops,
        "memory": main_memory / chip.bandwidth,
        "links": cost.moved / chip.links if chip.links else 0.0,
    }


def cost(program: Program) -> Cost:
    """Compiles it, for the devices that its arguments are placed on."""
    made = program.function.lower(*program.arguments).compile()
    counted: Any = made.cost_analysis()
    memory, text = made.memory_analysis(), made.as_text()
    kinds, moved = collectives(text, _devices(program))
    return Cost(
        counted["flops"],
        counted["bytes accessed"],
        main_memory(text),
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        kinds,
        moved,
    )


def _devices(program: Program) -> int:
    places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(program.arguments)]
    return max((len(place.device_set) for place in places if place), default=1)


def collectives(text: str, devices: int) -> tuple[dict[str, int], int]:
    """The collectives in a program's text: how many of each kind, and the bytes that each device sends."""
    found, moved, gathers = dict.fromkeys(SENT, 0), 0.0, set()
    scatters = meanwhile = False
    for line in text.splitlines():
        if not line.startswith(" "):  # another computation begins
            scatters, meanwhile = bool(_SCATTERS.match(line)), bool(_MEANWHILE.match(line))
        if not (match := _COLLECTIVE.search(line)):
            continue
        shapes, kind, start, channel = match.groups()
        sizes = [array.size for array in arrays(shapes)]
        if start and kind != "all-reduce":  # (what is given, what comes, and numbers of their own)
            sizes = [size for size in sizes if size > 4]
            sizes = sizes[len(sizes) // 2 :]
        size = sum(sizes)
        if meanwhile and kind == "all-gather":  # as it goes on beside other work, it stands in each
            if channel in gathers:
                continue
            gathers.add(channel)
        if scatters:
            kind, size = "reduce-scatter", size // devices
        found[kind] += 1
        moved += SENT[kind](size, devices)
    return {kind: count for kind, count in found.items() if count}, round(moved)


def arithmetic(program: Program) -> int:
    """FLOP of all devices together, scans included, as the model has them (`engine.flops`)."""
    return flops.count(program.function, *program.arguments)
