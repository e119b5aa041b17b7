"""What importing costs, that the examples run, and what the kernels must not use."""

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fbila
from fbila.ops import (
    autocast,
    autograd,
    checks,
    feature_maps,
    focusing,
    functional,
    halves,
    layout,
    library,
    option_checks,
    packing,
    reference,
    rotary,
    state,
    tensor_checks,
)

PACKAGE = Path(fbila.__file__).parent
KERNELS = sorted((PACKAGE / "ops" / "kernels").glob("*.py"))
HOST = [
    autocast, autograd, checks, feature_maps, focusing, functional, halves, layout, library,
    option_checks, packing, reference, rotary, state, tensor_checks,
]  # fmt: skip


def python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)


def test_import_loads_neither_triton_nor_hosts():
    heavy = "('triton', 'diffusers', 'transformers', 'timm', 'peft')"
    result = python(
        "import sys, torch; before = set(sys.modules); import fbila, fbila.ops\n"
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_reference_runs_without_triton():
    result = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fbila; x = torch.rand(1, 1, 4, 4)\n"
        "print(fbila.linear_attn(x, x, x, impl='reference').shape)"
    )
    assert result.stdout.strip() == "torch.Size([1, 1, 4, 4])", result.stderr


@pytest.mark.parametrize("module", HOST, ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch})
    assert failed == 0


def test_every_public_name_has_an_example():
    for name in fbila.ops.__all__:
        assert name in fbila.__all__
        assert ">>>" in inspect.getdoc(getattr(fbila.ops, name))


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_use_only_what_every_triton_has(path):
    source = path.read_text()
    for word in ("make_block_ptr", "tl.advance", "tl.atomic", "tl.device_print", "triton.autotune"):
        assert word not in source


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_numbers_may_be_constants(path):
    """As PyTorch 2.11 takes them for, where it looks what a kernel in a graph writes to."""
    source = path.read_text()
    for name in set(re.findall(r'(\w+): "(?:i32|i64|fp64)"', source)):
        assert not re.search(rf"\b{name}\.to\(", source), f"use tl.cast({name}, ...)"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_every_masked_load_says_what_lies_beyond(path):
    calls = path.read_text().split("tl.load(")[1:]
    for call in calls:
        depth, end = 1, 0
        while depth:
            depth += {"(": 1, ")": -1}.get(call[end], 0)
            end += 1
        assert "mask=" not in call[:end] or "other=" in call[:end]


def test_no_host_code_computes_a_grid():
    for module in HOST:
        assert "cdiv" not in inspect.getsource(module)
