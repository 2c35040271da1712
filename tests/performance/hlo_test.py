"""What is read of a compiled program's text."""

import jax
import jax.numpy as jnp
import pytest

from tensorar_jax.performance import hlo

# Four layers of a scan, as TPU compilers print it: the length of the loop is a
# constant of its condition, S(1) is vector memory. Two more turns around it.
TEXT = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %add.1 = f32[] add(%a, %a)
}

%inner (p: bf16[4,8,8], i: s32[]) -> bf16[1,8,8] {
  %p = bf16[4,8,8]{BF16} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice = bf16[1,8,8]{CHIP} dynamic-slice(%p, %i)
}

%slicing (q: bf16[4,8,8], j: s32[]) -> bf16[1,8,8] {
  %q = bf16[4,8,8]{BF16} parameter(0)
  %j = s32[] parameter(1)
  ROOT %nested = bf16[1,8,8]{CHIP} fusion(%q, %j), kind=kLoop, calls=%inner
}

%update (cache: f32[4,16], row: f32[1,16], k: s32[]) -> f32[4,16] {
  %cache = f32[4,16]{F32} parameter(0)
  %row = f32[1,16]{F32} parameter(1)
  %k = s32[] parameter(2)
  ROOT %dus = f32[4,16]{F32} dynamic-update-slice(%cache, %row, %k)
}

%body (t: STATE) -> STATE {
  %t = (s32[]{:T(128)}, bf16[4,8,8]{BF16}, f32[4,16], f32[1,16]) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %w = bf16[4,8,8]{BF16} get-tuple-element(%t), index=1
  %c = f32[4,16]{F32} get-tuple-element(%t), index=2
  %r = f32[1,16]{F32} get-tuple-element(%t), index=3
  %layer = bf16[1,8,8]{CHIP} fusion(%w, %n), kind=kLoop, calls=%slicing
  %whole = bf16[8,8,8]{CHIP} all-gather(%layer), GROUPS, dimensions={0}
  %new = f32[4,16]{F32} fusion(%c, %r, %n), kind=kLoop, calls=%update
  COPY
  ROOT %out = STATE tuple(%n, %w, %new, %r)
}

%condition (u: STATE) -> pred[] {
  %u = STATE parameter(0)
  %m = s32[] get-tuple-element(%u), index=0
  %four = s32[]{:T(128)} constant(4)
  ROOT %less = pred[] compare(%m, %four), direction=LT
}

%outer (v: STATE) -> STATE {
  %v = STATE parameter(0)
  ROOT %layers = STATE while(%v), condition=%condition, body=%body
}

ENTRY %main (x: STATE) -> f32[32] {
  %x = STATE parameter(0)
  %y = f32[32]{0} constant({...})
  %turns = STATE while(%x), condition=%any, body=%outer, TWICE
  %start = f32[32]{0} all-reduce-start(%y), FOUR, to_apply=%add
  ROOT %done = f32[32]{0} all-reduce-done(%start)
}
"""
for short, long in {
  "STATE": "(s32[], bf16[4,8,8]{BF16}, /*index=2*/f32[4,16], f32[1,16]{F32})",
  "CHIP": "2,1,0:T(8,128)(2,1)S(1)",
  "BF16": "2,1,0:T(8,128)(2,1)",
  "F32": "1,0:T(8,128)",
  "GROUPS": "replica_groups=mesh['a'=2,'b'=8] {'b'}",
  "FOUR": "replica_groups={{0,1,2,3},{4,5,6,7}}",
  "TWICE": 'backend_config={"known_trip_count":{"n":"2"}}',
}.items():
  TEXT = TEXT.replace(short, long)


def test_collectives_count_as_often_as_they_run():
  rows = hlo.collectives(hlo.parse(TEXT.replace("COPY", "")), devices=16)
  gathered = 8 * 8 * 8 * 2 * 7 // 8  # of eight parts a device sends seven
  reduced = 32 * 4 * 2 * 3 // 4  # there and back
  assert rows == [
    dict(kind="all-gather", dtype="bf16", count=8, bytes=8 * gathered),
    dict(kind="all-reduce", dtype="f32", count=1, bytes=reduced),
  ]


def test_a_collective_behind_other_work_counts_once():
  """On TPUs its start, what runs meanwhile and its end all show it."""
  fusion = lambda name, calls: (
    f"  %{name} = f32[64] fusion(%y), kind=kCustom, calls=%{calls}"
  )
  holder = """
%NAME (q: f32[32]) -> f32[64] {
  %q = f32[32] parameter(0)
  ROOT %g = f32[64] all-gather(%q), replica_groups={{0,1}}, dimensions={0}
}
"""
  names = {
    "async-collective-start.1": "fused_computation.1",
    "fusion.7": "async_collective_fusion.7",
    "async-collective-done.1": "fused_computation.2",
  }
  lines = "\n".join(fusion(*pair) for pair in names.items())
  text = "".join(holder.replace("NAME", name) for name in names.values())
  text += f"""
ENTRY %main (y: f32[32]) -> f32[64] {{
  %y = f32[32] parameter(0)
{lines}
}}
"""
  rows = hlo.collectives(hlo.parse(text), devices=2)
  assert rows == [dict(kind="all-gather", dtype="f32", count=1, bytes=128)]


@pytest.mark.parametrize(
  "groups, size",
  [
    ("replica_groups={{0,1,2},{3,4,5}}", 3),
    ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", 4),
    ("replica_groups=mesh['a'=2,'b'=4,'c'=3] {'a','c'}", 6),
    ("replica_groups={}", 8),
  ],
)
def test_the_notations_of_replica_groups(groups, size):
  assert hlo.group_size(f"), {groups}, dimensions={{0}}", devices=8) == size


@pytest.mark.parametrize(
  "copy, count",
  [
    ("", 0),
    ("%z = f32[4,16]{1,0:T(8,128)} copy(%c)", 1),
    ("%z = (f32[4,16]{1,0}, f32[4,16]{1,0}, u32[]) copy-start(%c)", 1),
    ("%z = f32[1,16]{1,0:T(8,128)} copy(%r)", 0),
  ],
)
def test_a_copy_of_the_cache_in_the_loop_is_found(copy, count):
  program = hlo.parse(TEXT.replace("COPY", copy))
  assert hlo.copies_in_loops(program, {4 * 16}) == count


UPDATE = "dynamic-update-slice(%cache, %row, %k)"


@pytest.mark.parametrize("update", [UPDATE, "scatter(%cache, %k, %row)"])
def test_slices_and_updates_in_place_move_what_they_touch(update):
  """A layer's weights, an index and a row read, and a row written."""
  program = hlo.parse(TEXT.replace("COPY", "").replace(UPDATE, update))
  turn = 8 * 8 * 2 + 4 + (16 + 16) * 4 + 4
  reduced = 2 * 32 * 4
  assert hlo.bytes_moved(program) == 8 * turn + reduced


def test_a_loop_of_unknown_length_is_named():
  text = TEXT.replace("constant(4)", "parameter(1)").replace("COPY", "")
  runs, unknown = hlo.parse(text).runs()
  assert runs["body"] == 2 and unknown == {"layers"}


def test_this_jax_prints_what_is_read():
  """The length of a scan, from the text of the compiler that is here."""

  def layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((3, 7), (5, 7, 7))]
  program = hlo.parse(jax.jit(layers).lower(*shapes).compile().as_text())
  runs, unknown = program.runs()
  assert 5 in runs.values() and not unknown
  weights = 5 * 7 * 7 * 4
  assert weights <= hlo.bytes_moved(program) < 6 * weights


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("module @jit_f {}")
