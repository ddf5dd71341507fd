"""Around the entries of a model: hooks, copies, evaluation, modules that come and go, replicas."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.capture.entries import Coder, batch, in_parts, trained, whole
from tests.models import parameters


def test_hooks_of_entries_run():
    calls = []
    model = Coder()
    model.head.register_forward_hook(lambda *_: calls.append("forward"))
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    trained(model, in_parts, steps=3)
    assert calls == ["forward", "backward"] * 3


def test_evaluation_and_transforms_capture_nothing():
    net, _ = trained(Coder(), in_parts, steps=1)
    graphs = len(net.kfc.graphs)
    x, _ = batch(0)
    net.eval()
    with torch.no_grad():
        parts = net.forward_head(net.forward_features(x))
        torch.testing.assert_close(parts, net(x))
    torch.func.vmap(net.head)(torch.randn(2, 3, 4))
    torch.func.grad(lambda h: net.head(h).sum())(torch.randn(3, 4))
    assert len(net.kfc.graphs) == graphs


def test_copies_and_pickles_have_entries_of_their_own():
    net, opt = trained(Coder(), in_parts, steps=2, statistics=kfc_fx.Statistics(every=1))
    for pair in (copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))):
        other, its = pair
        before = parameters(net)
        its.zero_grad()
        in_parts(other, *batch(7)).backward()
        its.step()
        assert its.diagnostics.statistics_steps == opt.diagnostics.statistics_steps + 1
        torch.testing.assert_close(parameters(net), before, rtol=0, atol=0)


def test_uncompiled_modules_are_as_they_were():
    net, _ = trained(Coder(), in_parts, steps=1)
    kfc_fx.uncompile(net)
    assert not [m for m in net.modules() if "_compiled_call_impl" in vars(m)]


def test_modules_that_join_or_leave():
    net, opt = trained(Coder(), in_parts, steps=2, statistics=kfc_fx.Statistics(every=1))
    old = net.head
    net.head = nn.Linear(4, 3)
    opt.add_param_group({"params": list(net.head.parameters())})
    for step in range(3):
        opt.zero_grad()
        in_parts(net, *batch(step)).backward()
        opt.step()
    assert "_compiled_call_impl" not in vars(old)
    assert opt.factors["head"].omega.any()
    assert "head" in {block.name for block in net.kfc.plan.blocks}


def test_a_module_that_torch_compiles_is_left_to_it():
    model = Coder()
    model.head.compile(backend="eager")
    own = vars(model.head)["_compiled_call_impl"]
    net = kfc_fx.compile(model)
    opt = kfc_fx.KFC(net)
    assert vars(net.head)["_compiled_call_impl"] is own
    whole(net, *batch(0)).backward()
    opt.step()
    assert vars(net.head)["_compiled_call_impl"] is own


def test_replicas_are_refused():
    """Which nn.DataParallel makes, and calls in threads."""
    net, _ = trained(Coder(), whole, steps=1)
    replica = net._replicate_for_data_parallel()
    raised = []

    def call():
        try:
            replica(batch(0)[0])
        except kfc_fx.OptionError as error:
            raised.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "nn.DataParallel calls replicas" in raised[0]


def test_a_module_of_two_models_that_is_called_alone_is_warned_of():
    """Whose it is, nobody can say; called as a whole, each model has its own."""
    body = nn.Linear(4, 4)
    models = [kfc_fx.compile(nn.Sequential(body, nn.Linear(4, 3))) for _ in range(2)]
    opts = [kfc_fx.KFC(model) for model in models]
    x, labels = torch.randn(8, 4), torch.arange(8) % 3
    for model, opt in zip(models, opts, strict=True):
        F.cross_entropy(model(x), labels).backward()
        opt.step()
        assert opt.factors["0"].omega.any()
    with pytest.warns(kfc_fx.KfcWarning, match="'0' is a module of several compiled models"):
        models[1][1](models[1][0](x))
