"""The generated update: deterministic, readable, and the printed text is what runs."""

from __future__ import annotations

import linecache

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.codegen.text.printer import print_function
from kfc_fx.codegen.text.update_graph import UpdateGraph
from tests.options import kfc

X = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(8) % 5
OPTIONS = [
    {},
    {"input_factor": "separable", "weight_decay": 0.1, "average": 5.0},
    {"scaling": "inverse"},
    {"scaling": "inverse", "input_factor": "separable", "clip": None, "momentum": 0.0},
    {"scaling": "inverse", "clip_by": "exact"},
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(144, 5),
    ).double()


def trained(**options):
    compiled = kfc_fx.compile(network())
    opt = kfc(compiled, lr=0.01, seed=3, **options)
    for _ in range(3):
        F.cross_entropy(compiled(X), Y).backward()
        opt.step()
        opt.zero_grad()
    return compiled, opt


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_source_is_the_same_byte_for_byte(options):
    first, second = trained(**options)[1], trained(**options)[1]
    assert first.update_source == second.update_source
    assert max(map(len, first.update_source.splitlines())) <= 100


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_printed_text_is_what_runs(options):
    """Executing the printed text anew, and interpreting the graphs, give the same step."""
    _, opt = trained(**options)
    program = opt._engine.program
    namespace: dict = {"__name__": "printed"}
    exec(compile(opt.update_source, "printed", "exec"), namespace)
    interpreted = {name: fx.Interpreter(graph).run for name, graph in program.graphs.items()}
    results = []
    for functions in (dict(program.functions), namespace, interpreted):
        model, again = trained(**options)
        target = again._engine.program.functions
        for name in list(target):
            target[name] = _by_name(functions[name], program.graphs[name])
        F.cross_entropy(model(X), Y).backward()
        again.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def _by_name(function, graph):
    """Call a function or an interpreter with arguments by name or position."""
    order = [node.target for node in graph.graph.nodes if node.op == "placeholder"]

    def call(*args, **kwargs):
        return function(*args, *(kwargs[name] for name in order if name in kwargs))

    return call


def test_options_that_are_off_leave_no_trace():
    source = trained()[1].update_source
    for word in ("shrink", "average", "active", "clip", "nu ", "inverse"):
        assert word not in source, word
    assert "momentum" not in trained(momentum=0.0)[1].update_source
    assert "generic" not in trained_without_generic().update_source.split("def apply")[1]


def trained_without_generic():
    compiled = kfc_fx.compile(nn.Sequential(nn.Flatten(), nn.Linear(72, 5)).double())
    opt = kfc_fx.KFC(compiled, lr=0.01)
    F.cross_entropy(compiled(X), Y).backward()
    opt.step()
    return opt


def test_layers_of_one_shape_are_computed_together():
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 72), nn.Tanh(), nn.Linear(72, 72)).double()
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(compiled, lr=0.01)
    F.cross_entropy(compiled(X), Y).backward()
    opt.step()
    source = opt.update_source
    assert "# 72x73: 2 layers: 1, 3" in source
    # Once for each side of both layers: at the start, and in every refresh.
    assert source.count("eigenbasis(") == 4
    assert "# [2, 72, 73]" in source


def test_tracebacks_show_the_generated_line():
    _, opt = trained()
    function = opt._engine.program.functions["apply"]
    filename = function.__code__.co_filename
    assert linecache.getline(filename, function.__code__.co_firstlineno).startswith("def apply")


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda call, a, b: call(torch.sqrt, a + b), 2.0),
        (lambda call, a, b: call(torch.cat, (a + b,)), 4.0),
        (lambda call, a, b: call(torch.cat, (call(torch.mul, a, b),)), 3.0),
        (lambda call, a, b: call(torch.cat, [a + b]), 4.0),
    ],
    ids=["sum", "tuple of one sum", "tuple of one call", "list of one sum"],
)
def test_what_is_too_wide_for_a_line_means_the_same(build, expected):
    keys = {name: name * 50 for name in "ab"}
    update = UpdateGraph("wide", "One expression, broken into lines.")
    x = update.argument("x")
    update.finish(update.let("y", build(update.call, x[keys["a"]], x[keys["b"]])))
    text, _ = print_function(update)
    namespace = {"torch": torch}
    exec(text, namespace)
    found = namespace["wide"]({keys["a"]: torch.ones(1), keys["b"]: torch.full((1,), 3.0)})
    assert found.item() == expected


def test_large_values_live_no_longer_than_the_section_that_needs_them_last():
    update = UpdateGraph("sections", "Values of one section that another needs.")
    x = update.argument("x")
    update.section("first")
    alone = update.let("alone", x + 1, (2, 3))
    shared = update.let("shared", alone * 2, (2, 3))
    update.section("second")
    both = update.let_list("both", update.call(torch._foreach_mul, [shared, shared], 2))
    rate = update.let("rate", shared.sum())
    update.section("third")
    kept = update.let("kept", both[0].T * rate, (3, 2))
    scratch = update.let("scratch", kept * 2, (3, 2))
    update.section("last")
    update.effect(torch._foreach_add_, [x], [scratch.T])
    text, _ = print_function(update.finish({"kept": kept}))
    deleted = {
        part.split("\n")[0]: part.partition("    del ")[2].split("\n")[0]
        for part in text.split("    # ")[1:]
    }
    assert deleted == {"first": "alone", "second": "shared", "third": "both", "last": "scratch"}
    namespace = {"torch": torch}
    exec(text, namespace)
    given = torch.ones(2, 3)
    assert namespace["sections"](given)["kept"].unique().tolist() == [8.0 * 24.0]
    assert given.unique().tolist() == [1 + 2 * 8.0 * 24.0]
