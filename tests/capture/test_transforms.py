"""Transforms around a compiled model: right values, and training goes on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import kfc_fx

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (64,), generator=torch.Generator().manual_seed(1))


FastWeights = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
"""From a network and its parameters by name to the weights that it runs with."""


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        opt.step()


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def of_weights(net: nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(net, weights, (x,)), y)


def per_sample(net: nn.Module) -> object:
    own = grad(lambda w, x, y: of_weights(net, w, x[None], y[None]))
    return vmap(own, (None, 0, 0))(weights_of(net), X, Y)


def ensemble(net: nn.Module) -> Tensor:
    weights, buffers = stack_module_state([net, copy.deepcopy(net)])
    return vmap(lambda w, b: functional_call(net, (w, b), (X,)))(weights, buffers)


def dual(net: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(X, X))).tangent


def exported(strict: bool) -> Callable[[nn.Module], Tensor]:
    return lambda net: torch.export.export(net, (X,), strict=strict).module()(X)


TRANSFORMS: dict[str, Callable[[nn.Module], object]] = {
    "functional_call": lambda net: functional_call(net, weights_of(net), (X,)),
    "grad": lambda net: grad(lambda w: of_weights(net, w, X, Y))(weights_of(net)),
    "per-sample gradients": per_sample,
    "vmap": lambda net: vmap(net)(X),
    "vmap of an ensemble": ensemble,
    "jvp": lambda net: jvp(net, (X,), (X,)),
    "jacrev": lambda net: jacrev(net)(X[0]),
    "hessian": lambda net: hessian(lambda x: net(x).sum())(X[0]),
    "forward mode": dual,
    "make_fx": lambda net: make_fx(net)(X)(X),
    "symbolic_trace": lambda net: torch.fx.symbolic_trace(net)(X),
    "jit.trace": lambda net: torch.jit.trace(net, (X,))(X),
    "export": exported(strict=False),
    "strict export": exported(strict=True),
    "swa_utils.AveragedModel": lambda net: torch.optim.swa_utils.AveragedModel(net)(X),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_what_it_gives_of_the_plain_model(name, steps):
    """Before the first step and after some, and every due step after it has its statistics."""
    torch._dynamo.reset()
    net = kfc_fx.compile(mlp())
    opt = kfc_fx.KFC(net, seed=0)
    train(net, opt, steps)
    plain = mlp()
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(TRANSFORMS[name](net), TRANSFORMS[name](plain))
    train(net, opt, 8)
    reference = kfc_fx.compile(mlp())
    other = kfc_fx.KFC(reference, seed=0)
    train(reference, other, steps + 8)
    torch.testing.assert_close(dict(net.state_dict()), dict(reference.state_dict()))
    assert opt.diagnostics.statistics_steps == other.diagnostics.statistics_steps
    assert opt.diagnostics.missed_statistics == 0


def trained() -> tuple[nn.Module, nn.Module, kfc_fx.KFC]:
    """A compiled network after some steps, a plain one of the same weights, and the optimizer."""
    net = kfc_fx.compile(mlp())
    opt = kfc_fx.KFC(net, seed=0)
    train(net, opt, 3)
    plain = mlp()
    plain.load_state_dict(net.state_dict())
    return net, plain, opt


def gradients_through(net: nn.Module, fast_of: FastWeights) -> list[Tensor]:
    """Gradients of the parameters of a loss by fast weights, left in place too."""
    weights = dict(net.named_parameters())
    for p in weights.values():
        p.grad = None
    of_weights(net, fast_of(net, weights), X, Y).backward()
    return [p.grad for p in weights.values()]


def shrunk(_: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: 0.9 * p for name, p in weights.items()}


def adapted(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A step of MAML's inner loop."""
    loss = of_weights(net, weights, X, Y)
    inner = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    return {name: p - 0.1 * g for (name, p), g in zip(weights.items(), inner, strict=True)}


def test_steps_through_fast_weights_train_and_say_that_they_have_no_statistics():
    """The gradient is of the parameters, and the layers run with other tensors."""
    net, plain, opt = trained()
    found, expected = (gradients_through(model, shrunk) for model in (net, plain))
    torch.testing.assert_close(found, expected)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
    (message,) = {str(w.message) for w in caught}
    assert "other tensors in place of its parameters" in message
    assert opt.diagnostics.missed_statistics == 1
    train(net, opt, 6)
    assert opt.diagnostics.missed_statistics == 1


def test_the_inner_pass_of_maml_gives_the_statistics():
    """It is of the parameters themselves; the outer one is through fast weights."""
    net, plain, opt = trained()
    found, expected = (gradients_through(model, adapted) for model in (net, plain))
    torch.testing.assert_close(found, expected)
    before = opt.diagnostics.statistics_steps
    opt.step()
    assert opt.diagnostics.statistics_steps == before + 1
    assert opt.diagnostics.missed_statistics == 0


def test_a_rate_of_another_optimizer_is_told():
    net = kfc_fx.compile(mlp())
    with pytest.warns(kfc_fx.KfcWarning, match=r"lr=1: steps of scaling='adam' .* default is 0.01"):
        kfc_fx.KFC(net, lr=1.0)
    kfc_fx.KFC(net, lr=1.0, scaling="inverse")  # another warning would be an error
