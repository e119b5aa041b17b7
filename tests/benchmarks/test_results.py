"""What is measured in any order is written in one."""

import json

from benchmarks.results import Results


def test_cases_are_written_in_the_order_of_their_names(tmp_path):
    path = tmp_path / "results.json"
    results = Results({"gpu": "one"}, path, names=["a", "b", "c"])
    for name in ("other", "c", "a", "b"):
        results.add(name, {"status": "measured", "of": name})
    cases = json.loads(path.read_text())["cases"]
    assert list(cases) == ["a", "b", "c", "other"]
    assert cases["c"] == {"status": "measured", "of": "c"}
    again = Results({"gpu": "one"}, path, resume=True, names=["c", "b"])
    again.add("b", {"status": "measured"})
    assert list(json.loads(path.read_text())["cases"]) == ["c", "b", "a", "other"]
