"""Another scaling is one value, one generator and one line in a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import torch
from torch.nn import functional as F

import kfc_fx
from kfc_fx.codegen.scalings.rules import ScalingRule
from kfc_fx.codegen.spec import GenericRule
from kfc_fx.optim.checks import DECAY, POSITIVE
from kfc_fx.optim.scalings.scaling import Scaling
from kfc_fx.optim.scalings.table import SCALINGS
from kfc_fx.plan.forms import FactorForms, takes_matrix_step
from tests.models import IMAGES, LABELS, conv_network, losses
from tests.optim import trace_scaling


@dataclass(frozen=True, kw_only=True)
class Trace(Scaling):
    """Momentum over the root of Ω's mean eigenvalue, of dense Ω alone."""

    name: ClassVar[str] = "trace"
    generator: ClassVar[ScalingRule] = trace_scaling
    lr: ClassVar[float] = 0.05
    generic: ClassVar[GenericRule] = "sgd"
    scale_free: ClassVar[bool] = True
    first_steps: ClassVar[int] = 3

    momentum: Annotated[float, DECAY] = 0.5
    gain: Annotated[float, POSITIVE] = 1.0

    def forms(self, block, input_factor, basis_limit):
        return FactorForms("dense", "absent") if takes_matrix_step(block) else None

    def numbers(self):
        return {"momentum": self.momentum, "gain": self.gain}


@pytest.fixture(autouse=True)
def _in_the_table(monkeypatch):
    monkeypatch.setitem(SCALINGS, "trace", Trace)


def test_it_trains_under_its_name_with_its_own_facts():
    compiled = kfc_fx.compile(conv_network())
    opt = kfc_fx.KFC(compiled, scaling="trace", seed=0)
    assert opt.defaults["lr"] == 0.05
    assert opt.defaults["betas"] == (0.5, 0.0)
    assert opt.options.generic == kfc_fx.GenericSGD()
    assert opt.schedule.first_steps == 3
    seen = losses(compiled, opt, IMAGES, LABELS, 20)
    assert seen[-1] < 0.8 * seen[0]
    assert "One step along the momentum over the root" in opt.update_source
    assert repr(opt).splitlines()[2] == "  blocks: 3 by trace"
    with pytest.raises(kfc_fx.OptionError, match="Trace: gain must be a positive number"):
        Trace(gain=0)
    with pytest.raises(kfc_fx.OptionError, match=r"write scaling=kfc_fx\.Trace\(gain=\.\.\.\)"):
        kfc_fx.KFC(compiled, scaling="trace", gain=2.0)


def test_it_steps_as_written_out_beside_another_scaling():
    net = conv_network().double()
    compiled = kfc_fx.compile(net)
    start = net[6].weight.detach().clone()
    blocks = {"6": Trace(gain=3.0, momentum=0.0)}
    statistics = kfc_fx.Statistics(fisher="empirical", samples=None)
    opt = kfc_fx.KFC(compiled, 0.1, blocks=blocks, statistics=statistics)
    F.cross_entropy(compiled(IMAGES.double()), LABELS).backward()
    opt.step()
    mean = opt.factors["6"].omega.diagonal().mean()
    torch.testing.assert_close(
        net[6].weight.detach(), start - 0.1 * 3.0 * net[6].weight.grad / mean.sqrt()
    )
