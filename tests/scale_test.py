"""benchmarks/hlo.py reads the text of a compiled program."""

from benchmarks import hlo

# A loop of 5 with a branch, in which weights are gathered in three steps that are one collective, and a nested loop of 2.
TEXT = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[1,4,8]) -> (bf16[1,4,8], bf16[1,16,8]) {
  %p = bf16[1,4,8]{2,1,0} parameter(0)
  %all-gather.1 = bf16[1,16,8]{2,1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={1}
  ROOT %c = (bf16[1,4,8], bf16[1,16,8]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p.1: bf16[1,4,8]) -> bf16[1,16,8] {
  %p.1 = bf16[1,4,8]{2,1,0} parameter(0)
  %product = bf16[1,4,8]{2,1,0} convolution(%p.1, %p.1)
  ROOT %all-gather.2 = bf16[1,16,8]{2,1,0} all-gather(%p.1), channel_id=7, dimensions={1}
}

%inner_body (i: (u32[], f32[8])) -> (u32[], f32[8]) {
  %i = (u32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%i), index=1
  %moved = f32[8]{0} collective-permute(%x), channel_id=8, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (u32[], f32[8]) tuple(%x, %moved), backend_config={"window_config":{"estimated_cycles":"10"}}
}

%inner_condition (i.1: (u32[], f32[8])) -> pred[] {
  %i.1 = (u32[], f32[8]) parameter(0)
  %k = u32[] get-tuple-element(%i.1), index=0
  %n = u32[] constant(2)
  ROOT %lt = pred[] compare(%k, %n), direction=LT
}

%skip (s: f32[8]) -> f32[8] {
  %s = f32[8]{0} parameter(0)
  ROOT %s2 = f32[8]{0} broadcast(%s), backend_config={"window_config":{"estimated_cycles":"300"}}
}

%run (r: f32[8]) -> f32[8] {
  %r = bf16[1,4,8]{2,1,0} parameter(0)
  %async = (bf16[1,4,8], bf16[1,16,8]) fusion(%r), kind=kCustom, calls=%start
  %w = bf16[1,16,8]{2,1,0} fusion(%async), kind=kCustom, calls=%done, backend_config={"estimated_cycles":"100"}
  %loop = (u32[], f32[8]) while(%r), condition=%inner_condition, body=%inner_body
  ROOT %y = f32[8]{0} get-tuple-element(%loop), index=1
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]) parameter(0)
  ROOT %z = f32[8]{0} conditional(%q, %q, %q), branch_computations={%skip, %run}
}

%condition (q.1: (s32[], f32[8])) -> pred[] {
  %q.1 = (s32[], f32[8]) parameter(0)
  %count = s32[] get-tuple-element(%q.1), index=0
  %five = s32[]{:T(128)} constant(5), metadata={op_name="a (name)"}
  ROOT %lt.1 = pred[] compare(%q.1, %five), direction=LT
}

ENTRY %main (m: f32[8]) -> f32[] {
  %m = f32[8]{0} parameter(0)
  %layers = (s32[], f32[8]) while(%m), condition=%condition, body=%body
  %start.2 = (f32[8]{0}, f32[32]{0}) all-gather-start(%m), channel_id=9, dimensions={0}
  ROOT %all-reduce = f32[8]{0} all-reduce(%m), channel_id=10, to_apply=%add, backend_config={"estimated_cycles":"1000"}
}
"""


def test_collectives_count_once_and_run_as_often_as_their_loops():
  found = {c.kind: c for c in hlo.collectives(TEXT) if c.shape != 'f32[32]'}
  assert len(hlo.collectives(TEXT)) == 4
  assert found['all-gather'] == hlo.Collective('all-gather', 'bf16[1,16,8]', 128, 5, 2 * (128 - 32))
  assert found['collective-permute'] == hlo.Collective('collective-permute', 'f32[8]', 8, 10, 32)
  assert found['all-reduce'] == hlo.Collective('all-reduce', 'f32[8]', 8, 1, 64)
  assert [c for c in hlo.collectives(TEXT) if c.shape == 'f32[32]'][0] == hlo.Collective(
    'all-gather', 'f32[32]', 32, 1, 4 * (32 - 8)
  )


def test_cycles_are_those_of_the_branch_with_products_as_often_as_it_runs():
  assert hlo.cycles(TEXT) == 1000 + 5 * (100 + 2 * 10)


def test_kernels_count_causal_blocks_of_their_queries():
  call = (
    '  %splash_mha_dq_no_residuals.1 = (f32[512,128]{1,0}, bf16[2,4,1024,128]{3,2,1,0}) custom-call(%r), '
    'custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2,2]{2,1,0}, bf16[2,4,1024,128]{3,2,1,0}, '
    'bf16[2,1,1024,128]{3,2,1,0}}\n'
  )
  text = TEXT.replace('  %loop = (u32[], f32[8]) while(%r)', call + '  %loop = (u32[], f32[8]) while(%r)')
  assert hlo.kernel_flops(TEXT) == 0
  # Two blocks of 512: a query of the first sees one, a query of the second two. The loop runs the layer 5 times.
  assert hlo.kernel_flops(text) == 5 * 3 * 2 * (2 * 4 * 128) * (512 * 512 + 512 * 1024)


def test_an_unrolled_loop_runs_as_often_as_its_counter_is_below_the_limit():
  """The compiler unrolls rings of products by two: their counter then grows by two, in one step or in several."""
  ring = TEXT.replace('constant(2)', 'constant(8)')
  body = '  ROOT %t = (u32[], f32[8]) tuple(%x, %moved), backend_config={"window_config":{"estimated_cycles":"10"}}\n'
  assert body in ring

  def permutes(advance: str) -> int:
    text = ring.replace(body, advance + body.replace('tuple(%x, %moved)', 'tuple(%next, %moved)'))
    return next(c.runs for c in hlo.collectives(text) if c.kind == 'collective-permute')

  one, two = '  %one = u32[] constant(1)\n', '  %two = u32[] constant(2)\n'
  count = '  %k.1 = u32[] get-tuple-element(%i), index=0\n'
  assert permutes(count + one + '  %next = u32[] add(%k.1, %one)\n') == 5 * 8
  assert permutes(count + two + '  %next = u32[] add(%k.1, %two)\n') == 5 * 4
  twice = '  %next.1 = u32[] add(%k.1, %one)\n  %next = u32[] add(%one, %next.1)\n'
  assert permutes(count + one + twice) == 5 * 4
