"""What accelerators can do at best, from their makers' data sheets."""

from typing import NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
    flops: float  # FLOP/s in bfloat16, dense operands
    bandwidth: float  # bytes/s of its memory
    memory: int  # bytes
    links: float = 0.0  # bytes/s to other chips, all links in one direction together


CHIPS = {  # by device_kind
    "TPU v4": Chip(275e12, 1228e9, 32 * GIB, 300e9),
    "TPU v5 lite": Chip(197e12, 819e9, 16 * GIB, 200e9),
    "TPU v5p": Chip(459e12, 2765e9, 95 * GIB, 600e9),
    "TPU v5": Chip(459e12, 2765e9, 95 * GIB, 600e9),
    "TPU v6 lite": Chip(918e12, 1640e9, 32 * GIB, 448e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 1555e9, 40 * GIB, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2039e9, 80 * GIB, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3350e9, 80 * GIB, 450e9),
    "NVIDIA H200": Chip(989e12, 4800e9, 141 * GIB, 450e9),
}


def peak(device: jax.Device) -> float | None:
    """FLOP/s of a device at best; None for one that is not in the table, CPUs above all."""
    chip = CHIPS.get(device.device_kind)
    return chip.flops if chip else None
