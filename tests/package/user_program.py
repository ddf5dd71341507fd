# pyright: strict
"""A program of a user, whose types are checked and which is not run.

In strict mode a name whose type is unknown, even in part, is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import assert_type

from torch import Tensor, nn

import kfc_fx

net = nn.Sequential(nn.Linear(4, 3))
assert_type(kfc_fx.compile(net, likelihood=kfc_fx.Categorical(dim=1)), nn.Sequential)
assert_type(kfc_fx.uncompile(net), nn.Sequential)

compilation = kfc_fx.Compilation.of(net)
assert_type(compilation, kfc_fx.Compilation)
assert_type(compilation.model, nn.Module)
assert_type(compilation.plan, kfc_fx.CurvaturePlan)
assert_type(compilation.trace(Tensor()), kfc_fx.CurvaturePlan)
assert_type(compilation.plan.blocks, tuple[kfc_fx.BlockSpec, ...])
assert_type(compilation.plan.blocks[0].name, str)
assert_type(compilation.plan.generic, tuple[kfc_fx.GenericSpec, ...])
assert_type(compilation.plan.generic[0].reason, str)
breaks = [(found.place, found.reason) for found in compilation.breaks]
assert_type(breaks, list[tuple[str, str]])
sources = [graph.stages for graph in compilation.graphs]

statistics = kfc_fx.Statistics(every=5, refresh_every=50, fisher="empirical")
opt = kfc_fx.KFC(
    net,
    lr=0.01,
    scaling=kfc_fx.Spectral(damping=0.1),
    blocks={"0": kfc_fx.Adam(), "1": "eigen", "2": {"scaling": kfc_fx.Inverse()}},
    statistics=statistics,
    generic=kfc_fx.GenericSGD(),
)
assert_type(opt.options.statistics, kfc_fx.Statistics)
assert_type(opt.options.statistics.every, int)
assert_type(opt.factors, Mapping[str, kfc_fx.Factors])
assert_type(opt.factors["0"].omega, Tensor)
assert_type(opt.factors["0"].gamma, Tensor)
assert_type(opt.update_source, str)
assert_type(opt.diagnostics.steps, int)
assert_type(opt.diagnostics.damping, float | None)
assert_type(opt.diagnostics.seconds, Counter[str])
assert_type(opt.schedule.statistics_due(3), bool)
assert_type(opt.step(), None)
assert_type(opt.step(lambda: Tensor()), Tensor)
opt.zero_grad()
opt.save_report("report.json", loss=0.5)
opt.load_state_dict(opt.state_dict())
with opt.averaged():
    net.eval()

scalings = (kfc_fx.Adam(), kfc_fx.Eigen(), kfc_fx.Inverse(), kfc_fx.Spectral())
rates = [scaling.lr for scaling in scalings]
assert_type(rates, list[float])
likelihoods = (kfc_fx.Bernoulli(), kfc_fx.Categorical(), kfc_fx.Gaussian())
rules = (kfc_fx.GenericAdamW(), kfc_fx.GenericSGD())
assert_type(kfc_fx.__version__, str)

try:
    opt.step()
except (kfc_fx.StepError, kfc_fx.StatisticsError) as error:
    assert_type(error, kfc_fx.StepError | kfc_fx.StatisticsError)
