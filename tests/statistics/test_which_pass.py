"""Which backward passes statistics are taken from: those that fill the gradients of a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from tests.models import collector_of

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(1))
BOTH = pytest.mark.parametrize("fisher", ["empirical", "sampled"])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def make(fisher: str = "empirical", **options) -> tuple[nn.Module, kfc_fx.KFC]:
    net = kfc_fx.compile(mlp(), likelihood="categorical")
    statistics = kfc_fx.Statistics(fisher=fisher, samples=None, budget=None)  # type: ignore[arg-type]
    return net, kfc_fx.KFC(net, statistics=statistics, seed=0, **options)


def loss_of(net: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return F.cross_entropy(net(x), y)


def gammas(opt: kfc_fx.KFC) -> dict[str, Tensor]:
    return {name: own.gamma for name, own in opt.factors.items()}


def expected(fisher: str, **options) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Γ of every block, and the parameters after a step, of one backward pass."""
    net, opt = make(fisher, **options)
    loss_of(net).backward()
    opt.step()
    return gammas(opt), [p.detach().clone() for p in net.parameters()]


@BOTH
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_pass_to_the_input_before_the_loss_takes_nothing(fisher, create_graph):
    """Saliency: it goes through the same forward pass as the loss."""
    net, opt = make(fisher)
    x = X.clone().requires_grad_()
    z = net(x)
    torch.autograd.grad(z.sum(), x, retain_graph=True, create_graph=create_graph)
    assert not collector_of(net).sums.blocks
    F.cross_entropy(z, Y).backward()
    assert collector_of(net).sums.examples == 8
    opt.step()
    torch.testing.assert_close(gammas(opt), expected(fisher)[0])


@BOTH
def test_attacks_before_the_loss_count_for_nothing(fisher):
    net, opt = make(fisher, scaling="eigen")
    x = X.clone()
    for _ in range(5):
        x.requires_grad_()
        (g,) = torch.autograd.grad(loss_of(net, x), x)
        x = (x + 0.1 * g.sign()).detach()
    loss_of(net).backward()
    assert collector_of(net).sums.examples == 8
    opt.step()
    gamma, parameters = expected(fisher, scaling="eigen")
    torch.testing.assert_close(gammas(opt), gamma)
    torch.testing.assert_close([p.detach() for p in net.parameters()], parameters)


@BOTH
def test_a_penalty_on_the_gradient_of_the_input_takes_the_loss_alone(fisher):
    """As that of a Wasserstein GAN: a pass to the input within the loss."""
    net, opt = make(fisher)
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (loss_of(net) + g.square().sum()).backward()
    assert collector_of(net).sums.examples == 8
    opt.step()
    torch.testing.assert_close(gammas(opt), expected(fisher)[0])


@BOTH
def test_zero_grad_between_a_pass_to_the_input_and_the_loss(fisher):
    net, opt = make(fisher)
    x = X.clone().requires_grad_()
    z = net(x)
    torch.autograd.grad(z.sum(), x, retain_graph=True)
    opt.zero_grad()
    F.cross_entropy(z, Y).backward()
    opt.step()
    torch.testing.assert_close(gammas(opt), expected(fisher)[0])


@BOTH
def test_gradients_that_are_differentiated_are_exact(fisher):
    net, _opt = make(fisher)
    plain = mlp()
    found = []
    for model in (net, plain):
        gradients = torch.autograd.grad(loss_of(model), list(model.parameters()), create_graph=True)
        square = sum(g.square().sum() for g in gradients)
        found.append([*gradients, *torch.autograd.grad(square, list(model.parameters()))])
    torch.testing.assert_close(*found, rtol=0, atol=1e-15)


# -- gradients that are dropped --------------------------------------------------------------


def drop_by_model(net: nn.Module, opt: kfc_fx.KFC) -> None:
    net.zero_grad()


def drop_by_parameter(net: nn.Module, opt: kfc_fx.KFC) -> None:
    for p in net.parameters():
        p.grad = None


def drop_by_optimizer(net: nn.Module, opt: kfc_fx.KFC) -> None:
    opt.zero_grad()


def drop_to_zeros(net: nn.Module, opt: kfc_fx.KFC) -> None:
    net.zero_grad(set_to_none=False)


def drop_to_zeros_by_optimizer(net: nn.Module, opt: kfc_fx.KFC) -> None:
    opt.zero_grad(set_to_none=False)


DROPS = [
    drop_by_model,
    drop_by_parameter,
    drop_by_optimizer,
    drop_to_zeros,
    drop_to_zeros_by_optimizer,
]


@BOTH
@pytest.mark.parametrize("drop", DROPS)
def test_statistics_go_with_the_gradients_that_are_dropped(drop, fisher):
    net, opt = make(fisher)
    F.cross_entropy(net(X + 1), Y).backward()
    drop(net, opt)
    if fisher == "sampled":  # the same targets as alone
        collector_of(net).generator(torch.device("cpu")).manual_seed(0)
    loss_of(net).backward()
    assert collector_of(net).sums.examples == 8
    opt.step()
    torch.testing.assert_close(gammas(opt), expected(fisher)[0])


def test_gradients_that_are_kept_keep_their_statistics():
    net, opt = make()
    (loss_of(net, X[:4], Y[:4]) / 2).backward()
    (loss_of(net, X[4:], Y[4:]) / 2).backward()
    assert collector_of(net).sums.examples == 8
    opt.step()
    torch.testing.assert_close(gammas(opt), expected("empirical")[0])


def test_gradients_that_are_assigned_keep_their_statistics():
    """Two micro-batches by ``autograd.grad``, whose gradients are nowhere in between."""
    net, opt = make()
    parameters = list(net.parameters())
    parts = [
        torch.autograd.grad(loss_of(net, X[half], Y[half]) / 2, parameters)
        for half in (slice(0, 4), slice(4, 8))
    ]
    for p, *own in zip(parameters, *parts, strict=True):
        p.grad = sum(own)
    assert collector_of(net).sums.examples == 8
    opt.step()
    torch.testing.assert_close(gammas(opt), expected("empirical")[0])


def test_replaced_gradients_keep_their_statistics():
    """Clipped, projected or averaged ones, that are new tensors."""
    net, opt = make()
    loss_of(net).backward()
    for p in net.parameters():
        p.grad = 0.5 * p.grad
    opt.step()
    torch.testing.assert_close(gammas(opt), expected("empirical")[0])


def test_a_discriminator_takes_none_from_the_pass_of_its_generator():
    """The generator's loss goes through it, with other targets, and its gradients are dropped."""
    net, opt = make()
    generator = nn.Linear(6, 6).double()
    F.cross_entropy(net(generator(X)), 2 - Y).backward()
    net.zero_grad()
    loss_of(net).backward()
    assert collector_of(net).sums.examples == 8
    opt.step()
    torch.testing.assert_close(gammas(opt), expected("empirical")[0])


def test_a_block_whose_gradient_alone_is_dropped_keeps_its_factors():
    net, opt = make()
    loss_of(net).backward()
    opt.step()
    before = gammas(opt)
    opt.zero_grad()
    loss_of(net).backward()
    net[0].weight.grad = net[0].bias.grad = None
    opt.step()
    torch.testing.assert_close(gammas(opt)["0"], before["0"])
    assert not torch.allclose(gammas(opt)["2"], before["2"], rtol=1e-3)


# -- a step within the backward pass ---------------------------------------------------------


@BOTH
def test_a_step_within_the_backward_pass_works_or_says_what_does(fisher):
    net, opt = make(fisher)
    left = len(list(net.parameters()))

    def step(_: Tensor) -> None:
        nonlocal left
        left -= 1
        if not left:
            opt.step()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step)
    if fisher == "empirical":
        with pytest.raises(kfc_fx.StatisticsError, match=r"within the backward pass.*'sampled'"):
            loss_of(net).backward()
    else:
        loss_of(net).backward()
        torch.testing.assert_close(gammas(opt), expected(fisher)[0])
