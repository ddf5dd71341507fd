"""Small networks and batches that several tests train."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.optim.states.state_dict import unpacked
from kfc_fx.statistics.collector import Collector
from tests.options import kfc

GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.randn(12, 2, 6, 6, generator=GENERATOR)
LABELS = torch.randint(5, (12,), generator=GENERATOR)


def conv_network() -> nn.Sequential:
    """Two convs with in-place activations, a norm, and a head; seeded."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


class TokenNet(nn.Module):
    """Plain and grouped conv, norm, dropout, and a linear layer over tokens; in-place ReLUs."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False)
        self.drop = nn.Dropout(dropout)
        self.tokens = nn.Linear(4, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(F.relu(self.conv(x), inplace=True)), inplace=True)
        x = self.drop(F.relu(self.grouped(x), inplace=True))
        tokens = F.relu(self.tokens(x.flatten(2).transpose(1, 2)), inplace=True)
        return self.head(tokens.mean(1))


def token_network(dropout: float = 0.5) -> TokenNet:
    """A seeded :class:`TokenNet`."""
    torch.manual_seed(0)
    return TokenNet(dropout)


def make(
    net: nn.Module | None = None,
    *,
    norm_layers: bool = True,
    backend: str = "eager",
    likelihood: str = "auto",
    **options: object,
) -> tuple[nn.Module, kfc_fx.KFC]:
    """A compiled network and a KFC with a fixed seed for it."""
    net = conv_network() if net is None else net
    compiled = kfc_fx.compile(net, norm_layers=norm_layers, backend=backend, likelihood=likelihood)
    return compiled, kfc(compiled, **{"lr": 0.01, "seed": 3, **options})


def make_always_due(net: nn.Module, **options: object) -> tuple[nn.Module, kfc_fx.KFC]:
    """:func:`make`, with statistics and refreshes due at every step."""
    return make(net, **{"every": 1, "refresh_every": 1, **options})


def first_factors(
    net: nn.Module, x: Tensor, y: Tensor, **options: object
) -> tuple[nn.Module, Mapping[str, kfc_fx.Factors]]:
    """A compiled network and the factors of one batch, with its true targets."""
    compiled = kfc_fx.compile(net)
    opt = kfc(compiled, lr=0.0, **{"fisher": "empirical", **options})
    F.cross_entropy(compiled(x), y).backward()
    opt.step()
    return compiled, opt.factors


def losses(
    compiled: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int
) -> list[float]:
    """Train on one batch; the loss before each step."""
    seen = []
    for _ in range(steps):
        torch.manual_seed(1)
        loss = F.cross_entropy(compiled(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        seen.append(loss.item())
    return seen


def collector_of(compiled: nn.Module) -> Collector:
    """What takes the statistics of a model that has one optimizer."""
    (collector,) = compiled.kfc.collectors
    return collector


def backward(model: nn.Module, x: Tensor = IMAGES, y: Tensor = LABELS) -> Tensor:
    """Forward and backward pass under a fixed seed; returns the output."""
    torch.manual_seed(7)
    output = model(x)
    F.cross_entropy(output, y).backward()
    return output


def train(
    compiled: nn.Module, opt: torch.optim.Optimizer, steps: int, scheduler: object = None
) -> list[float]:
    """Steps on rolling batches; returns the losses."""
    losses = []
    for step in range(steps):
        index = torch.arange(step, step + 8) % 12
        loss = F.cross_entropy(compiled(IMAGES[index]), LABELS[index])
        loss.backward()
        opt.step()
        opt.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def parameters(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Bit for bit."""
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


def assert_equal_state(found: nn.Module, expected: nn.Module) -> None:
    """Same keys, and every parameter and buffer bit for bit."""
    expected_state = expected.state_dict()
    assert list(found.state_dict()) == list(expected_state)
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected_state[name]), name


def count_calls_of_emitting_graphs(monkeypatch) -> list[int]:
    """A list that grows by one at every call of an emitting graph compiled from now on."""
    module = sys.modules["kfc_fx.rewrite.emitting_graph"]
    calls: list[int] = []
    own = module.compile_emitting

    def counted(*args, **kwargs):
        run = own(*args, **kwargs)

        def counting(*inputs):
            calls.append(1)
            return run(*inputs)

        return counting

    monkeypatch.setattr(module, "compile_emitting", counted)
    return calls


def count_compiled_emitting_graphs(monkeypatch) -> list[int]:
    """A list that grows by one whenever an emitting graph is compiled."""
    module = sys.modules["kfc_fx.rewrite.emitting_graph"]
    compiled: list[int] = []
    own = module.compile_emitting
    monkeypatch.setattr(
        module, "compile_emitting", lambda *given: compiled.append(1) or own(*given)
    )
    return compiled


def past(net: nn.Module) -> nn.Module:
    """A twin that is not compiled and has the same parameters: calls of it go past kfc_fx."""
    held = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    return kfc_fx.uncompile(copy.deepcopy(net, held))


def saved_state(opt: kfc_fx.KFC, state_dict: dict | None = None) -> dict:
    """What is saved of an optimizer's first model, or was, by block and parameter name, with what
    is of neither."""
    place = opt._models[0].place(opt.param_groups)
    saved = opt.state_dict() if state_dict is None else state_dict
    state, record = unpacked(saved, opt._parameters, [place])[0]
    return {**vars(state), **record}


def assert_same_state(found: dict, expected: dict) -> None:
    """Words are compared too, which torch.testing does not take."""
    words = ("likelihood", "plan", "parked")
    assert [found[name] for name in words] == [expected[name] for name in words]
    numbers = [{k: v for k, v in own.items() if k not in words} for own in (found, expected)]
    torch.testing.assert_close(*numbers, rtol=0, atol=0)
