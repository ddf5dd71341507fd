"""Modules of a compiled model that are called from outside of it, one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfc_fx
from tests.capture.entries import (
    FISHERS,
    SCALINGS,
    Agent,
    Coder,
    Siamese,
    Trained,
    assert_same_run,
    batch,
    in_parts,
    trained,
    whole,
)
from tests.models import parameters


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_parts_called_one_after_the_other_train_as_the_model(scaling, fisher):
    statistics = kfc_fx.Statistics(every=2, refresh_every=2, fisher=fisher)
    options = {"scaling": scaling, "statistics": statistics}
    expected = trained(Coder(), whole, **options)
    found = trained(Coder(), in_parts, **options)
    assert_same_run(found, expected)
    assert "head()" in str(found[0].kfc.plan)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_model_that_nobody_calls_trains(scaling):
    expected = trained(Coder(), whole, scaling=scaling)
    found = trained(Trained(), lambda net, x, y: net.training_step(x, y), scaling=scaling)
    assert_same_run(found, expected, prefix="net.")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_entries_run_by_the_backend(backend):
    def run(loss_of):
        net = kfc_fx.compile(Coder(), backend=backend)
        opt = kfc_fx.KFC(net, seed=1)
        loss_of(net, *batch(0)).backward()
        opt.step()
        return opt

    opt, its = run(in_parts), run(whole)
    assert opt.factors.keys() == its.factors.keys()
    for name, expected in its.factors.items():
        torch.testing.assert_close(opt.factors[name].omega, expected.omega)
        torch.testing.assert_close(opt.factors[name].gamma, expected.gamma)


def of_both(logits, value, labels):
    return F.cross_entropy(logits, labels) + 0.1 * (value[:, 0] - labels).square().mean()


def agent_at_once(net, x, labels):
    return of_both(*net(x), labels)


def agent_in_parts(net, x, labels):
    hidden = net.body(x)
    value = net.critic(hidden)
    return of_both(net.actor(hidden), value, labels)  # the last one called has the prediction


@pytest.mark.parametrize("scaling", SCALINGS)
def test_actor_and_critic_train_as_at_once(scaling):
    options = {"scaling": scaling, "statistics": kfc_fx.Statistics(fisher="empirical")}
    found = trained(Agent(), agent_in_parts, **options)
    expected = trained(Agent(), agent_at_once, **options)
    assert_same_run(found, expected)


def test_sampled_targets_of_several_branches():
    """Each branch has targets of its own likelihood; the examples count once."""
    statistics = kfc_fx.Statistics(fisher="sampled", samples=None)
    _, opt = trained(Agent(), agent_in_parts, statistics=statistics, steps=1)
    assert opt.factors["critic"].gamma.item() > 0
    _, plain = trained(Agent(), agent_at_once, statistics=statistics, steps=1)
    torch.testing.assert_close(opt.factors["actor"].gamma, plain.factors["actor"].gamma)
    torch.testing.assert_close(opt.factors["actor"].omega, plain.factors["actor"].omega)


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_module_that_is_called_twice_counts_both_times(fisher):
    """As where the model calls it twice: rows of both, examples of one batch."""

    def parts(net, x, labels):
        return F.cross_entropy(net.head(net.body(x) - net.body(x.flip(0))), labels)

    statistics = kfc_fx.Statistics(fisher=fisher)
    expected = trained(Siamese(), whole, statistics=statistics)
    found = trained(Siamese(), parts, statistics=statistics)
    torch.testing.assert_close(parameters(found[0]), parameters(expected[0]))
    for name in ("body.1", "head"):
        own, its = found[1].factors[name], expected[1].factors[name]
        torch.testing.assert_close(own.omega, its.omega)
        torch.testing.assert_close(own.gamma, its.gamma)


def test_the_model_and_its_parts_by_turns():
    calls = iter(range(100))

    def by_turns(net, x, labels):
        return (whole if next(calls) % 3 else in_parts)(net, x, labels)

    found = trained(Coder(), by_turns, steps=9)
    assert_same_run(found, trained(Coder(), whole, steps=9))


class Features(Agent):
    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("fisher", FISHERS)
def test_the_models_output_may_go_into_one_of_its_modules(fisher):
    def chained(net, x, labels):
        return F.cross_entropy(net.actor(net(x)), labels)

    def parts(net, x, labels):
        return F.cross_entropy(net.actor(net.body(x)), labels)

    statistics = kfc_fx.Statistics(fisher=fisher)
    found = trained(Features(), chained, statistics=statistics)
    assert_same_run(found, trained(Features(), parts, statistics=statistics))


def test_passes_to_inputs_take_nothing():
    def attacked(net, x, labels):
        inputs = x.clone().requires_grad_()
        torch.autograd.grad(in_parts(net, inputs, labels), inputs)
        return in_parts(net, x, labels)

    def seen_twice(net, x, labels):
        with torch.no_grad():
            net.forward_features(x)  # as batch norm sees it
        return whole(net, x, labels)

    assert_same_run(trained(Coder(), attacked), trained(Coder(), seen_twice))


def test_micro_batches_of_entries_add_up():
    def split(net, x, labels):
        (in_parts(net, x[:8], labels[:8]) / 2).backward()
        return in_parts(net, x[8:], labels[8:]) / 2

    _, opt = trained(Coder(), split, statistics=kfc_fx.Statistics(samples=None), steps=1)
    assert opt.factors["head"].omega[-1, -1] == pytest.approx(1)  # per example, of both


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_entries_train_as_they_do_without(reentrant):
    def checkpointed(net, x, labels):
        hidden = checkpoint(net.body, x.requires_grad_(), use_reentrant=reentrant)
        return F.cross_entropy(net.actor(hidden), labels)

    def parts(net, x, labels):
        return F.cross_entropy(net.actor(net.body(x)), labels)

    found = trained(Agent(), checkpointed, steps=4)
    assert_same_run(found, trained(Agent(), parts, steps=4))


class WithLoss(nn.Module):
    """As Lightning has it under DDP: the model returns its loss, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Coder()

    def forward(self, x, labels):
        return F.cross_entropy(self.net(x), labels)


@pytest.mark.parametrize("scaling", ["adam", "spectral"])
def test_a_model_that_returns_its_loss_alone(scaling):
    options = {"statistics": kfc_fx.Statistics(samples=None), "scaling": scaling}
    expected = trained(Coder().double(), lambda net, x, y: whole(net, x.double(), y), **options)
    found = trained(WithLoss().double(), lambda net, x, y: net(x.double(), y), **options)
    torch.testing.assert_close(parameters(found[0]), parameters(expected[0]))
    assert "Categorical" in str(found[0].kfc.plan)


@pytest.mark.parametrize(
    ("scaling", "fisher", "said"),
    [
        ("eigen", "empirical", "return the prediction beside the loss"),
        ("adam", "sampled", "the model returns its loss and no prediction"),
    ],
)
def test_what_a_loss_alone_does_not_tell_is_said(scaling, fisher, said):
    options = {"statistics": kfc_fx.Statistics(fisher=fisher), "scaling": scaling}
    with pytest.raises(kfc_fx.KfcError, match=said):
        trained(WithLoss(), lambda net, x, y: net(x, y), **options)


def test_a_model_that_nobody_calls_is_traced_by_a_method_of_its_own():
    net = kfc_fx.compile(Trained())
    opt = kfc_fx.KFC(net)
    running = {name: buffer.clone() for name, buffer in net.named_buffers()}
    plan = net.kfc.trace_calls(net.training_step, *batch(0))
    assert [block.name for block in plan.blocks] == [
        *("net.body.0", "net.body.1", "net.norm", "net.head")
    ]
    assert all(torch.equal(buffer, running[name]) for name, buffer in net.named_buffers())
    assert {"q_omega", "q_gamma", "m"} <= opt.state[net.net.head.weight].keys()
    assert opt.diagnostics.steps == 0
    before = opt.state_dict()
    _, its = trained(Trained(), lambda net, x, y: net.training_step(x, y))
    opt.load_state_dict(its.state_dict())
    assert opt.state_dict()["state"].keys() == before["state"].keys()


def test_an_entry_is_traced_before_there_is_an_optimizer():
    net = kfc_fx.compile(Coder())
    x, labels = batch(0)
    plan = net.kfc.trace_calls(in_parts, net, x, labels)
    assert [block.name for block in plan.blocks] == ["body.0", "body.1", "norm", "head"]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        net.kfc.trace_calls(net.forward_head, x)
    F.cross_entropy(net(x), labels).backward()  # as ever


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("flattened", [False, True])
def test_a_checkpoint_is_loaded_where_the_model_itself_is_never_called(tmp_path, flattened):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flattened)

    def step_of(net, x, labels):
        return net.training_step(x, labels)

    net, opt = trained(Trained(), step_of, 4)
    dcp.save(
        {"opt": get_optimizer_state_dict(net, opt, options=options)},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    other = kfc_fx.compile(Trained())
    other.load_state_dict(net.state_dict())
    again = kfc_fx.KFC(other, seed=1, statistics=opt.options.statistics)
    other.kfc.trace_calls(other.training_step, *batch(0))
    state = {"opt": get_optimizer_state_dict(other, again, options=options)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, again, state["opt"], options=options)
    for own, its in ((net, opt), (other, again)):
        for step in range(4, 8):
            its.zero_grad()
            step_of(own, *batch(step)).backward()
            its.step()
    torch.testing.assert_close(parameters(other), parameters(net), rtol=0, atol=0)
