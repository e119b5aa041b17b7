"""The registry is sound: names tell cases apart, and every target can be judged."""

import pytest

from benchmarks.cases import CASES, GROUPS, Case, find, select
from benchmarks.floor import ITEM_BYTES, TENSORS
from benchmarks.operators import OPTIONS
from benchmarks.peers import PEERS

EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(find(case.name) is case for case in CASES)


def test_groups():
    assert GROUPS == ("large", "middle", "vit", "host", "options", "sweep")


@EACH
def test_fields_are_known(case):
    assert case.operator in ("linear_attn", "simple_la")
    assert case.layout in ("token_major", "head_major")
    assert case.dtype in ITEM_BYTES
    assert case.method in ("events", "graph", "host")
    assert case.option is None or case.option in OPTIONS
    assert set(case.passes) <= set(TENSORS)
    assert set(case.peers) <= set(PEERS)


@EACH
def test_targets_refer_to_what_is_measured(case):
    assert set(case.targets) <= set(case.passes)
    for target in case.targets.values():
        measured = {None, *case.peers}
        measured |= {"floor"} if case.method != "host" else set()
        measured |= {"plain"} if case.option else set()
        assert target.reference in measured
        assert target.factor > 0 or target.plus_ms > 0


@EACH
def test_only_the_sweep_has_no_target(case):
    assert bool(case.targets) == (case.group != "sweep")


def test_large_covers_dtypes_and_layouts():
    ways = {(case.dtype, case.layout) for case in select(["large"])}
    assert len(ways) == 4
    for shape in {case.shape for case in select(["large"])}:
        found = select(["large"], f"/linear_attn/{shape}/")
        assert {(case.dtype, case.layout) for case in found} == ways


def test_head_dims_of_the_sweep_move_about_equal_bytes():
    sizes = [case.N * case.D for case in select(["sweep"]) if case.axis == "D"]
    assert max(sizes) / min(sizes) < 1.02


def test_select():
    assert select() == list(CASES)
    assert {case.group for case in select(["vit", "host"])} == {"vit", "host"}
    assert [case.D for case in select(["large"], "262144x8x40")] == [40] * 4
    assert select(["vit"], "no such name") == []


def test_plain_call_of_an_option():
    (fused,) = select(["options"], "feature_map")
    assert (fused.plain().feature_map, fused.plain().option) == (None, None)
    (rotary,) = select(["options"], "rotary")
    assert (rotary.plain().feature_map, rotary.plain().option) == ("elu1", None)


def test_keys():
    assert Case("middle", 2, 4096, 10, 64).keys == 4096
    cross = Case("middle", 2, 4096, 10, 64, M=77)
    assert cross.keys == 77
    assert "M77" in cross.name


def test_peers_that_targets_need():
    assert all(case.target_peers == ("sdpa",) for case in select(["vit"]))
    assert all(case.target_peers == () for case in select(["large"]))
