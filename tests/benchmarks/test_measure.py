"""A record holds the times beside floor, peers and targets; what cannot be measured says why."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from stand_ins import FakeTimer

import fbila
from benchmarks import measure as module
from benchmarks import operators
from benchmarks.cases import CASES, Case, select
from benchmarks.eager import eager
from benchmarks.floor import pass_bytes
from benchmarks.measure import measure
from benchmarks.operators import make_inputs, make_operator
from benchmarks.peers import PEERS, Absent
from benchmarks.report import lines, summary
from benchmarks.targets import Target

FLASH_BLA = "flash_bla.ops.linear_attn.fused"


@pytest.fixture
def no_flash_bla(monkeypatch):
    monkeypatch.setitem(sys.modules, FLASH_BLA, None)


def test_record(small, timer):
    record = measure(small, timer, ())
    assert record["status"] == "measured"
    assert record["case"]["N"] == small.N
    assert set(record["errors"]) == {"o", "dq", "dk", "dv"}
    forward = record["passes"]["forward"]
    floor = pass_bytes(small, "forward") / 1e9 * 1e3
    assert (forward["ms"], forward["ms_20"], forward["ms_80"]) == (1.0, 0.9, 1.1)
    assert forward["floor_ms"] == pytest.approx(floor)
    assert forward["floor_fraction"] == pytest.approx(floor)
    assert forward["gb_per_s"] == pytest.approx(floor)
    assert forward["over"] == pytest.approx(0.9 / floor - 1)
    assert forward["peak_bytes"] == 4096
    assert "over" not in record["passes"]["backward"]


def test_calls_rotate_over_sets(small, timer):
    measure(small, timer, ())
    assert timer.calls == 2 * len(small.passes)


def test_graph_cases_have_a_copy_of_their_size(small, timer):
    record = measure(replace(small, method="graph"), timer, ())
    assert record["passes"]["forward"]["copy_ms"] == 0.5


def test_host_cases_have_no_floor(registry, timer):
    record = measure(registry[-1], timer, ())
    assert record["status"] == "measured"
    assert "floor_ms" not in record["passes"]["forward"]
    assert record["passes"]["forward"]["over"] == pytest.approx(1.0)


def test_peers(small, timer):
    record = measure(small, timer, ("eager", "sdpa"))
    peers = record["passes"]["backward"]["peers"]
    assert peers["eager"]["ms"] == 1.0
    # Whatever backends this machine has, PyTorch's own is one of them.
    assert peers["sdpa"]["way"] in ("flash", "math", "efficient", "cudnn")


def test_compiled_peer_runs_backward_repeatedly(small):
    (function,) = PEERS["compiled"](small).values()
    q, k, v, do = make_inputs(small, "cpu")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = function(*leaves)
    first, second = (torch.autograd.grad(o, leaves, do, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second)
    assert_close_to_fbila(o, small, leaves)


def assert_close_to_fbila(o, case, leaves):
    torch.testing.assert_close(o, make_operator(case, "cpu")(*leaves), rtol=1e-4, atol=1e-5)


def test_absent_peer_is_no_error(small, timer, no_flash_bla):
    record = measure(small, timer, ("flash_bla",))
    assert record["status"] == "measured"
    assert "flash_bla" in record["passes"]["forward"]["peers"]["flash_bla"]["absent"]


class TestFlashBla:
    """On a stand-in: its functions take features, and its kernels choose among configurations."""

    @pytest.fixture
    def kernel(self, monkeypatch):
        def linear_attention(q, k, v, scale=None, eps=1e-5):
            assert (scale, eps) == (None, 1e-6)
            plain = replace(CASES[0], operator="linear_attn", feature_map=None)
            return eager(plain)(q, k, v)

        kernel = SimpleNamespace(keys=["L"], early_config_prune=None)
        stand_in = SimpleNamespace(linear_attention=linear_attention, kernel=kernel)
        monkeypatch.setitem(sys.modules, FLASH_BLA, stand_in)
        return kernel

    def test_same_mathematics(self, small, timer, kernel):
        peers = measure(small, timer, ("flash_bla",))["passes"]["backward"]["peers"]
        assert peers["flash_bla"]["ms"] == 1.0

    @pytest.mark.parametrize("D, block", [(16, 32), (32, 32), (40, 64), (256, 64)])
    def test_likely_configurations_for_each_head_dim(self, small, kernel, D, block):
        PEERS["flash_bla"](small)
        assert kernel.keys == ["L", "DK", "DV"]
        configurations = [
            SimpleNamespace(num_warps=warps, num_stages=stages, kwargs={"BK": BK, "BV": BV})
            for BK in (32, 64)
            for BV in (32, 64)
            for warps in (1, 2, 4, 8)
            for stages in (2, 3, 4)
        ]
        kept = kernel.early_config_prune(configurations, {}, L=96, DK=D, DV=D, eps=1e-6)
        assert [(x.num_warps, x.num_stages) for x in kept] == [(4, 2), (4, 4), (8, 2), (8, 4)]
        assert all(x.kwargs["BK"] == x.kwargs["BV"] == block for x in kept)

    def test_there_is_always_a_configuration(self, small, kernel):
        PEERS["flash_bla"](small)
        only = [SimpleNamespace(num_warps=4, num_stages=2, kwargs={"BL": 32})]
        assert kernel.early_config_prune(only, {}, DK=16, DV=16) == only
        only[0].num_warps = 2
        assert kernel.early_config_prune(only, {}, DK=16, DV=16) == only


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.axis == "N" and c.N == 262144], ids=lambda case: case.name
)
def test_softmax_attention_is_left_out_where_it_takes_too_long(case):
    with pytest.raises(Absent, match="operations"):
        PEERS["sdpa"](case)


def test_wrong_and_failing_peers_have_no_time(small, timer, monkeypatch):
    def failing(case):
        raise RuntimeError("out of order\nand more")

    monkeypatch.setitem(PEERS, "eager", lambda case: {"eager": lambda q, k, v: v})
    monkeypatch.setitem(PEERS, "compiled", failing)
    peers = measure(small, timer, ("eager", "compiled"))["passes"]["forward"]["peers"]
    assert list(peers["eager"]) == ["wrong"]
    assert peers["compiled"] == {"failed": "RuntimeError: out of order"}


def test_target_against_a_peer(small, timer):
    case = replace(small, peers=("sdpa",), targets={"forward": Target("sdpa", 0.8)})
    judged = measure(case, timer, ("sdpa",))["passes"]["forward"]
    assert judged["over"] == pytest.approx(0.25)
    assert measure(case, timer, ())["passes"]["forward"]["over"] is None


def test_red_gate_leaves_no_time(small, timer, monkeypatch):
    linear_attn = fbila.linear_attn

    def wrong(q, k, v, *, impl=None, **options):
        o = linear_attn(q, k, v, impl=impl, **options)
        return o if impl == "reference" else 1.01 * o

    monkeypatch.setattr(fbila, "linear_attn", wrong)
    record = measure(small, timer, ())
    assert record["status"] == "wrong"
    assert "o errs by" in record["reason"]
    assert "passes" not in record
    assert timer.calls == 0
    (line,) = lines(small.name, record)
    assert "ms" not in line


def test_failure_is_recorded(small, monkeypatch, capsys):
    monkeypatch.setattr(FakeTimer, "time", lambda self, method, calls: 1 / 0)
    record = measure(small, FakeTimer(), ())
    assert (record["status"], record["reason"]) == ("failed", "ZeroDivisionError: division by zero")
    assert "Traceback" in capsys.readouterr().err


class TestOptions:
    """Each option on a small shape."""

    @pytest.fixture
    def case(self):
        return lambda option: Case(
            "options", 3, 40, 2, 16, dtype="float32", option=option,
            targets={"forward": Target("plain", 1.03)},
        )  # fmt: skip

    def test_fused_feature_map(self, case, timer):
        record = measure(case("feature_map"), timer, ())
        row = record["passes"]["forward"]
        assert row["plain_ms"] == 1.0
        assert row["over"] == pytest.approx(1 / 1.03 - 1)
        assert any("1.000 x without it" in line for line in lines("name", record))

    @pytest.mark.parametrize("case_of", select(["options"]), ids=lambda case: case.option)
    def test_measured_or_skipped(self, case, case_of, timer):
        record = measure(case(case_of.option), timer, ())
        assert record["status"] in ("measured", "skipped"), record["reason"]

    def test_not_implemented_is_skipped(self, case, timer, monkeypatch):
        def refusing(case, device, plain):
            raise NotImplementedError("rotary is not implemented yet")

        monkeypatch.setitem(operators.OPTIONS, "rotary", refusing)
        record = measure(case("rotary"), timer, ())
        assert record["status"] == "skipped"
        assert lines("name", record) == ["name  skipped: rotary is not implemented yet"]

    def test_packed_sequences(self, case):
        """The packed call sees every token once, in sequences of different lengths."""
        seen = {}

        def plain(q, k, v, impl=None, *, cu_seqlens):
            seen.update(q=q, lengths=cu_seqlens.diff().tolist())
            return q

        q, k, v, _ = make_inputs(case("cu_seqlens"), "cpu")
        o = operators.OPTIONS["cu_seqlens"](case("cu_seqlens"), "cpu", plain)(q, k, v)
        assert torch.equal(o, q)
        assert seen["q"].shape == (120, 2, 16)
        assert seen["q"].data_ptr() == q.data_ptr()
        assert sum(seen["lengths"]) == 120
        assert len(set(seen["lengths"])) == 3

    def test_two_halves(self, case, monkeypatch):
        def state(k, v, *, feature_map):
            return k, v, feature_map

        def apply(q, state, *, feature_map):
            assert state[2] == feature_map
            return fbila.linear_attn(q, *state[:2], feature_map=feature_map)

        monkeypatch.setattr(fbila, "linear_attn_state", state, raising=False)
        monkeypatch.setattr(fbila, "linear_attn_apply", apply, raising=False)
        assert measure(case("state"), FakeTimer(), ())["status"] == "measured"


@pytest.mark.parametrize("layout", ["token_major", "head_major"])
def test_inputs_have_the_memory_order_of_the_case(layout, small):
    q, k, v, do = make_inputs(replace(small, layout=layout, M=7), "cpu")
    assert q.shape == do.shape == (2, 3, 96, 16)
    assert k.shape == v.shape == (2, 3, 7, 16)
    for x in (q, k, v, do):
        assert (x.stride(1) < x.stride(2)) == (layout == "token_major")


def test_inputs_differ_by_seed_and_not_otherwise(small):
    first, again, other = (make_inputs(small, "cpu", seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_lines_and_summary(small, timer, no_flash_bla):
    record = measure(small, timer, ("eager", "flash_bla"))
    forward, backward = lines(small.name, record)
    assert forward.startswith(small.name)
    for words in ("1.0000 ms [0.9000 ms, 1.1000 ms]", "GB/s", "target 1.11 floor", "missed by",
                  "eager 1.00 x", "flash_bla absent"):  # fmt: skip
        assert words in forward
    assert "target" not in backward
    assert summary({"a": record, "b": {"status": "skipped", "reason": ""}}) == (
        "1 measured, 1 skipped; 0 of 1 targets met"
    )


def test_nothing_is_left_for_the_next_case(small, timer, monkeypatch):
    freed = []
    monkeypatch.setattr(module, "free", lambda: freed.append(1))
    measure(small, timer, ())
    measure(replace(small, B=0), timer, ())
    assert len(freed) == 2
