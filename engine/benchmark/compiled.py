"""What a compiled program takes: arithmetic, memory, what goes over links; and the time that is at least."""

import dataclasses
import re
from typing import Any

from engine import chips, flops
from engine.benchmark.memory_traffic import arrays, main_memory
from engine.benchmark.outline import Program

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")


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
    moved: int  # bytes of what the collectives give


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
    kinds, moved = collectives(text)
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


def collectives(text: str) -> tuple[dict[str, int], int]:
    """The collectives in a program's text: how many of each kind, and the bytes that they give."""
    found, moved = dict.fromkeys(COLLECTIVES, 0), 0
    for shapes, kind, start in _COLLECTIVE.findall(text):
        found[kind] += 1
        sizes = [array.size for array in arrays(shapes)]
        if start and kind != "all-reduce":  # (what is given, what comes, and numbers of their own)
            sizes = [size for size in sizes if size > 4]
            sizes = sizes[len(sizes) // 2 :]
        moved += sum(sizes)
    return {kind: count for kind, count in found.items() if count}, moved


def arithmetic(program: Program) -> int:
    """FLOP of all devices together, scans included, as the model has them (`engine.flops`)."""
    return flops.count(program.function, *program.arguments)
