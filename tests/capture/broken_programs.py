"""Programs as people write them, which no compiler takes as one graph: random ones, as source.

Each is a class ``Net`` with a loop over blocks. Blocks break a graph in their middle, or not; the
loop has a break of its own, or not, and leaves blocks out, ends early, routes examples, recomputes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.plan.forms import factor_forms
from kfc_fx.statistics.request import StatisticsRequest
from kfc_fx.tools.zoo.layer_truth import LayerTruth, problems, watching_layers

WIDTH, CLASSES = 6, 3
SEED = 11

HEADER = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

@torch._dynamo.disable
def off(f, *args):
    return f(*args)

def hook(module, args, output):
    print(end="")
    return output * 1.25

"""

BREAKS = (
    "pass",
    'print(end="")',
    "torch._dynamo.graph_break()",
    "h = h * 2 if h.sum().item() > 0 else h * 0.5",
    "h = h * (1 + float(h.detach().numpy().mean() > 0))",
    "h = off(torch.tanh, h)",
    "self.calls += 1",
    "self.calls += 1; h = h * (1 + self.calls % 2)",
    "self.seen = str(h.shape)",
    "h = h + F.dropout(h, self.rate, self.training); self.rate += 0.01",
)
"""What stands between the two layers of a block; h is what the first one returned."""

LAYERS = {
    "linear": ("nn.Linear({w}, {m})", "nn.Linear({m}, {w}, bias={b})"),
    "conv": ("nn.Conv1d(1, {m}, 3, padding=1)", "nn.Conv1d({m}, 1, 1, groups=1, bias={b})"),
    "norm": ("nn.Sequential(nn.Linear({w}, {m}), nn.LayerNorm({m}))", "nn.Linear({m}, {w})"),
    "own": ("Own({w}, {m})", "nn.Linear({m}, {w}, bias={b})"),
}
OWN = '''
class Own(nn.Module):
    """A layer of the user's, with a number that differs from one to the next."""
    made = 0
    def __init__(self, c_in, c_out):
        super().__init__()
        self.weight, self.number = nn.Parameter(torch.randn(c_out, c_in)), Own.made
        Own.made += 1
    def forward(self, x):
        return F.linear(x, self.weight) * (1 + self.number / 8)

'''

LOOPS = {
    "plain": ["for block in self.blocks:", "    x = block(x)"],
    "print": ["for block in self.blocks:", '    print(end="")', "    x = block(x)"],
    "early exit": [
        "for block in self.blocks:",
        "    x = block(x)",
        "    if x.abs().mean().item() > self.bound: break",
    ],
    "layer drop": [
        "self.calls += 1",
        "for number, block in enumerate(self.blocks):",
        "    if (self.calls + number) % 3: x = block(x)",
    ],
    "routing": [
        "top = self.gate(x).argmax(-1)",
        "out = torch.zeros_like(x)",
        "for number, block in enumerate(self.blocks):",
        "    at = (top == number).nonzero()[:, 0]",
        "    if len(at): out = out.index_add(0, at, block(x[at]))",
        "x = x + out",
    ],
    "checkpoint": [
        "for block in self.blocks:",
        '    print(end="")',
        "    x = checkpoint(block, x, use_reentrant=False)",
    ],
    "checkpoint in a graph": [
        "for block in self.blocks:",
        "    x = checkpoint(block, x, use_reentrant=False)",
    ],
    "disabled": ["for block in self.blocks:", "    x = off(block, x)"],
    "without gradients": [
        "with torch.no_grad():",
        "    aim = self.blocks[0](x)",
        "for block in self.blocks:",
        "    x = block(x) + 0.1 * aim",
    ],
    "twice": ["for block in [*self.blocks, *self.blocks]:", "    x = block(x)"],
    "unrolled": ["x = self.blocks[0](x)", "x = self.blocks[-1](x)"],
}


@dataclass
class BrokenProgram:
    """Source of a network and what its checks need to know of it."""

    blocks: list[tuple[str, str, str]]
    """Kind of layers, break, second layer's bias of each class of blocks."""
    order: list[int]
    """Which class each block of the loop is of."""
    loop: str
    hooked: bool
    middle: int = 4
    backend: str = "eager"
    tokens: bool = False
    """Whether the columns of the input are tokens, of which batches have different numbers."""

    @property
    def source(self) -> str:
        """The network as a program."""
        classes = "".join(map(self._block, range(len(self.blocks))))
        made = ", ".join(f"Block{kind}()" for kind in self.order)
        hooks = "\n        for b in self.blocks: b.first.register_forward_hook(hook)"
        lines = "\n        ".join(LOOPS[self.loop])
        rows, mean = ("x[..., None]", "x.mean(1)") if self.tokens else ("x", "x")
        return (
            f"{HEADER}{OWN}{classes}"
            "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"        self.stem = nn.Linear({1 if self.tokens else 4}, {WIDTH})\n"
            f"        self.gate = nn.Linear({WIDTH}, {len(self.order)})\n"
            f"        self.blocks = nn.ModuleList([{made}])\n"
            f"        self.head = nn.Linear({WIDTH}, {CLASSES})\n"
            f"        self.calls, self.bound = 0, 0.8{hooks if self.hooked else ''}\n"
            f"    def forward(self, x):\n        x = self.stem({rows})\n        {lines}\n"
            f"        return self.head({mean})\n"
        )

    def _block(self, number: int) -> str:
        kind, broken, bias = self.blocks[number]
        sizes = {"w": WIDTH, "m": self.middle, "b": bias}
        first, second = (code.format(**sizes) for code in LAYERS[kind])
        before, after = (".unsqueeze(1)", ".squeeze(1)") if kind == "conv" else ("", "")
        return (
            f"class Block{number}(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"        self.first, self.second = {first}, {second}\n"
            "        self.calls, self.rate = 0, 0.1\n"
            f"    def forward(self, x):\n        h = self.first(x{before})\n        {broken}\n"
            f"        return x + self.second(h.tanh()){after}\n\n"
        )

    def build(self) -> nn.Module:
        """The network in float64, its parameters drawn under a fixed seed."""
        torch.manual_seed(0)
        namespace: dict = {}
        exec(compile(self.source, "<broken program>", "exec"), namespace)
        net = namespace["Net"]().double()
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -0.7, 0.7)
        return net

    def __repr__(self) -> str:
        return f"\n{self.source}# backend={self.backend!r}\n"

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(repr(self))


@st.composite
def broken_programs(draw, *, backends: tuple[str, ...] = ("eager",)) -> BrokenProgram:
    """Draw a program of one to three classes of blocks, and what is to run it."""
    block = st.tuples(
        st.sampled_from(sorted(LAYERS)), st.sampled_from(BREAKS), st.sampled_from(["True", "False"])
    )
    blocks = draw(st.lists(block, min_size=1, max_size=3))
    order = draw(st.lists(st.integers(0, len(blocks) - 1), min_size=2, max_size=4))
    loop = draw(st.sampled_from(sorted(LOOPS)))
    if loop.startswith("checkpoint"):  # the model itself is another, run again with another state
        blocks = [(k, "pass" if "+=" in b else b, bias) for k, b, bias in blocks]
    tokens = draw(st.booleans()) and loop != "routing"
    if tokens:
        blocks = [("linear" if kind == "conv" else kind, b, bias) for kind, b, bias in blocks]
    hooked, middle = draw(st.booleans()), draw(st.integers(2, 5))
    backend = draw(st.sampled_from(backends))
    return BrokenProgram(blocks, order, loop, hooked, middle, backend, tokens)


def factors_are_true(
    net: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    fisher: str,
    backend: str = "eager",
    *,
    tolerance: float = 1e-9,
) -> nn.Module:
    """Every pass with statistics has the factors that hooks see on an uncompiled copy, the same
    output and gradients, and leaves the same state behind.

    Returns:
        The compiled model.
    """
    reference = copy.deepcopy(net)
    compiled = kfc_fx.compile(net, backend=backend)
    forms_of = lambda block: factor_forms(block, "dense")  # noqa: E731
    collector = compiled.kfc.attach(StatisticsRequest(forms_of, fisher=fisher, seed=SEED))
    collector.arm()
    for x, y in batches:
        generator = torch.Generator().manual_seed(SEED)
        truth, expected = _pass(reference, x, y)
        torch.manual_seed(5)
        output = compiled(x)
        F.cross_entropy(output, y).backward()
        assert torch.equal(torch.rand(1), expected["random"])
        torch.testing.assert_close(output, expected["output"], rtol=0, atol=0)
        _same_gradients(net, reference, exact=backend == "eager")
        if fisher == "sampled":
            onehot = compiled.kfc.likelihood
            cotangent = onehot.sampled_cotangent(expected["output"].double(), generator)
            truth, _ = _pass(expected["before"], x, y, cotangent)
        statistics = collector.take()
        scale = 1.0 if fisher == "sampled" else float(len(x)) ** 2
        found, _, compared = problems(
            compiled.kfc.plan, statistics.blocks, truth, scale, tolerance, rows=statistics.rows
        )
        assert not found, "\n".join(found)
        assert compared
        assert all(b.isfinite().all() for b in net.buffers())
        net.zero_grad()
        reference.zero_grad()
    return compiled


def _pass(
    net: nn.Module, x: Tensor, y: Tensor, cotangent: Tensor | None = None
) -> tuple[LayerTruth, dict]:
    before = copy.deepcopy(net)
    with watching_layers(net) as truth:
        torch.manual_seed(5)
        output = net(x)
        number = torch.rand(1)
        if cotangent is None:
            F.cross_entropy(output, y).backward()
        else:
            output.backward(cotangent)
    return truth, {"output": output.detach(), "random": number, "before": before}


def _same_gradients(net: nn.Module, reference: nn.Module, *, exact: bool) -> None:
    others = dict(reference.named_parameters())
    for name, parameter in net.named_parameters():
        own, other = parameter.grad, others[name].grad
        assert (own is None) == (other is None), name
        if own is not None:
            error = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-9, "atol": 1e-12}
            torch.testing.assert_close(own, other, **error, msg=lambda m, n=name: f"{n}: {m}")


def batches(
    sizes: tuple[int, ...] = (6, 6, 4), lengths: tuple[int, ...] = (4,)
) -> list[tuple[Tensor, Tensor]]:
    """Batches of rows, of several sizes, and of several lengths in turn."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in sizes]
    return [
        (x[:, : lengths[number % len(lengths)]], torch.arange(len(x)) % CLASSES)
        for number, x in enumerate(rows)
    ]


def batches_for(program: BrokenProgram) -> list[tuple[Tensor, Tensor]]:
    """Three batches; of tokens, each of another length."""
    return batches(lengths=(4, 3, 2) if program.tokens else (4,))
