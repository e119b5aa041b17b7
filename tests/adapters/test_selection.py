"""Modules are chosen by name as in peft: a pattern for the whole, or ends of names."""

import re

import backbones
import pytest

from fbila.adapters.timm import plan

EVERY = [0, 1, 2]


def chosen(**filters) -> list[int]:
    return [int(e.name.split(".")[1]) for e in plan(backbones.vit(), **filters).swapped]


@pytest.mark.parametrize(
    ("selector", "numbers"),
    [
        (r"blocks\.[12]\.attn", [1, 2]),
        (r"blocks\.1", []),
        (re.compile(r".*\.0\..*"), [0]),
        (["attn"], EVERY),
        (["0.attn", "blocks.2.attn"], [0, 2]),
        (("ttn",), []),
        ([], []),
        (lambda name, module: "1" in name, [1]),
        (lambda name, module: module.num_heads == 2, EVERY),
        (None, EVERY),
    ],
)
def test_include_and_exclude(selector, numbers):
    assert chosen(include=selector) == numbers
    if selector is not None:
        assert chosen(exclude=selector) == [n for n in EVERY if n not in numbers]


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [([0], [0]), ([-1], [2]), ([2, 0], [0, 2]), ([1, 1, -2], [1]), (range(2), [0, 1]), ([], [])],
)
def test_layers(layers, numbers):
    assert chosen(layers=layers) == numbers


def test_layers_are_numbered_among_those_that_are_left():
    assert chosen(exclude=["0.attn"], layers=[0]) == [1]


def test_each_reason_is_told():
    def first(name, module):
        return name.startswith("blocks.0")

    report = plan(backbones.vit(), exclude=first, include=["0.attn", "1.attn"], layers=[])
    assert [e.reason for e in report.skipped] == [
        "matches exclude=first",
        "not among layers=[]",
        "does not match include=['0.attn', '1.attn']",
    ]
