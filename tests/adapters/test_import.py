"""`import fbila` brings in no host library and costs little beyond torch."""

import subprocess
import sys

HOSTS = ("diffusers", "timm", "peft", "transformers", "accelerate")


def run(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def test_no_host_library_is_imported():
    code = (
        "import sys, fbila, fbila.layers, fbila.adapters; "
        f"print([name for name in {HOSTS} if name in sys.modules])"
    )
    assert run(code) == "[]"


def test_it_costs_little_beyond_torch():
    code = (
        "import time, torch, triton; began = time.perf_counter(); import fbila; "
        "print(time.perf_counter() - began)"
    )
    assert min(float(run(code)) for _ in range(2)) < 1.0


def test_public_names():
    code = (
        "import fbila, fbila.adapters\n"
        "for module in (fbila, fbila.adapters):\n"
        "    assert set(module.__all__) <= set(dir(module))\n"
        "    for name in module.__all__: getattr(module, name)\n"
        "    try: module.nothing\n"
        "    except AttributeError as error: print(error)\n"
        "assert fbila.LinFusion is fbila.adapters.LinFusion\n"
        "print(fbila.__version__)"
    )
    assert run(code).splitlines() == [
        "module 'fbila' has no attribute 'nothing'",
        "module 'fbila.adapters' has no attribute 'nothing'",
        "0.1.0",
    ]
