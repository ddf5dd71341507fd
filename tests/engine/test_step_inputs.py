"""What a step takes: by name and type, and the momentum of each stack and generic parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.engine import static_step
from kfc_fx.engine.step_inputs import Momenta, StepNumbers, arguments
from kfc_fx.optim import engines
from tests.options import kfc

SCALINGS = ("adam", "spectral", "eigen", "inverse")
HIGH, LOW = 0.9, 0.4
FIRST, SECOND = "0", "2"
"""Layers of one shape, hence of one stack."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3),
        nn.PReLU(),
    ).double()  # fmt: skip


class Steps:
    """Steps of one optimizer on gradients that do not depend on its parameters."""

    def __init__(self, scaling: str, rule: str = "adamw", **options) -> None:
        self.net = network()
        compiled = kfc_fx.compile(self.net, norm_layers=False)
        self.opt = kfc(
            compiled, lr=0.02, scaling=scaling, generic=rule, seed=0, fisher="sampled", **options
        )
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1)).double()
        F.cross_entropy(compiled(x), torch.arange(32) % 3).backward()
        self.opt.step()
        self.engine = self.opt._engine

    @property
    def stack(self) -> str:
        """Key of the stack of two layers."""
        return next(stack.key for stack in self.engine.spec.stacks if len(stack.blocks) == 2)

    def numbers(self, momenta: Momenta, step: int) -> StepNumbers:
        numbers = self.opt._models[0]._numbers(self.engine, self.opt.param_groups)
        return replace(numbers, momenta=momenta, step=step)

    def momenta(self, value: float) -> Momenta:
        spec = self.engine.spec
        keys, names = (s.key for s in spec.stacks), (p.name for p in spec.generic)
        return Momenta(dict.fromkeys(keys, value), dict.fromkeys(names, value))

    def run(self, momenta: Momenta, steps: int = 3) -> dict[str, torch.Tensor]:
        """Parameters after some steps."""
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            gradients = {
                name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
                for name, p in self.net.named_parameters()
            }
            with torch.no_grad():
                self.engine.apply(gradients, self.numbers(momenta, step + 2), lambda *_: {})
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}


def mixed(steps: Steps) -> Momenta:
    """HIGH for the last layer and the norm's weight, and for the first layer of the stack of two;
    LOW for the others."""
    momenta = steps.momenta(LOW)
    column = torch.tensor([HIGH, LOW], dtype=torch.float64)[:, None, None]
    last = next(s.key for s in steps.engine.spec.stacks if len(s.blocks) == 1)
    return Momenta(
        momenta.stacks | {steps.stack: column, last: HIGH}, momenta.generic | {"3.weight": HIGH}
    )


def is_high(name: str) -> bool:
    return name == "3.weight" or name.startswith((f"{FIRST}.", "5."))


def without_clip(scaling: str) -> dict[str, None]:
    """Options that keep one layer's step apart from those of the others."""
    return {"clip": None} if scaling in ("eigen", "inverse") else {}


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_each_layer_and_generic_parameter_has_its_own_momentum(scaling, rule):
    options = without_clip(scaling)
    own = Steps(scaling, rule, **options)
    found = own.run(mixed(own))
    same = Steps(scaling, rule, **options)
    high = same.run(same.momenta(HIGH))
    other = Steps(scaling, rule, **options)
    low = other.run(other.momenta(LOW))
    for name, value in found.items():
        assert not torch.allclose(high[name], low[name], rtol=0, atol=1e-9), name
        expected = high[name] if is_high(name) else low[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_momenta_that_do_not_differ_are_one_number_in_the_text(scaling):
    steps = Steps(scaling)
    steps.run(steps.momenta(HIGH), 1)
    assert len(steps.engine._programs) == 1
    assert "momenta" not in steps.opt.update_source
    steps.run(mixed(steps), 1)
    by_stack = [p for spec, p in steps.engine._programs.items() if spec.own_momenta]
    assert len(by_stack) == 1
    assert "[name]" in by_stack[0].source


def test_a_momentum_that_changes_from_step_to_step_is_compiled_once(monkeypatch):
    plain, compiled = Steps("adam"), Steps("adam", compile_update=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in (plain, compiled):
            for value in (0.8, 0.7, 0.6):
                steps.run(replace(mixed(steps), generic=steps.momenta(value).generic), 1)
            steps.run(steps.momenta(0.5), 1)
    for own, other in zip(compiled.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_momentum_that_changes_from_step_to_step_is_recorded_once(scaling, monkeypatch):
    recorded = []
    monkeypatch.setattr(engines, "captures", lambda spec, parameters, wanted: wanted is not False)
    monkeypatch.setattr(static_step, "record", lambda body, device: recorded.append(body) or body)
    plain = Steps(scaling, cuda_graph=False, **without_clip(scaling))
    static = Steps(scaling, cuda_graph=True, **without_clip(scaling))
    for steps in (plain, static):
        for value in (0.8, 0.7, 0.6, 0.5):
            steps.run(replace(mixed(steps), generic=steps.momenta(value).generic), 1)
            steps.run(steps.momenta(value), 1)
    assert len(recorded) == 1
    for own, other in zip(static.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)


def test_options_reach_the_argument_of_their_scaling():
    blocks = {"5": "spectral"}
    steps = Steps("adam", blocks=blocks, weight_decay=0.1, average=3.0)
    numbers = steps.numbers(steps.momenta(HIGH), 1)
    program = steps.engine.program
    gradients = {name: torch.ones_like(p) for name, p in steps.net.named_parameters()}
    inputs = steps.engine._inputs(program.spec, gradients, numbers)
    given = arguments(program, "apply", inputs)
    assert set(given) == set(program.arguments["apply"])
    adam = next(scaling for scaling in program.spec.scalings if str(scaling) == "adam")
    assert given["eps_adam"] == numbers.options[adam]["eps"]
    assert given["momentum_spectral"] == HIGH
    assert given["generic_eps"] == numbers.generic.eps
    assert list(given["parameters"]) == list(program.spec.parameters)
    assert given["shrink"] == [numbers.shrink[name] for name in given["parameters"]]


def test_a_wrong_name_is_refused_where_it_is_written():
    steps = Steps("adam")
    with pytest.raises(TypeError, match="steps"):
        replace(steps.numbers(steps.momenta(HIGH), 1), steps=2)
