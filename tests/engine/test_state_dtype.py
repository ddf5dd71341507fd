"""Moments that are kept in bfloat16: what they are, what they cost, and what goes on from them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.engine import static_step
from kfc_fx.linalg.half import rounded
from kfc_fx.optim import engines
from kfc_fx.optim.scalings.table import SCALINGS
from tests.inspect.small_networks import TokenNet

HALF = torch.bfloat16
MOMENTS = ("m", "v", "p")


class Net(nn.Module):
    """Blocks of several kinds, and parameters without one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.hidden, self.head = nn.Linear(6 * 16, 16), nn.Linear(16, 4)
        self.shift = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(1)
        return self.head((self.hidden(x) + self.shift).tanh())


def data() -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(48, 2, 4, 4, generator=numbers)
    return x, (x.flatten(1) @ torch.randn(32, 4, generator=numbers)).argmax(1)


def made(*, dtype: torch.dtype = torch.float32, **options) -> tuple[nn.Module, kfc_fx.KFC]:
    torch.manual_seed(0)
    model = kfc_fx.compile(Net().to(dtype))
    return model, kfc_fx.KFC(model, seed=0, **options)


def train(model: nn.Module, opt: kfc_fx.KFC, steps: int) -> list[float]:
    x, y = data()
    x, losses = x.to(model.head.weight.dtype), []
    for _ in range(steps):
        opt.zero_grad()
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def moments(opt: kfc_fx.KFC) -> list[Tensor]:
    return [entry[name] for entry in opt.state.values() for name in MOMENTS if name in entry]


@pytest.mark.parametrize("generic", ["adamw", "sgd"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_it_trains_as_with_moments_in_float32(scaling, generic):
    wide = train(*made(scaling=scaling, generic=generic), 20)
    model, opt = made(scaling=scaling, generic=generic, state_dtype=HALF)
    found = train(model, opt, 20)
    assert {moment.dtype for moment in moments(opt)} == {HALF}
    if scaling == "spectral":  # whose polar factor makes much of the little that rounding adds
        assert found[-1] < 0.3 * found[0]
        return
    for own, expected in zip(found[::5], wide[::5], strict=True):
        assert own == pytest.approx(expected, rel=0.1, abs=0.01)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_only_moments_are_rounded(scaling):
    for state_dtype, expected in ((None, set()), (torch.float32, set()), (HALF, set(MOMENTS))):
        model, opt = made(scaling=scaling, state_dtype=state_dtype)
        train(model, opt, 2)
        halves = {
            name
            for entry in opt.state.values()
            for name, value in entry.items()
            if isinstance(value, Tensor) and value.dtype == HALF
        }
        held = {name for entry in opt.state.values() for name in entry}
        assert halves == expected & held


def test_half_precision_parameters_have_moments_in_bfloat16_and_float64_keeps_its_own():
    model, opt = made(dtype=HALF, state_dtype=HALF, master_weights=True)
    train(model, opt, 3)
    assert {moment.dtype for moment in moments(opt)} == {HALF}
    model, opt = made(dtype=torch.float64, state_dtype=HALF)
    train(model, opt, 3)
    assert {moment.dtype for moment in moments(opt)} == {torch.float64}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_resumed_bit_for_bit(scaling, tmp_path):
    options = {"scaling": scaling, "state_dtype": HALF}
    model, opt = made(**options)
    train(model, opt, 7)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "state.pt")
    expected = train(model, opt, 14)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again, other = made(**options)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    assert train(again, other, 14) == expected


@pytest.mark.parametrize(("saved", "loaded"), [(None, HALF), (HALF, None)])
def test_a_run_goes_on_with_moments_of_the_other_type(saved, loaded):
    model, opt = made(state_dtype=saved)
    train(model, opt, 5)
    again, other = made(state_dtype=loaded)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    assert train(again, other, 1) == pytest.approx(train(model, opt, 1), rel=1e-5)
    assert {moment.dtype for moment in moments(other)} == {loaded or torch.float32}
    train(again, other, 3)


def test_parameters_without_a_gradient_keep_their_moments():
    model, opt = made(state_dtype=HALF)
    train(model, opt, 3)
    before = copy.deepcopy(opt.state[model.hidden.weight])
    x, y = data()
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model.hidden.weight.grad = model.hidden.bias.grad = None
    opt.step()
    for name in ("m", "v"):
        assert torch.equal(opt.state[model.hidden.weight][name], before[name])


def test_a_compiled_step_and_a_recorded_one_are_the_step(monkeypatch):
    expected = train(*made(state_dtype=HALF, cuda_graph=False), 12)
    compiled = train(*made(state_dtype=HALF, compile_update=True), 12)
    assert compiled == pytest.approx(expected, rel=0.02, abs=1e-3)
    monkeypatch.setattr(engines, "captures", lambda spec, parameters, wanted: wanted is not False)
    monkeypatch.setattr(static_step, "record", lambda body, device: body)
    recorded = train(*made(state_dtype=HALF, cuda_graph=True), 12)
    assert recorded == pytest.approx(expected, rel=0.02, abs=1e-3)


def test_the_quadratic_model_reads_the_momentum():
    scaling = kfc_fx.Inverse(quadratic_model=True)
    losses = train(*made(scaling=scaling, state_dtype=HALF), 15)
    assert losses[-1] < 0.5 * losses[0]


def test_rounding_keeps_the_mean():
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) + 0.5
    for scale in (1e-20, 1.0, 3e20):
        error = rounded(values * scale).double() / (values.double() * scale) - 1
        assert error.abs().max() < 2**-7
        assert error.mean().abs() < 2e-5
    special = torch.tensor([0.0, -1.5, float("inf"), -float("inf"), float("nan")])
    assert torch.equal(rounded(special).float().nan_to_num(7), special.nan_to_num(7))
    assert torch.equal(rounded(values.view(400, 500).mT), rounded(values).view(400, 500).mT)


@pytest.mark.parametrize("decay", [0.95, 0.999])
def test_an_average_that_changes_by_less_than_a_unit_follows(decay):
    """To the nearest, one of the squares of normal numbers ends a quarter too high at 0.999."""
    numbers = torch.Generator().manual_seed(0)
    wide = torch.ones(4000)
    half = wide.to(HALF)
    for _ in range(1500):
        squares = torch.randn(4000, generator=numbers).square()
        wide = wide.lerp(squares, 1 - decay)
        half = rounded(half.float().lerp(squares, 1 - decay))
    assert half.double().mean() == pytest.approx(float(wide.double().mean()), rel=0.01)
    assert (half.float() / wide - 1).square().mean().sqrt() < 0.05


def test_embeddings_that_are_generic_have_halves_too():
    torch.manual_seed(0)
    model = kfc_fx.compile(TokenNet())
    opt = kfc_fx.KFC(model, state_dtype=HALF)
    output = model(torch.randint(11, (8, 16)))
    F.cross_entropy(output, torch.randint(output.shape[1], (8,))).backward()
    opt.step()
    assert {moment.dtype for moment in moments(opt)} == {HALF}


def test_other_types_are_refused():
    for wrong in (torch.float16, "bfloat16", 16):
        with pytest.raises(
            kfc_fx.OptionError, match=r"state_dtype must be None, torch\.float32 or"
        ):
            made(state_dtype=wrong)
