"""Random networks that fit together: shapes first, then only layers that the shape allows.

A network is drawn as source code. A failing example shrinks to a short one, and prints as a
program that can be run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import torch
from hypothesis import strategies as st
from torch import nn

CLASSES = 3
MOST_CHANNELS = 6
Draw = Callable[..., object]


@dataclass
class DrawnNetwork:
    """Source of a network's ``__init__`` and ``forward``, and of its example input."""

    inputs: str
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    couples_examples: bool = False
    """Whether an example's output depends on the others of its batch."""
    draws_numbers: bool = False
    """Whether the forward pass consumes random numbers."""

    @property
    def source(self) -> str:
        """The network as a program."""
        indented = "\n        "
        return (
            "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n\n"
            "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()"
            f"{indented}{indented.join(self.init)}\n"
            f"    def forward(self, x):{indented}{indented.join(self.forward)}"
            f"{indented}return x\n\n"
            f"def example(n):\n    return {self.inputs}\n"
        )

    def build(self, seed: int = 0) -> nn.Module:
        """The network in float64, its parameters drawn under ``seed``."""
        torch.manual_seed(seed)
        net = self._namespace()["Net"]().double()
        for parameter in net.parameters():  # weights of one and biases of zero hide errors
            nn.init.uniform_(parameter, -0.7, 0.7)
        return net

    def example(self, examples: int, seed: int = 1) -> torch.Tensor:
        """A batch."""
        torch.manual_seed(seed)
        return self._namespace()["example"](examples)

    def __repr__(self) -> str:
        return f"\n{self.source}"

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        """What hypothesis prints of a failing example."""
        printer.text(repr(self))

    def _namespace(self) -> dict:
        namespace: dict = {}
        exec(compile(self.source, "<drawn network>", "exec"), namespace)
        return namespace


@dataclass
class _Builder:
    draw: Draw
    network: DrawnNetwork
    kind: str
    """"map": [N, C, *spatial]; "tokens": [N, T, C]; "rows": [N, C]."""
    channels: int
    spatial: tuple[int, ...] = ()

    def integer(self, low: int, high: int) -> int:
        """One number, both ends included."""
        return self.draw(st.integers(low, high))  # type: ignore[return-value]

    def choose(self, *options: object) -> object:
        """One of the options."""
        return self.draw(st.sampled_from(options))

    def layer(self, code: str) -> str:
        """Add a submodule or parameter; returns its name."""
        name = f"l{len(self.network.init)}"
        self.network.init.append(f"self.{name} = {code}")
        return f"self.{name}"

    def apply(self, line: str) -> None:
        """Add a line to the forward pass."""
        self.network.forward.append(line)


def _convolution(b: _Builder) -> None:
    ndim = len(b.spatial)
    kernels, strides, paddings, dilations = [], [], [], []
    for size in b.spatial:
        padding = b.integer(0, 2)
        dilation = b.integer(1, 2)
        kernel = b.integer(1, max(1, min(3, (size + 2 * padding - 1) // dilation + 1)))
        kernels.append(kernel)
        paddings.append(padding)
        dilations.append(dilation)
        strides.append(b.integer(1, 2))
    groups = b.choose(*(g for g in (1, b.channels, 2) if b.channels % g == 0))
    out = groups * b.integer(1, max(1, MOST_CHANNELS // groups))  # type: ignore[operator]
    bias = b.choose(True, False)
    name = b.layer(
        f"nn.Conv{ndim}d({b.channels}, {out}, {tuple(kernels)}, stride={tuple(strides)}, "
        f"padding={tuple(paddings)}, dilation={tuple(dilations)}, groups={groups}, bias={bias})"
    )
    b.apply(f"x = {name}(x)")
    b.channels = out  # type: ignore[assignment]
    b.spatial = tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(b.spatial, kernels, strides, paddings, dilations, strict=True)
    )


def _transposed_convolution(b: _Builder) -> None:
    ndim = len(b.spatial)
    kernel, stride = b.integer(1, 3), b.integer(1, 2)
    padding = b.integer(0, (kernel - 1) // 2)
    extra = b.integer(0, stride - 1)
    groups = b.choose(*(g for g in (1, b.channels) if b.channels % g == 0))
    out = groups * b.integer(1, max(1, MOST_CHANNELS // groups))  # type: ignore[operator]
    name = b.layer(
        f"nn.ConvTranspose{ndim}d({b.channels}, {out}, {kernel}, stride={stride}, "
        f"padding={padding}, output_padding={extra}, groups={groups}, bias={b.choose(True, False)})"
    )
    b.apply(f"x = {name}(x)")
    b.channels = out  # type: ignore[assignment]
    b.spatial = tuple((s - 1) * stride - 2 * padding + kernel + extra for s in b.spatial)


def _residual(b: _Builder) -> None:
    ndim = len(b.spatial)
    mode = b.choose("zeros", "circular", "replicate")
    name = b.layer(
        f"nn.Conv{ndim}d({b.channels}, {b.channels}, 3, padding=1, padding_mode={mode!r})"
    )
    b.apply(f"x = x + {name}(x).tanh()")


def _shared_twice(b: _Builder) -> None:
    ndim = len(b.spatial)
    name = b.layer(f"nn.Conv{ndim}d({b.channels}, {b.channels}, 1)")
    b.apply(f"x = {name}({name}(x).sin())")


def _branches(b: _Builder) -> None:
    ndim = len(b.spatial)
    left, right = b.integer(1, 3), b.integer(1, 3)
    first = b.layer(f"nn.Conv{ndim}d({b.channels}, {left}, 1)")
    second = b.layer(f"nn.Conv{ndim}d({b.channels}, {right}, 3, padding=1, bias=False)")
    b.apply(f"x = torch.cat([{first}(x), {second}(x)], 1)")
    b.channels = left + right


def _batch_norm(b: _Builder) -> None:
    name = b.layer(f"nn.BatchNorm{len(b.spatial)}d({b.channels})")
    b.apply(f"x = {name}(x)")
    b.network.couples_examples = True


def _group_norm(b: _Builder) -> None:
    groups = b.choose(1, b.channels)
    if b.channels // groups * prod(b.spatial) > 1:  # type: ignore[operator]  # torch's own limit
        b.apply(f"x = {b.layer(f'nn.GroupNorm({groups}, {b.channels})')}(x)")


def _activation_in_place(b: _Builder) -> None:
    """Right behind a layer only: torch refuses it behind an op that keeps its result."""
    last = b.network.forward[-1] if b.network.forward else ""
    layer = last.startswith("x = self.") and "ReLU" not in _module(b, last)
    b.apply(f"x = {b.layer('nn.ReLU(inplace=True)')}(x)" if layer else "x = F.relu(x)")


def _module(b: _Builder, line: str) -> str:
    """Definition of the module that a line of the forward pass calls."""
    name = line.removeprefix("x = ").split("(")[0]
    return next(code for code in b.network.init if code.startswith(f"{name} ="))


def _activation(b: _Builder) -> None:
    b.apply(f"x = {b.choose('x.tanh()', 'F.gelu(x)', 'x * 0.5 + x.sin()')}")


def _dropout(b: _Builder) -> None:
    b.apply(f"x = {b.layer('nn.Dropout(0.3)')}(x)")
    b.network.draws_numbers = True


def _linear(b: _Builder) -> None:
    out = b.integer(1, MOST_CHANNELS)
    b.apply(f"x = {b.layer(f'nn.Linear({b.channels}, {out}, bias={b.choose(True, False)})')}(x)")
    b.channels = out


def _product(b: _Builder) -> None:
    out = b.integer(1, MOST_CHANNELS)
    transposed = b.choose(True, False)
    shape = f"{out}, {b.channels}" if transposed else f"{b.channels}, {out}"
    name = b.layer(f"nn.Parameter(torch.randn({shape}))")
    b.apply(f"x = x @ {name}.t()" if transposed else f"x = torch.matmul(x, {name})")
    b.channels = out


def _batched_product(b: _Builder) -> None:
    """A map for each of two entries, whose outputs are added, in one of its spellings."""
    out, spelling = b.integer(1, MOST_CHANNELS), b.integer(0, 4)
    first = spelling in (0, 1, 4)
    shape = f"2, {b.channels}, {out}" if first else f"2, {out}, {b.channels}"
    name = b.layer(f"nn.Parameter(torch.randn({shape}))")
    bias = b.layer(f"nn.Parameter(torch.randn(2, 1, {out}))") if spelling == 4 else ""
    b.apply("x = torch.stack([x, x.sin()], 1)")  # [N, 2, T, C] or [N, 2, C]
    line = "...ec,eoc->...eo" if b.kind == "rows" else "netc,eoc->neto"
    if spelling == 1 and b.kind == "tokens":
        b.apply(f"x = x @ {name}")
    elif spelling == 2 and b.kind == "tokens":
        b.apply(f"x = x @ {name}.transpose(1, 2)")
    elif spelling in (2, 3):
        b.apply(f"x = torch.einsum('{line}', x, {name})")
    else:
        rows = "x.transpose(0, 1).flatten(1, -2)"
        product = f"torch.baddbmm({bias}, {rows}, {name})" if bias else f"{rows}.bmm({name})"
        b.apply(f"x = {product}.unflatten(1, (-1, *x.shape[2:-1])).transpose(0, 1)")
    b.apply("x = x.sum(1)")
    b.channels = out


def _layer_norm(b: _Builder) -> None:
    kind = b.choose("LayerNorm", "RMSNorm")
    b.apply(f"x = {b.layer(f'nn.{kind}({b.channels})')}(x)")


def _scale(b: _Builder) -> None:
    b.apply(f"x = x * {b.layer(f'nn.Parameter(torch.randn({b.channels}))')}")


def _attention(b: _Builder) -> None:
    bias = b.choose(True, False)
    name = b.layer(f"nn.MultiheadAttention({b.channels}, 1, batch_first=True, bias={bias})")
    memory = b.choose("x", "x[:, :1]")
    b.apply(f"x = x + {name}(x, {memory}, {memory}, need_weights=False)[0]")


def _map_to_tokens(b: _Builder) -> None:
    b.apply("x = x.flatten(2).transpose(1, 2)")
    b.kind, b.spatial = "tokens", (prod(b.spatial),)


def _tokens_to_rows(b: _Builder) -> None:
    b.apply("x = x.mean(1)")
    b.kind, b.spatial = "rows", ()


def _map_to_rows(b: _Builder) -> None:
    b.apply("x = x.flatten(1)")
    b.channels *= prod(b.spatial)
    b.kind, b.spatial = "rows", ()


def _rows_to_tokens(b: _Builder) -> None:
    b.apply("x = torch.stack([x, x.flip(1) * 0.5], 1)")
    b.kind, b.spatial = "tokens", (2,)


STEPS: dict[str, tuple[Callable[[_Builder], None], ...]] = {
    "map": (
        _convolution,
        _transposed_convolution,
        _residual,
        _shared_twice,
        _branches,
        _batch_norm,
        _group_norm,
        _activation_in_place,
        _activation,
        _dropout,
        _map_to_tokens,
        _map_to_rows,
    ),
    "tokens": (
        _linear,
        _product,
        _batched_product,
        _layer_norm,
        _scale,
        _attention,
        _activation,
        _dropout,
        _tokens_to_rows,
    ),
    "rows": (
        _linear,
        _product,
        _batched_product,
        _layer_norm,
        _activation_in_place,
        _dropout,
        _rows_to_tokens,
    ),
}
MOST_PIXELS = 400


@st.composite
def networks(draw: Draw, *, coupled: bool = True, random: bool = True) -> DrawnNetwork:
    """Draw a network; ``coupled=False`` without batch norms, ``random=False`` without dropout."""
    kind = draw(st.sampled_from(["map", "map", "tokens", "rows", "indices"]))
    channels = draw(st.integers(1, 4))
    builder = _start(draw, str(kind), channels)  # type: ignore[arg-type]
    for _ in range(draw(st.integers(1, 5))):  # type: ignore[call-overload]
        steps = [
            step
            for step in STEPS[builder.kind]
            if (coupled or step is not _batch_norm) and (random or step is not _dropout)
        ]
        if prod(builder.spatial) > MOST_PIXELS:
            steps = [_convolution, _map_to_tokens] if builder.kind == "map" else [_tokens_to_rows]
        draw(st.sampled_from(steps))(builder)  # type: ignore[operator]
    if builder.kind == "map":
        _map_to_rows(builder)
    elif builder.kind == "tokens":
        _tokens_to_rows(builder)
    builder.apply(f"x = {builder.layer(f'nn.Linear({builder.channels}, {CLASSES})')}(x)")
    return builder.network


def _start(draw: Draw, kind: str, channels: int) -> _Builder:
    if kind == "map":
        ndim = draw(st.sampled_from([1, 2, 2, 3]))
        spatial = tuple(draw(st.integers(1, 5 if ndim == 3 else 6)) for _ in range(ndim))  # type: ignore[call-overload]
        sizes = ", ".join(map(str, (channels, *spatial)))
        network = DrawnNetwork(f"torch.randn(n, {sizes}, dtype=torch.float64)")
        return _Builder(draw, network, "map", channels, spatial)  # type: ignore[arg-type]
    tokens = draw(st.integers(1, 4))
    if kind == "indices":
        network = DrawnNetwork(f"torch.randint(5, (n, {tokens}))")
        builder = _Builder(draw, network, "tokens", channels, (tokens,))  # type: ignore[arg-type]
        padding = draw(st.sampled_from([None, 0, 3]))
        builder.apply(
            f"x = {builder.layer(f'nn.Embedding(5, {channels}, padding_idx={padding})')}(x)"
        )
        return builder
    if kind == "tokens":
        network = DrawnNetwork(f"torch.randn(n, {tokens}, {channels}, dtype=torch.float64)")
        return _Builder(draw, network, "tokens", channels, (tokens,))  # type: ignore[arg-type]
    network = DrawnNetwork(f"torch.randn(n, {channels}, dtype=torch.float64)")
    return _Builder(draw, network, "rows", channels)
