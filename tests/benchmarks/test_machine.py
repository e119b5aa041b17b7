"""What a result says of the machine and of the sources."""

from benchmarks.machine import describe, hash_of_sources


def test_every_field_goes_into_json():
    machine = describe()
    assert {"gpu", "driver", "torch", "triton", "fbila", "revision", "sources"} <= machine.keys()
    assert all(value is None or isinstance(value, str) for value in machine.values())
    assert describe() == machine


def test_sources(tmp_path):
    def written(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "package"
        for name, text in files.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return hash_of_sources([folder])

    one = written(a_py="x = 1", ops__b_py="y = 2")
    assert len(one) == 12
    # Wherever it is, whatever else lies there.
    assert written(ops__b_py="y = 2", a_py="x = 1", result_json="{}") == one
    assert written(a_py="x = 1", ops__b_py="y = 3") != one
    assert written(a_py="x = 1", ops__c_py="y = 2") != one
    assert written(a_py="x = 1", b_py="y = 2") != one
    assert written(a_py="x = 1") != one
