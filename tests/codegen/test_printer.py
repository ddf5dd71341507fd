"""The printer: what it prints means the same, and reads as a person would write it."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from kfc_fx.codegen.text.expressions import WIDTH
from kfc_fx.codegen.text.printer import comment_lines, docstring, print_function
from kfc_fx.codegen.text.update_graph import (
    UpdateGraph,
    complements,
    complements_of_powers,
    entries_at,
    merged,
    values_at,
)

LONG = {name: name * 50 for name in "ab"}


def printed(update: UpdateGraph) -> str:
    return "\n".join(print_function(update)[0]) + "\n"


def run(update: UpdateGraph, *given):
    """What the printed text makes of arguments; the graph must make the same of them."""
    namespace = {"torch": torch}
    text = printed(update)
    assert max(map(len, text.splitlines())) <= WIDTH
    exec(text, namespace)
    found = namespace[update.name](*given)
    interpreted = fx.Interpreter(update.module()).run(*given)
    assert fx.node.map_aggregate(found, str) == fx.node.map_aggregate(interpreted, str)
    return found


def one_expression(build) -> UpdateGraph:
    update = UpdateGraph("wide", "One expression.")
    x = update.argument("x")
    return update.finish(update.let("y", build(update.call, x[LONG["a"]], x[LONG["b"]])) + 0)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda call, a, b: call(torch.sqrt, a + b), 2.0),
        (lambda call, a, b: call(torch.cat, (a + b,)), 4.0),
        (lambda call, a, b: call(torch.cat, (call(torch.mul, a, b),)), 3.0),
        (lambda call, a, b: call(torch.cat, [a + b]), 4.0),
        (lambda call, a, b: (a + b).reshape(1, 1).clamp(max=2.5), 2.5),
        (lambda call, a, b: -((a.reshape(1) * b) ** 2), -9.0),
        (lambda call, a, b: call(getattr, a.unsqueeze(0), "mT").sum() / b[0], 1 / 3),
        (lambda call, a, b: (a - b)[:] @ b, -6.0),
    ],
    ids=["sum", "tuple of one sum", "tuple of one call", "list", "chain", "power", "mT", "entry"],
)
def test_what_is_too_wide_for_a_line_means_the_same(build, expected):
    given = {LONG["a"]: torch.ones(1), LONG["b"]: torch.full((1,), 3.0)}
    assert run(one_expression(build), given).item() == pytest.approx(expected)


def test_methods_that_are_too_many_for_a_line_have_one_each():
    text = printed(one_expression(lambda call, a, b: (a + b).reshape(1, 1).clamp(max=2.5)))
    lines = [line.strip() for line in text.splitlines()]
    assert ".reshape(1, 1)" in lines
    assert ".clamp(max=2.5)" in lines


def test_functions_within_a_function_take_what_they_use():
    update = UpdateGraph("outer", "Two stacks.")
    state, rate = update.argument("state"), update.argument("rate")

    def double(inner, given):
        return {"x": inner.let("x", given["own"]["x"] * 2, (1,))}

    for key in ("a", "a", "b"):
        call = update.function(
            f"double_{key}", f"{key}: 1 layer", {"own": state[key], "unused": rate}, double
        )
    unused = update.function("unused", "never called", {"own": state["a"]}, double)
    del unused
    update.finish({"b": call, "rate": rate})
    text = printed(update)
    assert "    # b: 1 layer\n    def double_b(own):\n" in text
    assert "double_a" not in text, "what nothing needs is not printed"
    assert "unused" not in text
    given = {"a": {"x": torch.ones(1)}, "b": {"x": torch.full((1,), 3.0)}}
    assert run(update, given, 7)["b"]["x"].item() == 6


def test_a_function_that_is_called_twice_stands_once():
    update = UpdateGraph("outer", "One function.")
    state = update.argument("state")

    def double(inner, given):
        return given["own"] * 2

    calls = [update.function("doubled", "twice", {"own": state[key]}, double) for key in ("a", "b")]
    update.finish(calls)
    assert printed(update).count("def doubled(own):") == 1
    assert run(update, {"a": 1, "b": 5}) == [2, 10]


def test_comprehensions_and_unions():
    update = UpdateGraph("forms", "Forms of their own.")
    state, rate, step = (update.argument(name) for name in ("state", "rate", "step"))
    keys = update.let("stacks", update.call(tuple, ("a", "b")))
    shares = update.let("shares", update.call(entries_at, state, keys, "x"))
    update.finish(
        [
            update.call(values_at, rate, keys),
            update.call(complements, shares),
            update.call(complements_of_powers, shares, step + 1),
            update.call(merged, state["a"], rate),
            update.call(operator.or_, state["a"], rate),
        ]
    )
    text = printed(update)
    assert '    stacks = ("a", "b")\n' in text
    assert '[state[name]["x"] for name in stacks]' in text
    assert "[1 - each**(step + 1) for each in shares]" in text
    assert '{**state["a"], **rate}' in text
    found = run(update, {"a": {"x": 0.5}, "b": {"x": 0.25}}, {"a": 1, "b": 2}, 1)
    union = {"x": 0.5, "a": 1, "b": 2}
    assert found == [[1, 2], [0.5, 0.75], [0.75, 0.9375], union, union]


def test_functions_of_torch_have_their_public_names():
    update = UpdateGraph("names", "Public names.")
    x = update.argument("x")
    norm = update.call(torch.linalg.matrix_norm, x, keepdim=True)
    update.finish(update.call(torch.sqrt, norm))
    lines, imports = print_function(update)
    assert lines[-1] == "    return torch.sqrt(torch.linalg.matrix_norm(x, keepdim=True))"
    assert imports == {}


def test_long_comments_and_docstrings_are_wrapped_and_names_stay_whole():
    names = [f"encoder.layers.{index}.attention-output" for index in range(9)]
    lines = comment_lines("64x64: 9 layers: " + ", ".join(names), "    ")
    assert len(lines) > 1
    assert all(len(line) <= WIDTH and line.startswith("    # ") for line in lines)
    assert all(any(name in line for line in lines) for name in names)
    text = docstring("One line.\n\n" + "A paragraph of many words. " * 9, 4)
    assert text[0] == '    """One line.'
    assert text[-1] == '    """'
    assert all(len(line) <= WIDTH for line in text)
    assert docstring("One line.", 4) == ['    """One line."""']
