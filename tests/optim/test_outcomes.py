"""Every way to use a parameter has a named outcome, and never a wrong block."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import kfc_fx


class Net(nn.Module):
    """A hidden layer in some form, and a classifier."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.head = nn.Linear(6, 5)


class Checkpointed(Net):
    def forward(self, x):
        return self.head(checkpoint(lambda t: self.hidden(t).tanh(), x, use_reentrant=False))


class Nested(Net):
    def inner(self, x):
        return checkpoint(lambda t: self.other(t).tanh(), self.hidden(x), use_reentrant=False)

    def forward(self, x):
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


class Conditional(Net):
    def forward(self, x):
        chosen = torch.cond(
            x.sum() > 0, lambda t: self.hidden(t).sin(), lambda t: self.other(t).cos(), (x,)
        )
        return self.head(chosen)


class Recurrent(Net):
    def forward(self, x):
        return self.head(self.hidden(x.unflatten(1, (2, 2)).repeat(1, 1, 2))[0][:, -1])


class Cell(Net):
    def forward(self, x):
        h = x.new_zeros(len(x), 6)
        c = h
        for _ in range(3):
            h, c = self.hidden(x, (h, c))
        return self.head(h)


class WrittenCell(Net):
    def forward(self, x):
        h = x.new_zeros(len(x), 6)
        for _ in range(3):
            h = (self.hidden(x) + self.other(h)).tanh()
        return self.head(h)


class Direct(Net):
    def forward(self, x):
        return self.head(self.hidden(x).tanh())


class TwoInputs(Net):
    def forward(self, x):
        return self.head(self.hidden(x, x).tanh())


class Adapter(Net):
    """A frozen layer with a low-rank adapter, applied in two steps or merged into the weight."""

    def __init__(self, merged: bool) -> None:
        super().__init__(base=nn.Linear(4, 6).requires_grad_(False))
        self.down = nn.Parameter(torch.randn(2, 4))
        self.up = nn.Parameter(torch.randn(6, 2))
        self.merged = merged

    def forward(self, x):
        if self.merged:
            hidden = F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)
        else:
            hidden = self.base(x) + (x @ self.down.T) @ self.up.T
        return self.head(hidden.tanh())


class Broken(Net):
    def forward(self, x):
        hidden = self.hidden(x)
        if hidden.sum().item() > 0:  # Python that depends on data: the graph breaks here
            hidden = hidden * 2
        return {"logits": self.head(hidden), "hidden": hidden}


CASES = {
    "checkpoint": (lambda: Checkpointed(hidden=nn.Linear(4, 6)), {}, {"hidden", "head"}),
    "checkpoint in a checkpoint": (
        lambda: Nested(hidden=nn.Linear(4, 6), other=nn.Linear(6, 6)),
        dict.fromkeys(["other.weight", "other.bias"], "inside an activation checkpoint within"),
        {"hidden", "head"},
    ),
    "cond": (
        lambda: Conditional(hidden=nn.Linear(4, 6), other=nn.Linear(4, 6)),
        {f"{n}.{p}": "conditional region" for n in ("hidden", "other") for p in ("weight", "bias")},
        {"head"},
    ),
    "lstm": (
        lambda: Recurrent(hidden=nn.LSTM(4, 6, batch_first=True)),
        dict.fromkeys(
            [f"hidden.{k}_{s}_l0" for k in ("weight", "bias") for s in ("ih", "hh")],
            "a fused recurrent layer",
        ),
        {"head"},
    ),
    "gru": (
        lambda: Recurrent(hidden=nn.GRU(4, 6, batch_first=True, bias=False)),
        dict.fromkeys([f"hidden.weight_{s}_l0" for s in ("ih", "hh")], "a fused recurrent layer"),
        {"head"},
    ),
    "lstm cell": (
        lambda: Cell(hidden=nn.LSTMCell(4, 6, bias=False)),
        dict.fromkeys([f"hidden.weight_{s}" for s in ("ih", "hh")], "a fused recurrent cell"),
        {"head"},
    ),
    "written cell": (
        lambda: WrittenCell(hidden=nn.Linear(4, 6), other=nn.Linear(6, 6)),
        {},
        {"hidden", "other", "head"},
    ),
    "weight norm": (
        lambda: Direct(hidden=weight_norm(nn.Linear(4, 6))),
        {
            "hidden.bias": "linear",
            "hidden.parametrizations.weight.original0": "_weight_norm",
            "hidden.parametrizations.weight.original1": "_weight_norm",
        },
        {"head"},
    ),
    "spectral norm": (
        lambda: Direct(hidden=spectral_norm(nn.Linear(4, 6))),
        {"hidden.bias": "linear", "hidden.parametrizations.weight.original": "_SpectralNorm"},
        {"head"},
    ),
    "bilinear": (
        lambda: TwoInputs(hidden=nn.Bilinear(4, 4, 6)),
        {"hidden.weight": "a product of two inputs", "hidden.bias": "a product of two inputs"},
        {"head"},
    ),
    "adapter": (lambda: Adapter(merged=False), {}, {"down", "up", "head"}),
    "merged adapter": (
        lambda: Adapter(merged=True),
        {"down": "matmul", "up": "matmul"},
        {"head"},
    ),
    "graph break": (lambda: Broken(hidden=nn.Linear(4, 6)), {}, {"hidden", "head"}),
}


@pytest.mark.filterwarnings("ignore:.*sentinel:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_outcome(name):
    torch.manual_seed(0)
    build, reasons, blocks = CASES[name]
    net = build()
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(compiled, lr=0.01)
    x, y = torch.randn(8, 4), torch.randint(5, (8,))
    losses = []
    for _ in range(12):
        torch.manual_seed(1)
        output = compiled(x)
        loss = F.cross_entropy(output["logits"] if isinstance(output, dict) else output, y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    plan = compiled.kfc.plan
    assert {block.name for block in plan.blocks} == blocks
    assert {g.name for g in plan.generic} == set(reasons)
    for g in plan.generic:
        assert reasons[g.name] in g.reason, g.reason


def test_a_layer_in_a_loop_is_one_block_with_all_its_uses():
    compiled = kfc_fx.compile(WrittenCell(hidden=nn.Linear(4, 6), other=nn.Linear(6, 6)))
    plan = compiled.kfc.trace(torch.randn(8, 4))
    assert plan.block("other").uses == 3
    assert plan.block("head").uses == 1


def test_strict_accepts_a_model_whose_other_parameters_are_no_layers():
    compiled = kfc_fx.compile(Recurrent(hidden=nn.LSTM(4, 6, batch_first=True)), strict=True)
    assert len(compiled.kfc.trace(torch.randn(8, 4)).generic) == 4


def test_strict_names_the_region():
    net = Conditional(hidden=nn.Linear(4, 6), other=nn.Linear(4, 6))
    compiled = kfc_fx.compile(net, strict=True)
    with pytest.raises(kfc_fx.CoverageError, match=r"hidden\.weight: .*inside a conditional"):
        compiled.kfc.trace(torch.randn(8, 4))
