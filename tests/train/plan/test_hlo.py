"""The reader of compiled programs, on small texts in the forms that the compilers write."""

from fm_jax.train.plan import hlo, roofline

MESH = {"data": 2, "fsdp": 4}

CPU = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], /*index=1*/f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %gathered = f32[32,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %r = (s32[], f32[8,16]{1,0}) tuple(%p)
}

%until (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = (s32[], f32[8,16]{1,0}) while(%x), condition=%until, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  ROOT %all = (bf16[8,16]{1,0}, f32[4]{0}) all-reduce(%x, %y), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}
}
"""

TPU = """HloModule jit_step

%all-reduce-scatter.1 (p: bf16[64,16]) -> bf16[16,16] {
  %p = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[64,16]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}
  ROOT %s = bf16[16,16]{1,0:T(8,128)(2,1)} dynamic-slice(%r), dynamic_slice_sizes={16,16}
}

%begin (p: bf16[4,16]) -> bf16[16,16] {
  %p = bf16[4,16]{1,0} parameter(0)
  %g = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'b'}
  ROOT %c = bf16[16,16]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%end (p: bf16[4,16]) -> bf16[16,16] {
  %p = bf16[4,16]{1,0} parameter(0)
  %g = bf16[16,16]{1,0} all-gather(%p), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'b'}
  ROOT %c = bf16[16,16]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}

%body.1 (p: s32[]) -> s32[] {
  %f = bf16[16,16]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %b = bf16[16,16]{1,0} fusion(%p), kind=kOutput, calls=%begin
  ROOT %e = bf16[16,16]{1,0} fusion(%p), kind=kOutput, calls=%end
}

%until.1 (p: s32[]) -> pred[] {
  %bound = s32[]{:T(128)} constant(4)
  %p = s32[]{:T(128)} parameter(0)
  ROOT %lt = pred[]{:T(512)} compare(%p, %bound), direction=LT
}

%until.2 (p: s32[]) -> pred[] {
  %p = s32[]{:T(128)} parameter(0)
  ROOT %lt = pred[]{:T(512)} compare(%p, %q), direction=LT
}

%body.2 (p: s32[]) -> s32[] {
  ROOT %m = (u8[5]{0}, u8[5]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %l = s32[]{:T(128)} while(%p), condition=%until.1, body=%body.1
  ROOT %k = s32[]{:T(128)} while(%l), condition=%until.2, body=%body.2
}
"""


def test_what_a_loop_holds_counts_for_each_trip() -> None:
    gathered, reduced = hlo.read(CPU).collectives
    assert (gathered.kind, gathered.bytes, gathered.count) == ("all-gather", 32 * 16 * 4, 12)
    assert gathered.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert (reduced.kind, reduced.bytes, reduced.count) == ("all-reduce", 8 * 16 * 2 + 4 * 4, 1)
    assert (reduced.dtype, reduced.shape) == ("bf16", (8, 16))  # the largest of its arrays
    assert hlo.axes(gathered.groups, MESH) == ("fsdp",)
    assert hlo.axes(reduced.groups, MESH) == ("data",)
    assert hlo.axes((), MESH) == ("data", "fsdp")


def test_the_tpus_fusions_are_the_collectives_that_they_stand_for() -> None:
    program = hlo.read(TPU)
    scattered, gathered, moved = program.collectives
    assert (scattered.kind, scattered.bytes, scattered.count) == ("reduce-scatter", 64 * 16 * 2, 4)
    assert (gathered.kind, gathered.bytes, gathered.count) == ("all-gather", 16 * 16 * 2, 4)  # begun, not ended
    assert gathered.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert (moved.kind, moved.bytes, moved.count) == ("collective-permute", 5, 1)
    assert program.unknown_loops == 1


def test_groups_of_a_transposed_iota_are_along_the_other_axis() -> None:
    line = "  ROOT %g = f32[2]{0} reduce-scatter(%p), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add"
    (one,) = hlo.read(f"ENTRY %main (p: f32[4]) -> f32[2] {{\n{line}\n}}\n").collectives
    assert one.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert one.bytes == 2 * 4 * 2  # its operand
    assert hlo.axes(one.groups, MESH) == ("data",)


def test_an_asynchronous_collective_is_as_large_as_the_synchronous_one() -> None:
    """A start gives operands and results; of a scatter the operand is the whole array, of a gather the result."""
    groups = "channel_id=1, replica_groups=[1,4]<=[4], dimensions={1}"
    lines = (
        f"  %a = f32[8,4]{{1,0}} reduce-scatter(%p), {groups}",
        f"  %b = ((f32[8,16]{{1,0}}), f32[8,4]{{1,0}}) reduce-scatter-start(%p), {groups}",
        f"  %c = ((f32[8,4]{{1,0}}, s32[4]{{0}}), (f32[8,16]{{1,0}}, s32[16]{{0}})) all-gather-start(%p), {groups}",
        f"  %d = ((f32[8,16]{{1,0}}), f32[8,16]{{1,0}}) all-to-all-start(%p), {groups}",
        f"  %e = (f32[8,16]{{1,0}}, f32[]) all-reduce-start(%p), {groups}",
    )
    text = "\n".join(["ENTRY %main (p: f32[4]) -> f32[2] {", *lines, "}"])
    held = hlo.read(text).collectives
    assert {one.shape for one in held} == {(8, 16)}
    assert [one.bytes for one in held] == [512, 512, 512 + 64, 512, 512 + 4]


def test_a_part_of_a_named_axis_is_between_what_is_before_and_after_it() -> None:
    line = "  ROOT %g = f32[2]{0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, dimensions={0}"
    (one,) = hlo.read(f"ENTRY %main (p: f32[1]) -> f32[2] {{\n{line}\n}}\n").collectives
    assert one.groups == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_rings_send_what_their_algorithm_says() -> None:
    groups = ((0, 1, 2, 3), (4, 5, 6, 7))
    sent = {kind: hlo.sent(hlo.Collective(kind, 800, groups), 8) for kind in hlo.KINDS}
    assert sent["all-gather"] == sent["reduce-scatter"] == 600
    assert sent["all-reduce"] == 1200
    assert sent["collective-permute"] == 800
    assert hlo.sent(hlo.Collective("all-gather", 800, ()), 8) == 700  # no groups: all devices


def test_traffic_is_added_up_by_kind_and_axes() -> None:
    rows = roofline.traffic(hlo.read(CPU), MESH)
    assert [(row.kind, row.axes, row.count, row.bytes, row.ways) for row in rows] == [
        ("all-gather", ("fsdp",), 12, 12 * 2048, 4),
        ("all-reduce", ("data",), 1, 272, 2),
    ]
    assert rows[0].sent == 12 * 2048 * 3 / 4
    assert rows[1].sent == 272
