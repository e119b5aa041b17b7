"""One case: the gate, then each pass beside its floor and its peers. The record goes into JSON."""

import traceback
from collections.abc import Iterable
from dataclasses import asdict

from . import gate
from .cases import Case
from .eager import Attention, eager
from .floor import floor_ms, pass_bytes
from .operators import Operator, make_inputs, make_operator
from .passes import time_pass
from .peers import PEERS, SAME_MATHEMATICS, Absent
from .targets import verdict
from .timing import Timer
from .upkeep import first_line, free


def measure(case: Case, timer: Timer, peers: Iterable[str]) -> dict:
    """The record of `case`; its "status" is "measured", "skipped", "wrong" or "failed"."""
    record = {"case": asdict(case), "status": "measured"}
    try:
        function = make_operator(case, timer.device)
        errors = _check(case, function, timer.device)
        if not gate.passed(errors):
            return record | {"status": "wrong", "reason": _excess(errors)}
        passes = {name: _measure_pass(case, name, function, timer) for name in case.passes}
        for peer in peers:
            for name, result in _measure_peer(peer, case, timer).items():
                passes[name]["peers"][peer] = result
        for name, target in case.targets.items():
            passes[name] |= verdict(target, passes[name]["ms"], _references(passes[name]))
        return record | {"errors": errors, "passes": passes}
    except NotImplementedError as error:
        return record | {"status": "skipped", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        return record | {"status": "failed", "reason": first_line(error)}
    finally:
        free()


def _check(case: Case, function: Operator, device: str) -> dict[str, dict]:
    plain = None if case.option else eager(case)
    return gate.check(function, _truth(function), plain, make_inputs(case, device))


def _truth(function: Operator) -> Attention:
    return lambda q, k, v: function(q, k, v, impl="reference")


def _excess(errors: dict[str, dict]) -> str:
    return ", ".join(
        f"{name} errs by {entry['error']:.2e}, more than {entry['bound']:.2e}"
        for name, entry in errors.items()
        if not entry["ok"]
    )


def _measure_pass(case: Case, name: str, function: Attention, timer: Timer) -> dict:
    if case.option is None:
        return _row(case, name, function, timer)
    # Before and after, so that a slow drift of the clocks cancels.
    plain = case.plain()
    plain_function = make_operator(plain, timer.device)
    before, _ = time_pass(plain, name, plain_function, timer)
    row = _row(case, name, function, timer)
    after, _ = time_pass(plain, name, plain_function, timer)
    return row | {"plain_ms": (before.ms + after.ms) / 2}


def _row(case: Case, name: str, function: Attention, timer: Timer) -> dict:
    time, peak_bytes = time_pass(case, name, function, timer)
    row = {**time._asdict(), "peers": {}}
    if case.method == "host":
        return row
    nbytes, bandwidth = pass_bytes(case, name), timer.bandwidth(case.method)
    floor = floor_ms(nbytes, bandwidth)
    row |= {"peak_bytes": peak_bytes, "bytes": nbytes, "gb_per_s": nbytes / time.ms / 1e6}
    row |= {"copy_gb_per_s": bandwidth / 1e9, "floor_ms": floor, "floor_fraction": floor / time.ms}
    if case.method == "graph":
        # A copy as small as this case does not reach the bandwidth of a large one either.
        row["copy_ms"] = timer.copy(case.method, nbytes).ms
    return row


def _references(row: dict) -> dict[str, float]:
    """What a target can refer to."""
    times = {name: peer["ms"] for name, peer in row["peers"].items() if "ms" in peer}
    own = {"floor": row.get("floor_ms"), "plain": row.get("plain_ms")}
    return times | {name: ms for name, ms in own.items() if ms is not None}


def _measure_peer(peer: str, case: Case, timer: Timer) -> dict[str, dict]:
    """By pass: the time of the fastest way, or why there is none."""
    try:
        ways = PEERS[peer](case)
        error = _peer_error(peer, case, ways, timer.device)
    except Absent as reason:
        outcome = {"absent": str(reason)}
    except Exception as failure:
        outcome = {"failed": first_line(failure)}
    else:
        if error <= gate.PEER_ERROR:
            return {name: _fastest(case, name, ways, timer) for name in case.passes}
        outcome = {"wrong": f"relative error {error:.1e}"}
    return dict.fromkeys(case.passes, outcome)


def _peer_error(peer: str, case: Case, ways: dict[str, Attention], device: str) -> float:
    """0 for those that compute something else."""
    if peer not in SAME_MATHEMATICS:
        return 0.0
    truth = _truth(make_operator(case, device))
    inputs = make_inputs(case, device)
    return max(gate.relative_error(function, truth, inputs) for function in ways.values())


def _fastest(case: Case, name: str, ways: dict[str, Attention], timer: Timer) -> dict:
    measured, failures = {}, {}
    for way, function in ways.items():
        try:
            time, peak_bytes = time_pass(case, name, function, timer)
            measured[way] = {**time._asdict(), "peak_bytes": peak_bytes, "way": way}
        except Exception as error:
            failures[way] = first_line(error)
    if not measured:
        return {"failed": "; ".join(f"{way}: {words}" for way, words in failures.items())}
    return min(measured.values(), key=lambda result: result["ms"])
