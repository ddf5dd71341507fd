"""What the plan says: pure data between capture and code generation."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from kfc_fx.errors import KfcError
from kfc_fx.plan.geometry import ConvGeometry

BlockKind = Literal["linear", "conv1d", "conv2d", "conv3d"]


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of the model: dotted name, shape, and whether it is trained."""

    name: str
    shape: tuple[int, ...]
    trainable: bool


@dataclass(frozen=True)
class SiteSpec:
    """A node of a captured graph where one use of a block's layer happens."""

    node: str
    input_node: str
    weight: str
    bias: str | None
    kind: BlockKind
    geometry: ConvGeometry
    location: str
    """Source line or module path of the use, for messages."""


@dataclass(frozen=True)
class UnmatchedUse:
    """A use of a parameter that no curvature block accounts for."""

    parameter: str
    node: str
    target: str
    location: str

    def __str__(self) -> str:
        where = f" at {self.location}" if self.location else ""
        return f"node {self.node} ({self.target}){where}"


@dataclass(frozen=True)
class GraphUses:
    """Every use of every parameter in one captured graph."""

    sites: tuple[SiteSpec, ...]
    unmatched: tuple[UnmatchedUse, ...]


@dataclass(frozen=True)
class BlockSpec:
    """One Kronecker block ``Ω ⊗ Γ`` (one per group of a grouped convolution).

    The block stands for the matrix ``[W b]`` of a layer: ``rows`` output channels of a group
    by ``columns`` patch entries, the last of which is the homogeneous coordinate where the
    layer's bias is trained.
    """

    name: str
    kind: BlockKind
    weight: str
    bias: str | None
    weight_shape: tuple[int, ...]
    geometry: ConvGeometry
    uses: int

    @property
    def groups(self) -> int:
        """Blocks of this layer: one per group."""
        return self.geometry.groups

    @property
    def rows(self) -> int:
        """Side of Γ: output channels of one group."""
        return self.weight_shape[0] // self.groups

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return self.weight_shape[1]

    @property
    def offsets(self) -> int:
        """Kernel offsets |Δ|."""
        return prod(self.weight_shape[2:])

    @property
    def columns(self) -> int:
        """Side of the dense Ω: channels times offsets, plus one with a bias."""
        return self.channels * self.offsets + (self.bias is not None)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters in the block, weight first."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class GenericSpec:
    """A trainable parameter without a block, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class CurvaturePlan:
    """The account of every parameter: in a block, generic with a reason, or frozen."""

    blocks: tuple[BlockSpec, ...]
    generic: tuple[GenericSpec, ...]
    frozen: tuple[str, ...]

    def block(self, name: str) -> BlockSpec:
        """The block of the layer at module path ``name``."""
        for block in self.blocks:
            if block.name == name:
                return block
        known = ", ".join(repr(block.name) for block in self.blocks) or "none"
        raise KfcError(f"no curvature block is named {name!r}; blocks of this plan: {known}")

    def __str__(self) -> str:
        lines = [
            f"{len(self.blocks)} blocks, {len(self.generic)} generic parameters, "
            f"{len(self.frozen)} frozen"
        ]
        for b in self.blocks:
            times = f" x{b.groups} groups" if b.groups > 1 else ""
            uses = f", used {b.uses} times" if b.uses > 1 else ""
            lines.append(f"  block    {b.name}: {b.kind}, Ω {b.columns}², Γ {b.rows}²{times}{uses}")
        lines += [f"  generic  {g.name} {list(g.shape)}: {g.reason}" for g in self.generic]
        lines += [f"  frozen   {name}" for name in self.frozen]
        return "\n".join(lines)
