"""``compile_update``: the generated step through torch.compile."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import kfc_fx
from kfc_fx.optim.engines import check_one_device
from tests.options import kfc
from tests.written_out import assert_same, batches, network


def trained(scaling: str, *, compiled: bool) -> torch.nn.Module:
    """Steps at changing rates, so that a number fixed in the compiled code would show."""
    net = network()
    model = kfc_fx.compile(net)
    opt = kfc(
        model, lr=0.02, scaling=scaling, compile_update=compiled, fisher="empirical",
        weight_decay=0.1, average=3.0, generic="adamw", blocks={"2": {"scaling": "spectral"}},
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    for x, y in batches(4):
        F.cross_entropy(model(x), y).backward()
        with torch._dynamo.config.patch(error_on_recompile=True):
            opt.step()
        opt.zero_grad()
        schedule.step()
    return net


@pytest.mark.parametrize("scaling", ["adam", "inverse"])
def test_compiled_steps_equal_the_others_and_compile_once(scaling, monkeypatch):
    compilations = []
    compile_ = torch.compile

    def counted(function, **options):
        if function.__name__ in ("apply", "precondition"):
            compilations.append((function.__name__, options["fullgraph"]))
        return compile_(function, **options)

    monkeypatch.setattr(torch, "compile", counted)
    expected = trained(scaling, compiled=False)
    assert not compilations
    assert_same(trained(scaling, compiled=True), expected, 1e-6)
    assert compilations == [("apply", True)]


def test_parameters_on_two_devices_are_refused():
    spec = SimpleNamespace(parameters=("a", "b"))
    parameters = {"a": torch.empty(1), "b": torch.empty(1, device="meta")}
    check_one_device(spec, parameters, compiled=False)
    with pytest.raises(kfc_fx.OptionError, match="these are on cpu, meta"):
        check_one_device(spec, parameters, compiled=True)
