"""The generated update: deterministic, readable, and the printed text is what runs."""

from __future__ import annotations

import ast
import linecache

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.optim import update_spec
from tests.options import kfc

X = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(8) % 5
OPTIONS = [
    {},
    {"input_factor": "separable", "weight_decay": 0.1, "average": 5.0},
    {"scaling": "inverse"},
    {"scaling": "inverse", "input_factor": "separable", "clip": None, "momentum": 0.0},
    {"scaling": "inverse", "clip_by": "exact"},
    {"basis_limit": 4},
    {"scaling": "eigen", "basis_limit": 4, "input_factor": "separable"},
    {"scaling": "spectral", "input_factor": "separable"},
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
    interpreted = {name: fx.Interpreter(program.graph(name)).run for name in program.updates}
    results = []
    for functions in (dict(program.functions), namespace, interpreted):
        model, again = trained(**options)
        target = again._engine.program.functions
        for name in list(target):
            target[name] = _by_name(functions[name], program.graph(name))
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
    assert source.count("eigenbasis(") == 2, "one call for each factor of both layers"
    assert "# [2, 72, 73]" in source


def test_tracebacks_show_the_generated_line():
    _, opt = trained()
    function = opt._engine.program.functions["apply"]
    filename = function.__code__.co_filename
    assert linecache.getline(filename, function.__code__.co_firstlineno).startswith("def apply")


def test_factors_that_are_cut_are_turned_by_named_functions():
    source = trained(basis_limit=4)[1].update_source
    assert "rotate_columns(" in source
    assert "rotate_rows(" in source
    assert "unflatten" not in source.partition("def apply")[2]


def test_what_is_of_one_stack_stands_in_a_function_of_that_stack():
    """Locals end with their frame, so that no intermediate value outlives its stack."""
    _, opt = trained()
    functions = ast.parse(opt.update_source).body
    apply = next(f for f in functions if isinstance(f, ast.FunctionDef) and f.name == "apply")
    inner = {f.name for f in apply.body if isinstance(f, ast.FunctionDef)}
    keys = [stack.key for stack in opt._engine.spec.stacks]
    assert {f"{verb}_{key}" for verb in ("rotate", "step") for key in keys} <= inner
    named = {
        n.id for n in ast.walk(apply) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    assert not [name for name in named if any(name.endswith(f"_{key}") for key in keys)]
    assert "del " not in opt.update_source


@pytest.mark.parametrize("input_factor", ["dense", "separable"])
def test_the_header_explains_the_names_of_stacks(input_factor):
    source = trained(input_factor=input_factor)[1].update_source
    header = " ".join(ast.get_docstring(ast.parse(source)).split())
    assert "5 layers in 5 stacks, each of one shape. The" in header
    assert "The name of a stack: rows x columns of [W b]" in header
    assert ("channels x offsets of a separable Ω" in header) == (input_factor == "separable")
    assert "d: a diagonal factor" in header
    assert "cut in" not in header
    assert "p2: a factor cut in 2 parts" in trained(basis_limit=4)[1].update_source


def test_one_function_refreshes_at_the_first_time_and_later(monkeypatch):
    monkeypatch.setattr(update_spec, "ORTHOGONAL_ITERATION_FROM", 200)
    narrow = trained()[1].update_source  # whose factors are decomposed at every refresh
    assert "def refresh(state):" in narrow
    monkeypatch.setattr(update_spec, "ORTHOGONAL_ITERATION_FROM", 100)
    source = trained()[1].update_source
    assert "def refresh(state, first):" in source
    assert 'next_basis(state["omega"], state["q_omega"], first=first)' in source
    assert "def start" not in source
