"""What a compiled TPU program moves to and from the chip's main memory, read from its text.

The compiler's own count of bytes has all that instructions read and write, wherever it lies; but much lies in
the chip's fast memory, where a layout says S(1), and what is fetched into it ahead of time counts twice.
"""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_NAME = re.compile(r"%([\w.\-]+)")
FAST = re.compile(r"S\([1-9]\)")
# Move nothing, or what their start has moved.
FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "after-all")
# Parts of a collective that goes on beside other work, and what of it they hand on where it lies.
_MEANWHILE = re.compile(r"^\s+(?:ROOT )?%async-collective|calls=%async_collective_fusion")
_HANDED_ON = re.compile(r"\{(\d*)\}: \((\d+), ")
STARTS = ("copy-start", "slice-start", "async-start")  # of what is moved while others are at work
KERNEL = "tpu_custom_call"  # counted apart: `engine.benchmark.kernel_traffic`


class Array(NamedTuple):
    size: int  # bytes
    fast: bool  # whether it lies in the fast memory


def main_memory(text: str) -> int:
    """Bytes read from and written to the main memory, kernels left out; a loop's body counts once."""
    computations = dict(_computations(text))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    assert entry, "no program of XLA"
    total, waiting, seen = 0, [entry[1]], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        lines = computations[name]
        total += _moved(lines)
        for line in lines:
            for single, several in _CALLED.findall(line):
                waiting += [single] if single else _NAME.findall(several)
    return total


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    lines: list[str] = []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            lines = []
            yield found[1], lines
        else:
            lines.append(line)


def _moved(lines: list[str]) -> int:
    places: dict[str, list[Array]] = {}
    total = 0
    for line in lines:
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name, shapes, kind, rest = found.groups()
        places[name] = arrays(shapes)
        if kind in FREE or kind.endswith("-done") or KERNEL in line:
            continue
        results = places[name]
        operands = [places.get(other, []) for other in _NAME.findall(rest.split("), ")[0])]
        if kind in STARTS:
            to, origin = _destination(kind, shapes), operands[0] if operands else []
            total += to.size * (2 if not to.fast and origin and not origin[0].fast else 1)
            continue
        if _MEANWHILE.search(line):
            kept = [(int(result or 0), int(operand)) for result, operand in _HANDED_ON.findall(line)]
            results = [a for i, a in enumerate(results) if i not in {result for result, _ in kept}]
            operands = [each for i, each in enumerate(operands) if i not in {operand for _, operand in kept}]
        total += sum(a.size for a in itertools.chain(results, *operands) if not a.fast)
    return total


def _destination(kind: str, shapes: str) -> Array:
    """copy-start gives (to, from, context), the others ((from, ...), to, context)."""
    return arrays(shapes if kind == "copy-start" else shapes[shapes.index(")") :])[0]


def arrays(shapes: str) -> list[Array]:
    """bf16[8,64]{1,0:T(8,128)S(1)} and tuples of such."""
    return [
        Array(
            math.prod(map(int, filter(None, axes.split(",")))) * max(int(bits or 8) // 8, 1),
            bool(FAST.search(how)),
        )
        for _, bits, axes, how in _ARRAY.findall(shapes)
    ]
