import jax
import jax.numpy as jnp
import pytest

from engine.benchmark.kernel_traffic import traffic
from engine.models import kernels


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, jnp.bfloat16)


@pytest.mark.parametrize(("T", "S"), [(4096, 4096), (4096, 512)])
def test_keys_are_fetched_for_each_block_of_queries(T, S):
    q, k = shape(2, 3, T, 128), shape(2, 3, S, 128)
    sizes = kernels.block_sizes(T, S, narrow=True)
    moved, told = traffic(kernels._flash, q, k, k)
    head = 128 * 2
    blocks = T // sizes.block_q if sizes.block_k < S else 1
    assert moved == 2 * 3 * (2 * T + 2 * S * blocks) * head
    assert told == 2 * 3 * (2 * T + 2 * S) * head


def test_blocks_come_in_whole_tiles():
    wide, narrow = shape(2, 3, 2048, 128), shape(2, 3, 2048, 40)
    assert traffic(kernels._flash, *[narrow] * 3)[0] == traffic(kernels._flash, *[wide] * 3)[0]


def test_a_scan_counts_once_and_a_program_without_kernels_not_at_all():
    q = shape(1, 1, 1024, 128)

    def again(q):
        return jax.lax.scan(lambda x, _: (kernels._flash(x, q, q), None), q, length=5)[0]

    assert traffic(again, q) == traffic(kernels._flash, q, q, q)
    assert traffic(jnp.sin, q) == (0, 0)
