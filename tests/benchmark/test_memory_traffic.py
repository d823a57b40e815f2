"""Programs as the compiler for TPUs writes them, small enough to count by hand."""

import pytest

from engine.benchmark.compiled import collectives
from engine.benchmark.memory_traffic import main_memory

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_computation (param_0: bf16[8,128]) -> bf16[8,128] {
  %param_0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %twice = bf16[8,128]{1,0} add(%param_0, %param_0)
}

%body (at: (s32[], f32[64])) -> (s32[], f32[64]) {
  %at = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%at), index=0
  %x = f32[64]{0} get-tuple-element(%at), index=1
  %near = f32[64]{0:S(1)} fusion(%x), kind=kLoop, calls=%fused_computation
  %far = f32[64]{0} fusion(%near), kind=kLoop, calls=%fused_computation
  ROOT %next = (s32[], f32[64]{0}) tuple(%i, %far)
}

%condition (at: (s32[], f32[64])) -> pred[] {
  %at.1 = (s32[], f32[64]{0}) parameter(0)
  ROOT %more = pred[]{:S(1)} constant(true)
}

ENTRY %main (a: bf16[8,128], b: f32[64]) -> f32[64] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %copy-start = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %slice-start = ((bf16[8,128]{1,0}), bf16[4,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a)
  %slice-done = bf16[4,128]{1,0:S(1)} slice-done(%slice-start)
  %kernel = bf16[8,128]{1,0} custom-call(%a, %a), custom_call_target="tpu_custom_call"
  %fusion = bf16[8,128]{1,0:S(1)} fusion(%copy-done, %a), kind=kLoop, calls=%fused_computation
  %zero = s32[] constant(0)
  %init = (s32[], f32[64]{0}) tuple(%zero, %b)
  %loop = (s32[], f32[64]{0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[64]{0} get-tuple-element(%loop), index=1
}
"""


def test_what_lies_in_fast_memory_and_kernels_do_not_count():
    copied, sliced, fused = 8 * 128 * 2, 4 * 128 * 2, 8 * 128 * 2
    loop = 2 * 64 * 4  # once, whatever its length
    assert main_memory(PROGRAM) == copied + sliced + fused + loop


GATHER = """
ENTRY %main (x: bf16[4,128]) -> bf16[32,128] {
  %x = bf16[4,128]{1,0} parameter(0)
  %y = bf16[8,128]{1,0} parameter(1)
  %async-collective-start.1 = (bf16[4,128]{1,0}, bf16[32,128]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused.1
  %shard = bf16[4,128]{1,0} get-tuple-element(%async-collective-start.1), index=0
  %whole = bf16[32,128]{1,0} get-tuple-element(%async-collective-start.1), index=1
  %fusion.2 = (bf16[8,128]{1,0}, bf16[4,128]{1,0}, bf16[32,128]{1,0}) fusion(%shard, %whole, %y), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%async_collective_fusion.2
  %other = bf16[4,128]{1,0} get-tuple-element(%fusion.2), index=1
  %more = bf16[32,128]{1,0} get-tuple-element(%fusion.2), index=2
  ROOT %async-collective-done.1 = bf16[32,128]{1,0} fusion(%more), kind=kCustom, output_to_operand_aliasing={{}: (0, {})}, calls=%fused.3
}
"""  # noqa: E501


def test_a_gather_beside_other_work_counts_once():
    gathered, beside = 32 * 128 * 2, 2 * 8 * 128 * 2  # written; read and written
    assert main_memory(GATHER) == gathered + beside


def test_text_of_another_kind_is_no_program():
    with pytest.raises(AssertionError):
        main_memory("module @jit_f {}")


COLLECTIVES = """
%all-reduce-scatter.fused (input: bf16[16,8]) -> bf16[4,8] {
  %all-reduce.1 = bf16[16,8]{1,0} all-reduce(%input), channel_id=4, to_apply=%add
}

%fused_computation.1 (x: f32[8,8]) -> f32[32,8] {
  %all-gather = f32[32,8]{1,0} all-gather(%x), channel_id=5, dimensions={0}
}

%async_collective_fusion.2 (x: f32[8,8]) -> f32[32,8] {
  %all-gather = f32[32,8]{1,0} all-gather(%x), channel_id=5, dimensions={0}
}

ENTRY %main {
  %all-gather-start = (f32[8,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%x), channel_id=1, dimensions={0}
  %all-gather-done = f32[32,8]{1,0} all-gather-done(%all-gather-start)
  %reduce-scatter = bf16[4,8]{1,0} reduce-scatter(%y), to_apply=%add
  %all-reduce = f32[]{:T(128)} all-reduce(%z), channel_id=2, to_apply=%add
  %permute = f32[4]{0} collective-permute(%z), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %fusion = bf16[4,8]{1,0} fusion(%all-reduce), calls=%all-reduce-scatter.fused
}
"""


def test_collectives_are_counted_with_what_each_of_four_devices_sends():
    kinds, moved = collectives(COLLECTIVES, 4)
    assert kinds == {"all-reduce": 1, "all-gather": 2, "reduce-scatter": 2, "collective-permute": 1}
    gathered, scattered, summed, permuted = 32 * 8 * 4 * 3 / 4, 4 * 8 * 2 * 3, 2 * 4 * 3 / 4, 16
    assert moved == 2 * gathered + 2 * scattered + summed + permuted
