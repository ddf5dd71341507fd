"""What the plan says of the capture: graphs, breaks, reasons; and what happens when dynamo gives
frames up while the model is trained."""

from __future__ import annotations

import random
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.capture import dynamo
from kfc_fx.plan.coverage import NOT_USED
from tests.capture.test_broken_programs import EarlyExit, Net, Printing, Whole, build
from tests.models import collector_of, make_always_due, past

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 3


def make(net: nn.Module, **options):
    return make_always_due(net.double(), **{"lr": 0.003, **options})


def step(compiled, opt, x=X, y=Y) -> float:
    loss = F.cross_entropy(compiled(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()


# -- what the plan says --------------------------------------------------------------------


def test_the_plan_shows_graphs_bindings_layers_alone_and_breaks():
    compiled, opt = make(build(Net))
    step(compiled, opt)
    plan = compiled.kfc.plan
    assert {graph.layer for graph in plan.graphs} == {"", "stem", "head"}
    assert sorted(graph.bindings for graph in plan.graphs) == [1, 1, 3, 3]
    skipped, ordinary = plan.breaks
    assert skipped.skipped
    assert skipped.alone == ("stem", "head")
    code = Net.forward.__code__
    assert skipped.function == f"forward ({code.co_filename}:{code.co_firstlineno})"
    line = Printing.forward.__code__.co_firstlineno + 2
    assert (
        skipped.place
        == ordinary.place
        == f"{__file__.replace('capture_account', 'broken_programs')}:{line}"
    )
    assert "print" in skipped.reason
    assert "loop" in skipped.reason
    assert not ordinary.skipped
    text = str(plan)
    assert "4 graphs, run with 8 assignments of parameters, 2 of them of a layer by itself" in text
    assert f"{ordinary.place}: forward goes on in a graph of its own" in text
    assert "2 layers are graphs of their own on steps with statistics (stem, head)" in text
    assert skipped.reason in plan._repr_html_()


def test_the_second_model_of_a_class_knows_the_reasons_too():
    first, second = (make(build(Net))[0] for _ in range(2))
    first.kfc.trace(X)
    second.kfc.trace(X)
    skipped = [[b for b in own.kfc.plan.breaks if b.skipped] for own in (first, second)]
    assert skipped[0] == skipped[1]
    assert len(skipped[1]) == 1


def test_a_model_in_one_graph_says_nothing_of_graphs():
    compiled, opt = make(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    step(compiled, opt)
    assert compiled.kfc.plan.breaks == ()
    assert "graph" not in str(compiled.kfc.plan)


def test_only_what_the_forward_pass_does_not_use_is_called_unused():
    net = build(EarlyExit)
    net.extra = nn.Linear(2, 2).double()
    with torch.no_grad():
        net.stem.weight.mul_(9)  # the first block is the last
    compiled, opt = make(net)
    step(compiled, opt)
    unused = {g.name.rpartition(".")[0] for g in compiled.kfc.plan.generic if g.reason == NOT_USED}
    later = {f"blocks.{n}.{part}" for n in (1, 2) for part in ("first", "second")}
    assert unused == {"extra", *later}


class Functional(nn.Module):
    """Parameters that are used by functions, in a frame that dynamo skips."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 3, bias=False)
        self.scale, self.inner = nn.Parameter(torch.ones(5)), nn.Linear(5, 5)

    def forward(self, x):
        x = F.linear(x, self.weight)
        for _ in range(2):
            print(end="")
            x = self.inner(x) * self.scale
        return self.table(x) + F.linear(x, self.table.weight)


def test_parameters_that_plain_python_uses_are_named_with_frame_and_reason():
    compiled, opt = make(Functional())
    step(compiled, opt)
    reasons = {generic.name: generic.reason for generic in compiled.kfc.plan.generic}
    assert set(reasons) == {"weight", "table.weight", "scale"}
    code = Functional.forward.__code__
    for name, reason in reasons.items():
        assert "in plain Python" in reason, name
        assert f"forward ({code.co_filename}:{code.co_firstlineno}) runs as plain Python" in reason
        assert "`print`" in reason
    assert reasons["table.weight"].startswith("also used by")
    assert [block.name for block in compiled.kfc.plan.blocks] == ["inner"]
    with pytest.raises(kfc_fx.CoverageError, match="plain Python"):
        kfc_fx.compile(Functional(), strict=True).kfc.trace(torch.randn(2, 4))


@dataclass
class Result:
    logits: torch.Tensor


class InDataclass(Functional):
    def forward(self, x):
        return Result(super().forward(x))


def test_uses_by_plain_python_are_found_behind_an_output_that_is_a_dataclass():
    compiled, opt = make(InDataclass())
    F.cross_entropy(compiled(X).logits, Y).backward()
    opt.step()
    reasons = {generic.name: generic.reason for generic in compiled.kfc.plan.generic}
    assert set(reasons) == {"weight", "table.weight", "scale"}
    assert all("in plain Python" in reason for reason in reasons.values())


class Aside(nn.Module):
    """A loss that the output does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.aside = nn.Linear(4, 3), nn.Parameter(torch.ones(4))

    def forward(self, x):
        for _ in range(1):
            print(end="")
            self.penalty = (x * self.aside).square().mean()
        return self.layer(x)


def test_a_gradient_that_no_use_explains_is_no_parameter_unused():
    compiled, opt = make(Aside())
    (F.cross_entropy(compiled(X), Y) + compiled.penalty).backward()
    opt.step()
    (generic,) = compiled.kfc.plan.generic
    assert generic.name == "aside"
    assert generic.reason.startswith("used by plain Python: forward (")


def test_values_that_cross_a_break_are_known_not_to_depend_on_the_examples():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.arange(4))
            self.table, self.of_places = nn.Linear(1, 5), nn.Embedding(4, 5)
            self.of_times, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            places = self.places[: x.shape[1]]
            times = torch.arange(x.shape[1])[:, None].expand(-1, 5).double()
            torch._dynamo.graph_break()
            h = self.table(x[..., None]) + self.of_places(places) + self.of_times(times)
            return self.head(h.mean(1))

    compiled, opt = make(Positions())
    step(compiled, opt)
    assert {block.name for block in compiled.kfc.plan.blocks} == {"table", "head"}
    reasons = {generic.name: generic.reason for generic in compiled.kfc.plan.generic}
    for name in ("of_places.weight", "of_times.weight"):
        assert "does not depend on the examples" in reasons[name]


def test_what_the_message_says_where_a_forward_pass_captured_nothing():
    compiled, opt = make(nn.Sequential(nn.Linear(4, 3)))
    with torch._dynamo.config.patch(disable=True):
        F.cross_entropy(compiled(X), Y).backward()
    with pytest.raises(kfc_fx.CaptureError, match="dynamo captured nothing") as caught:
        opt.step()
    assert "nothing is captured yet" not in str(caught.value)


def test_a_capture_that_fails_raises_its_own_error(monkeypatch):
    from kfc_fx.compilation import bindings

    def fail(*_: object, **__: object) -> None:
        raise kfc_fx.KfcError("a fault of ours")

    monkeypatch.setattr(bindings, "match_uses", fail)
    with pytest.raises(kfc_fx.KfcError, match="a fault of ours"):
        kfc_fx.compile(nn.Sequential(nn.Linear(4, 3))).kfc.trace(torch.randn(2, 4))


# -- frames that are given up while the model is trained -----------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(4, 6), nn.Linear(6, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.second(self.first(x).tanh() * (1 + self.calls % 3))


class Growing(nn.Module):
    """A dictionary with one more key at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.seen = nn.Linear(4, 6), nn.Linear(6, 3), {}

    def forward(self, x):
        self.seen[str(len(self.seen))] = 1
        return self.second(self.first(x).tanh()) / len(self.seen)


class Scheduled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(4, 6), nn.Dropout(0.0), nn.Linear(6, 3)

    def forward(self, x):
        self.drop.p += 0.01
        return self.second(self.drop(self.first(x).tanh()))


class Unrolling(nn.Module):
    """A loop over the length, which differs from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x[..., None]).tanh()
        for place in range(x.shape[1]):
            h = h + 0.1 * h[:, place : place + 1]
        return self.second(h.mean(1))


class LayerDrop(Net):
    block = Whole

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            if random.random() > 0.4:
                x = block(x)
        return self.head(x)


@pytest.mark.parametrize("kind", [Counting, Growing, Scheduled, Unrolling, LayerDrop])
def test_statistics_go_on_when_dynamo_gives_a_frame_up(kind):
    random.seed(0)
    torch.manual_seed(0)
    compiled, opt = make(kind())
    for number in range(14):
        x = torch.randn(8, 3 + number).double() if kind is Unrolling else X
        step(compiled, opt, x)
    assert opt.diagnostics.missed_statistics == 0
    assert opt.diagnostics.statistics_steps == 14
    weights = {name for name, p in compiled.named_parameters() if name.endswith("weight")}
    assert {block.weight for block in compiled.kfc.plan.blocks} == weights


def test_a_counter_on_a_module_costs_one_graph_more():
    compiled, opt = make(Counting())
    for _ in range(12):
        step(compiled, opt)
    assert len(compiled.kfc.graphs) <= 3
    assert not compiled.kfc.plan.breaks


def test_the_break_of_a_frame_that_was_compiled_too_often_says_so(monkeypatch):
    monkeypatch.setattr(dynamo, "_forwards", weakref.WeakSet())  # models of other tests are there
    compiled, opt = make(Growing())
    for _ in range(12):
        step(compiled, opt)
    (found,) = compiled.kfc.plan.breaks
    assert found.reason.startswith("Dynamo recompile limit exceeded")
    assert "what has changed last" in found.reason
    assert found.alone == ("first", "second")


def test_a_due_step_without_statistics_is_counted_and_warned_of_once_for_each_reason():
    compiled, opt = make(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    step(compiled, opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step(past(compiled), opt)  # not through the compiled model
        collector_of(compiled).note_missing("another reason")
        step(past(compiled), opt)
        step(past(compiled), opt)
    assert opt.diagnostics.missed_statistics == 5
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "call the model with gradients enabled" in texts[0]
    assert "another reason" in texts[1]
    step(compiled, opt)
    assert opt.diagnostics.statistics_steps == 2


def test_a_layer_that_loses_its_block_while_it_is_trained_is_told_of():
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.late = nn.Linear(4, 6), nn.Linear(6, 3), False

        def forward(self, x):
            h = self.first(x)
            if self.late:
                torch._dynamo.graph_break()
                h = h * self.first.weight.mean()
            return self.second(h.tanh())

    compiled, opt = make(Later())
    step(compiled, opt)
    compiled.late = True
    with pytest.warns(
        kfc_fx.KfcWarning, match=r"without the block that there was: 1 layer \(first\).*mean"
    ):
        step(compiled, opt)
    step(compiled, opt)
    assert [block.name for block in compiled.kfc.plan.blocks] == ["second"]
