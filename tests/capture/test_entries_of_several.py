"""Entries of models with several optimizers, several batches, branches and frozen parts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import kfc_fx
from tests.capture.entries import (
    FISHERS,
    SCALINGS,
    Agent,
    Coder,
    Siamese,
    assert_same_run,
    batch,
    in_parts,
    trained,
    whole,
)


@pytest.mark.parametrize("fisher", FISHERS)
def test_an_optimizer_for_each_part_takes_what_it_takes_of_the_whole(fisher):
    def factors(loss_of):
        net = kfc_fx.compile(Siamese())
        statistics = kfc_fx.Statistics(fisher=fisher, samples=None)
        parts = (net.body, net.head)
        opts = [
            kfc_fx.KFC(part.parameters(), model=net, seed=1, statistics=statistics)
            for part in parts
        ]
        loss_of(net, *batch(0)).backward()
        for opt in opts:
            opt.step()
        return opts[0].factors["body.1"], opts[1].factors["head"]

    def parts(net, x, labels):
        return F.cross_entropy(net.head(net.body(x) - net.body(x.flip(0))), labels)

    for own, expected in zip(factors(parts), factors(whole), strict=True):
        torch.testing.assert_close(own.omega, expected.omega)
        torch.testing.assert_close(own.gamma, expected.gamma)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_head_that_is_frozen_has_the_prediction(fisher, scaling):
    def frozen():
        net = Coder()
        net.head.requires_grad_(False)
        return net

    options = {"scaling": scaling, "statistics": kfc_fx.Statistics(fisher=fisher)}
    found = trained(frozen(), in_parts, **options)
    assert_same_run(found, trained(frozen(), whole, **options))


@pytest.mark.parametrize("fisher", FISHERS)
def test_several_batches_in_one_backward_pass_count_all_examples(fisher):
    def twice(loss_of):
        def summed(net, x, labels):
            return loss_of(net, x[:8], labels[:8]) + loss_of(net, x[8:], labels[8:])

        return summed

    options = {"statistics": kfc_fx.Statistics(fisher=fisher, samples=None), "steps": 1}
    _, opt = trained(Agent(), twice(agent_of_actor), **options)
    _, its = trained(Agent(), twice(agent_of_actor_at_once), **options)
    for name in ("body.1", "actor"):
        torch.testing.assert_close(opt.factors[name].omega, its.factors[name].omega)
    if fisher == "empirical":
        torch.testing.assert_close(opt.factors["actor"].gamma, its.factors["actor"].gamma)


def agent_of_actor(net, x, labels):
    return F.cross_entropy(net.actor(net.body(x)), labels)


def agent_of_actor_at_once(net, x, labels):
    return F.cross_entropy(net(x)[0], labels)


def test_a_term_on_features_leaves_the_prediction_to_the_head():
    def consistent(net, x, labels):
        hidden = net.body(x)
        loss = F.cross_entropy(net.actor(hidden), labels)
        return loss + 1e-9 * F.mse_loss(net.body(x + 1), hidden.detach())

    statistics = kfc_fx.Statistics(fisher="empirical", samples=None)
    net, opt = trained(Agent(), consistent, statistics=statistics, steps=1)
    _, its = trained(Agent(), agent_of_actor, statistics=statistics, steps=1)
    assert "Categorical" in net.kfc.plan.likelihood[0]
    for name in ("body.1", "actor"):
        torch.testing.assert_close(opt.factors[name].omega, its.factors[name].omega)
        torch.testing.assert_close(
            opt.factors[name].gamma, its.factors[name].gamma, rtol=1e-4, atol=1e-6
        )


def test_scalings_of_each_part():
    options = {"blocks": {"head": "spectral"}, "statistics": kfc_fx.Statistics(every=2)}
    assert_same_run(trained(Coder(), in_parts, **options), trained(Coder(), whole, **options))


def test_branches_of_other_numbers_of_examples_have_their_own_scale():
    """The critic sees half of the examples, by a mean of its own."""

    def halved(net, x, labels):
        hidden = net.body(x)
        value = net.critic(hidden[:8])[:, 0]
        return F.cross_entropy(net.actor(hidden), labels) + (value - labels[:8]).square().mean()

    def critic_alone(net, x, labels):
        value = net.critic(net.body(x[:8]))[:, 0]
        return (value - labels[:8]).square().mean()

    options = {"statistics": kfc_fx.Statistics(fisher="empirical", samples=None), "steps": 1}
    _, opt = trained(Agent(), halved, **options)
    _, its = trained(Agent(), critic_alone, **options)
    torch.testing.assert_close(opt.factors["critic"].gamma, its.factors["critic"].gamma)
