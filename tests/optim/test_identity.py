"""Parameters are objects: their names, and the groups that hold them, may change at any time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import kfc_fx
from tests.models import saved_state

X = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
W = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


class Run:
    """A compiled network, its optimizer, and the same batches whoever trains."""

    def __init__(self, net: nn.Module, opt: kfc_fx.KFC) -> None:
        self.net, self.opt, self.count = net, opt, 0

    def train(self, steps: int) -> float:
        for _ in range(steps):
            x = X[torch.arange(64 * self.count, 64 * (self.count + 1)) % len(X)]
            self.count += 1
            self.opt.zero_grad()
            loss = F.cross_entropy(self.net(x), (x @ W).argmax(1))
            loss.backward()
            self.opt.step()
        return float(loss.detach())


def start(net: nn.Module | None = None, **options) -> Run:
    net = kfc_fx.compile(mlp() if net is None else net)
    return Run(net, kfc_fx.KFC(net, seed=0, **options))


def moved(before: Tensor, after: Tensor) -> float:
    return float((after.detach() - before).norm() / before.norm())


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def pruned(net: nn.Module):
    prune.l1_unstructured(net[0], "weight", 0.5)
    return lambda: net[0].weight_orig, lambda: prune.remove(net[0], "weight")


def parametrized(net: nn.Module):
    parametrize.register_parametrization(net[0], "weight", Scaled())
    back = lambda: parametrize.remove_parametrizations(net[0], "weight")  # noqa: E731
    return lambda: net[0].parametrizations.weight.original, back


@pytest.mark.filterwarnings("ignore:updated as generic parameters from now on:kfc_fx.KfcWarning")
@pytest.mark.parametrize("change", [pruned, parametrized])
def test_a_reparametrised_weight_is_trained_at_once_and_has_its_block_back(change):
    run = start()
    run.train(24)
    saved = saved_state(run.opt)["blocks"]["0"]
    held, back = change(run.net)
    before = held().detach().clone()
    run.train(1)
    assert moved(before, held()) > 1e-5
    run.train(14)
    assert moved(before, held()) > 1e-3
    reasons = {generic.name: generic.reason for generic in run.net.kfc.plan.generic}
    (name,) = (n for n in reasons if n.startswith("0.") and "weight" in n)
    assert "not used" not in reasons[name]
    assert {block.name for block in run.net.kfc.plan.blocks} == {"2"}
    back()
    run.train(1)
    assert {block.name for block in run.net.kfc.plan.blocks} == {"0", "2"}
    again = saved_state(run.opt)["blocks"]["0"]
    assert again["mass"].max() >= saved["mass"].max()  # it did not begin anew
    assert run.train(20) < 0.5


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("scaling", ["adam", "eigen"])
def test_a_wrapped_layer_keeps_its_state(scaling):
    """The function of the network is the same, and so are its steps."""
    run, plain = start(scaling=scaling), start(scaling=scaling)
    for own in (run, plain):
        own.train(30)
    run.net[0] = Wrapped(run.net[0])
    for own in (run, plain):
        own.train(5)
    found = dict(zip(plain.net.state_dict(), run.net.state_dict().values(), strict=True))
    torch.testing.assert_close(found, dict(plain.net.state_dict()), rtol=0, atol=0)
    assert set(saved_state(run.opt)["blocks"]) == {"0.inner", "2"}


def test_an_adapter_around_a_layer_trains_beside_it():
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 12, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    run = start()
    run.train(12)
    run.net[0] = Adapter(run.net[0])
    new = [run.net[0].down.weight, run.net[0].up.weight]
    run.opt.add_param_group({"params": new})
    before = [p.detach().clone() for p in (*new, run.net[0].base.weight)]
    run.train(3)
    assert all(moved(b, p) > 1e-4 for b, p in zip(before, new, strict=False))
    assert moved(before[2], run.net[0].base.weight) == 0
    assert {block.name for block in run.net.kfc.plan.blocks} == {"0.down", "0.up", "2"}


def test_a_replaced_head_is_added_by_a_group():
    run = start()
    run.train(12)
    run.net[2] = nn.Linear(12, 3)
    run.opt.add_param_group({"params": list(run.net[2].parameters()), "lr": 0.02})
    before = run.net[2].weight.detach().clone()
    run.train(2)
    assert moved(before, run.net[2].weight) > 1e-3
    assert run.train(25) < 0.6


def test_a_layer_that_joins_is_added_by_a_group():
    run = start()
    run.train(12)
    run.net.append(nn.Linear(3, 3))
    before = run.net[3].weight.detach().clone()
    run.train(1)
    assert moved(before, run.net[3].weight) == 0  # no group has it yet
    run.opt.add_param_group({"params": list(run.net[3].parameters())})
    run.train(2)
    assert moved(before, run.net[3].weight) > 1e-3
    assert "3" in run.opt.factors


# -- groups ----------------------------------------------------------------------------------


def test_a_group_whose_list_is_replaced_updates_what_is_in_it():
    net = kfc_fx.compile(mlp())
    opt = kfc_fx.KFC([{"params": list(net[0].parameters())}], model=net)
    run = Run(net, opt)
    run.train(8)
    before = [p.detach().clone() for p in net.parameters()]
    opt.param_groups[0]["params"] = list(net[2].parameters())
    run.train(2)
    distances = [moved(b, p) for b, p in zip(before, net.parameters(), strict=True)]
    assert distances[:2] == [0, 0]
    assert min(distances[2:]) > 1e-3
    assert "2" in opt.factors


def test_groups_that_exchange_parameters_exchange_their_rates():
    net = kfc_fx.compile(mlp())
    groups = [
        {"params": list(net[0].parameters()), "lr": 0.0},
        {"params": list(net[2].parameters()), "lr": 0.02},
    ]
    opt = kfc_fx.KFC(groups)
    run = Run(net, opt)
    run.train(3)
    one, other = opt.param_groups
    one["params"], other["params"] = other["params"], one["params"]
    before = [p.detach().clone() for p in net.parameters()]
    run.train(2)
    distances = [moved(b, p) for b, p in zip(before, net.parameters(), strict=True)]
    assert distances[2:] == [0, 0]
    assert min(distances[:2]) > 1e-3


def test_parameters_that_are_replaced_in_the_model_and_in_the_groups_go_on():
    """As sharding and some devices do: other tensors of the same values under the same names."""
    run, plain = start(), start()
    for own in (run, plain):
        own.train(25)
    new = {}
    for module in run.net.modules():
        for name, p in list(module._parameters.items()):
            new[p] = module._parameters[name] = nn.Parameter(p.detach().clone())
    for group in run.opt.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    for own in (run, plain):
        own.train(6)
    torch.testing.assert_close(
        dict(run.net.state_dict()), dict(plain.net.state_dict()), rtol=1e-3, atol=1e-4
    )


# -- frozen for a while ----------------------------------------------------------------------


def test_halves_that_are_frozen_by_turns_build_no_update_each_step(monkeypatch):
    from kfc_fx.optim import engines

    built = []
    engine = engines.UpdateEngine
    monkeypatch.setattr(engines, "UpdateEngine", lambda *a, **k: built.append(1) or engine(*a, **k))
    run = start()
    run.train(3)
    for step in range(12):
        run.net[0].requires_grad_(step % 2 == 0)
        run.net[2].requires_grad_(step % 2 == 1)
        before = [p.detach().clone() for p in run.net.parameters()]
        run.train(1)
        distances = [moved(b, p) for b, p in zip(before, run.net.parameters(), strict=True)]
        frozen = distances[2:] if step % 2 == 0 else distances[:2]
        assert frozen == [0, 0]
        assert min(set(distances) - {0}) > 1e-4
    assert len(built) == 1


@pytest.mark.parametrize("steps", [3, 30])
def test_a_layer_that_was_frozen_for_some_steps_has_its_state_afterwards(steps):
    run = start()
    run.train(24)
    before = saved_state(run.opt)["blocks"]["0"]
    run.net[0].requires_grad_(False)
    run.train(steps)
    while_frozen = saved_state(run.opt)["blocks"]["0"]
    run.net[0].requires_grad_(True)
    for name in ("m", "v"):  # a refresh of the basis turns them
        torch.testing.assert_close(while_frozen[name].norm(), before[name].norm(), rtol=0.1, atol=0)
    saved = copy.deepcopy(run.opt.state_dict())
    run.train(1)
    after = saved_state(run.opt)["blocks"]["0"]
    assert not torch.equal(after["m"], before["m"])
    assert float(after["m"].norm()) > 0.2 * float(before["m"].norm())
    assert saved_state(run.opt, saved)["blocks"].keys() == {"0", "2"}


def test_a_layer_that_moves_to_the_place_of_another_takes_its_own_state():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    run = start(net)
    run.train(25)
    own = saved_state(run.opt)["blocks"]["0"]
    kept = run.net[0]
    run.net[1] = kept
    run.net[0] = nn.Linear(6, 6)
    run.opt._models[0].binding.follow()
    saved = saved_state(run.opt)["blocks"]
    assert torch.equal(saved["1"]["m"], own["m"])
    assert "0" not in saved


def test_a_replaced_parameter_in_half_precision_is_not_overwritten():
    """Its copy in single precision is a new one."""
    net = kfc_fx.compile(mlp().bfloat16())
    opt = kfc_fx.KFC(net, lr=1e-4, master_weights=True)

    def step() -> None:
        opt.zero_grad()
        F.cross_entropy(net(X[:64].bfloat16()).float(), (X[:64] @ W).argmax(1)).backward()
        opt.step()

    for _ in range(3):
        step()
    new = nn.Parameter(torch.full_like(net[2].weight, 0.25))
    group = opt.param_groups[0]["params"]
    group[[p is net[2].weight for p in group].index(True)] = new
    net[2].weight = new
    step()
    torch.testing.assert_close(new.detach(), torch.full_like(new, 0.25), rtol=0.05, atol=0.01)


def test_a_generic_parameter_of_another_size_begins_anew():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.shift = nn.Linear(6, 3), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.head(x) + torch.tanh(self.shift)

    net = kfc_fx.compile(Shifted())
    opt = kfc_fx.KFC(net, average=4.0)
    x = torch.randn(8, 6)

    def step():
        opt.zero_grad()
        F.cross_entropy(net(x), torch.arange(8) % 3).backward()
        opt.step()

    step()
    net.head, net.shift = nn.Linear(6, 5), nn.Parameter(torch.zeros(5))
    opt.add_param_group({"params": [*net.head.parameters(), net.shift]})
    for _ in range(2):
        step()
    assert net.shift.any()
    assert opt.state[net.shift]["m"].shape == (5,)
