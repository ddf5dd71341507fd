"""Layers inside an activation checkpoint: factors as without it, activations not kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfc_fx
from tests.models import first_factors, losses
from tests.options import kfc

DEPTH = 3


class Stack(nn.Module):
    """Images through blocks of a convolution, a norm and a linear layer, a block a checkpoint."""

    def __init__(self, checkpointed: bool, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, channels, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.Tanh(),
                nn.Linear(4, 4),
            )
            for _ in range(DEPTH)
        )
        self.head = nn.Linear(channels * 20, 5)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x.flatten(1))


def pair() -> tuple[Stack, Stack]:
    torch.manual_seed(0)
    plain = Stack(False).double().eval()  # a norm in training would see each batch twice
    inside = copy.deepcopy(plain)
    inside.checkpointed = True
    return plain, inside


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 2, 5, 4).double(), torch.randint(5, (6,))


def test_factors_are_those_without_it():
    plain, inside = pair()
    reference, expected = first_factors(plain, *data())
    compiled, factors = first_factors(inside, *data())
    assert compiled.kfc.plan == reference.kfc.plan
    assert len(compiled.kfc.plan.blocks) == 2 + 3 * DEPTH
    assert len({site.region for site in compiled.kfc.graphs[0].uses.sites}) == 1 + DEPTH
    for block in compiled.kfc.plan.blocks:
        torch.testing.assert_close(factors[block.name].omega, expected[block.name].omega)
        torch.testing.assert_close(factors[block.name].gamma, expected[block.name].gamma)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scaling", ["adam", "spectral"])
def test_it_trains_as_without_it(scaling, backend):
    runs = []
    for net in pair():
        compiled = kfc_fx.compile(net, backend=backend)
        opt = kfc(compiled, lr=0.01, scaling=scaling, every=2, seed=3)
        runs.append(losses(compiled, opt, *data(), 5))
    torch.testing.assert_close(runs[0], runs[1])
    assert runs[0][-1] < runs[0][0]


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass with statistics keeps for its backward pass."""
    compiled = kfc_fx.compile(net)
    _opt = kfc_fx.KFC(compiled, lr=0.01)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = compiled(x).sum()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    assert loss.requires_grad
    return sum(size for place, size in kept.items() if place not in own)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 40), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda t: F.dropout(self.first(t).tanh()), x, use_reentrant=False)
        return self.head(hidden)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("statistics", [False, True])
def test_the_same_elements_drop_again(backend, statistics):
    torch.manual_seed(0)
    net, seen = Dropping().double(), []
    x, y = torch.randn(6, 4).double(), torch.randint(5, (6,))
    for compiled in (False, True):
        if compiled:
            kfc_fx.compile(net, backend=backend)
        _opt = kfc_fx.KFC(net, lr=0.0) if compiled and statistics else None
        net.zero_grad()
        torch.manual_seed(5)
        F.cross_entropy(net(x), y).backward()
        seen.append((net.first.weight.grad.clone(), torch.rand(1)))
    torch.testing.assert_close(seen[0], seen[1])


def test_activations_of_a_region_are_not_kept():
    x = torch.randn(64, 2, 5, 4)
    plain, inside = (Stack(checkpointed, 16).eval() for checkpointed in (False, True))
    assert kept_bytes(inside, x) < kept_bytes(plain, x) / 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_transformer_with_gradient_checkpointing(backend):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=8, use_cache=False
    )
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(config)
    inside = copy.deepcopy(plain)
    if hasattr(inside, "activation_checkpointing_enable"):
        inside.activation_checkpointing_enable()
    else:
        inside.gradient_checkpointing_enable({"use_reentrant": False})
    tokens, factors = torch.randint(11, (3, 6)), []
    for net in (plain, inside):
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        compiled = kfc_fx.compile(net.train(), backend=backend)
        opt = kfc(compiled, lr=0.0, fisher="empirical")
        logits = compiled(input_ids=tokens).logits
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        opt.step()
        factors.append(opt.factors)
    assert set(factors[0]) == set(factors[1])
    assert any("mlp.c_fc" in name for name in factors[1])
    for name, own in factors[0].items():
        torch.testing.assert_close(factors[1][name].omega, own.omega, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(factors[1][name].gamma, own.gamma, rtol=1e-4, atol=1e-6)


def test_a_layer_used_inside_and_outside_is_one_block():
    class Shared(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 5)
            self.checkpointed = checkpointed

        def forward(self, x: Tensor) -> Tensor:
            if self.checkpointed:
                x = checkpoint(lambda t: self.layer(t).tanh(), x, use_reentrant=False)
            else:
                x = self.layer(x).tanh()
            return self.head(self.layer(x))

    torch.manual_seed(0)
    plain = Shared(False).double()
    inside = Shared(True).double()
    inside.load_state_dict(plain.state_dict())
    x, y = torch.randn(6, 4).double(), torch.randint(5, (6,))
    (_, expected), (compiled, factors) = (first_factors(net, x, y) for net in (plain, inside))
    assert compiled.kfc.plan.block("layer").uses == 2
    torch.testing.assert_close(factors["layer"].omega, expected["layer"].omega)
    torch.testing.assert_close(factors["layer"].gamma, expected["layer"].gamma)
