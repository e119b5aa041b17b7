"""A record as the lines that are printed."""


def lines(name: str, record: dict) -> list[str]:
    """A line for each pass, or one that says why there is no time."""
    if record["status"] != "measured":
        return [f"{name}  {record['status']}: {record['reason']}"]
    passes = [f"{name}  {_row(kind, row)}" for kind, row in record["passes"].items()]
    if "base" in record:
        passes.append(f"{name}  base {record['base']['status']}: {record['base']['reason']}")
    return passes


def _row(kind: str, row: dict) -> str:
    parts = [f"{kind:<16} {_ms(row['ms'])} [{_ms(row['ms_20'])}, {_ms(row['ms_80'])}]"]
    if "floor_ms" in row:
        fraction = f"{row['floor_fraction']:.2f} of the speed of a copy"
        parts.append(f"floor {_ms(row['floor_ms'])}, {fraction}, {row['gb_per_s']:.0f} GB/s")
    if "plain_ms" in row:
        parts.append(f"{row['ms'] / row['plain_ms']:.3f} x without it")
    if "target" in row:
        parts.append(_target(row))
    if "base" in row:
        parts.append(_base(row["base"]))
    peers = [_peer(name, peer, row["ms"]) for name, peer in row["peers"].items()]
    if peers:
        parts.append(", ".join(peers))
    return "; ".join(parts)


def _ms(ms: float) -> str:
    return f"{ms:.4f} ms"


def _target(row: dict) -> str:
    words = f"target {row['target']}"
    if row["over"] is None:
        return f"{words}: not measured"
    limit = f"{words} = {_ms(row['limit_ms'])}"
    return f"{limit} met" if row["over"] <= 0 else f"{limit} missed by {row['over']:.1%}"


def _base(base: dict) -> str:
    rounds = ", ".join(f"{a / b:.3f}" for a, b in zip(base["ms"], base["base_ms"], strict=True))
    return f"{base['ratio']:.3f} x the time of the base ({rounds})"


def _peer(name: str, peer: dict, ms: float) -> str:
    """How many times as long the peer takes."""
    if "ms" in peer:
        way = "" if peer["way"] == name else f" ({peer['way']})"
        return f"{name}{way} {peer['ms'] / ms:.2f} x"
    ((status, _),) = peer.items()
    return f"{name} {status}"


def summary(records: dict[str, dict]) -> str:
    """How many cases ended how, and how many targets were met."""
    counts: dict[str, int] = {}
    for record in records.values():
        counts[record["status"]] = counts.get(record["status"], 0) + 1
    over = [
        row["over"]
        for record in records.values()
        for row in record.get("passes", {}).values()
        if row.get("over") is not None
    ]
    met = sum(x <= 0 for x in over)
    words = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{words or 'no case'}; {met} of {len(over)} targets met"
