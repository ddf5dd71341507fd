"""What the plan says: pure data between capture and code generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal

from kfc_fx.errors import KfcError, counted
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.notebook import table_html
from kfc_fx.plan.kinds import KINDS, Diagonal, LayerKind, Sides

FACTOR_LIMIT = 8192
"""Widest side of a dense factor. One of this side takes 256 MiB in float32, its decomposition
minutes; beyond it a factor of a linear layer is diagonal."""


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of the model: dotted name, shape, whether it is trained, and whether complex."""

    name: str
    shape: tuple[int, ...]
    trainable: bool
    is_complex: bool = False


@dataclass(frozen=True)
class NormSpec:
    """Which norm precedes a scale and shift: "batch", "layer", "group", "rms" or "none".

    ``running`` names the nodes of the running mean and variance that a batch norm in evaluation
    mode reads.
    """

    norm: str
    groups: int = 1
    eps: float | None = None
    running: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchSpec:
    """How a batched linear map lies in its operands: entry e of the input meets ``W[e]``.

    ``inputs`` are the axes of entry and channel in the input, ``outputs`` those of entry and row
    in the output, counted from the end; an entry axis of None says that the one tensor belongs
    to all entries of the site. All other axes are rows. ``ends`` names the node that holds the
    end of each entry's rows where these stand one entry after the other and are counted only
    when the graph runs, as tokens of experts do.
    """

    inputs: tuple[int | None, int] = (None, -1)
    outputs: tuple[int | None, int] = (None, -1)
    ends: str | None = None


@dataclass(frozen=True)
class SiteSpec:
    """A node of a captured graph where one use of a block's layer happens."""

    node: str
    input_node: str
    weight: str
    bias: str | None
    kind: str
    geometry: ConvGeometry
    inputs_first: bool
    location: str
    """Source line or module path of the use, for messages."""
    padding_idx: int | None = None
    """Of an embedding: the token whose row stays as it is."""
    norm: NormSpec | None = None
    """Of a scale and shift: the norm that it belongs to."""
    rows: tuple[int, int] | None = None
    """Which rows of the weight the call reads, of a batched one which entries; None for all."""
    packed: int = 1
    """How many projections the rows of the whole weight are known to hold."""
    batch: BatchSpec | None = None
    """Of a batched linear map: how its entries lie in its operands."""
    locations: int = 0
    """``|T|`` with the inputs of the capture; 0 where that is not known."""
    region: str = ""
    """The checkpointed region whose graph holds the node; empty for the graph itself."""

    @property
    def layer(self) -> LayerKind:
        """What is known of its kind."""
        return KINDS[self.kind]


@dataclass(frozen=True)
class UnmatchedUse:
    """A use of a parameter that no curvature block accounts for."""

    parameter: str
    node: str
    target: str
    location: str
    reason: str = ""
    """Why what is applied here is no site, where that is known."""
    may_be_layer: bool = False
    """Whether it is, or may hide, a conv or linear call."""

    def __str__(self) -> str:
        where = f" at {self.location}" if self.location else ""
        why = f": {self.reason}" if self.reason else ""
        node = f"node {self.node} ({self.target})" if self.node else self.target
        return f"{node}{where}{why}"


@dataclass(frozen=True)
class GraphUses:
    """Every use of every parameter in one captured graph."""

    sites: tuple[SiteSpec, ...]
    unmatched: tuple[UnmatchedUse, ...]


@dataclass(frozen=True)
class BlockSpec:
    """One Kronecker block ``Ω ⊗ Γ`` (one per group of a grouped convolution, one per entry of a
    batched linear map).

    The block stands for the matrix ``[W b]`` of a layer: ``rows`` output channels of a group
    by ``columns`` patch entries, the last of which is the homogeneous coordinate where the
    layer's bias is trained.
    """

    name: str
    kind: str
    """Name of the kind of layer in ``kinds.KINDS``."""
    weight: str
    bias: str | None
    weight_shape: tuple[int, ...]
    geometry: ConvGeometry
    uses: int
    inputs_first: bool = False
    """Whether the weight is ``[C_in, C_out/groups, *kernel]``: of ``x @ W``, of a transposed
    convolution, of an embedding; or ``[E, C_in, C_out]``, of a batched linear map."""
    projections: int = 1
    """Of a linear layer whose rows are several projections, such as query, key and value: how
    many. Each is a block of its own."""
    bias_shape: tuple[int, ...] = ()
    """Shape of the bias; empty where the block has none."""
    sharing: Literal["expand", "reduce"] = "expand"
    """Of a linear layer: how its factors treat the locations that share the weight."""
    locations: int = 0
    """``|T|`` of its first site with the inputs of the capture; 0 where that is not known."""
    batch_dim: int = 0
    """Dimension of the examples in its inputs, if its channels are last."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a saved state."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> BlockSpec:
        """From what :meth:`as_dict` of another returned."""
        whole = {name: _as_tuples(value) for name, value in saved.items()}
        geometry = {name: _as_tuples(value) for name, value in saved["geometry"].items()}
        return cls(**{**whole, "geometry": ConvGeometry(**geometry)})

    def renamed(self, name: str, names: Mapping[str, str]) -> BlockSpec:
        """The same under another name, of parameters with other names.

        Args:
            names: old name of a parameter to its new one.
        """
        bias = None if self.bias is None else names.get(self.bias, self.bias)
        return replace(self, name=name, weight=names.get(self.weight, self.weight), bias=bias)

    @property
    def layer(self) -> LayerKind:
        """What is known of its kind."""
        return KINDS[self.kind]

    @property
    def _sides(self) -> Sides:
        groups = self.geometry.groups * self.projections
        return self.layer.sides(self.weight_shape, self.inputs_first, groups)

    @property
    def groups(self) -> int:
        """Blocks of this layer: one per group, per projection, per entry of a batched linear map,
        per channel of a norm."""
        return self._sides.groups

    @property
    def grows_with_locations(self) -> bool:
        """Whether Ω is a sum over several locations, so that it grows with their number: images or
        texts of another size, which change ``|T|``, change its scale."""
        return self.layer.sums_locations and self.sharing == "expand" and self.locations > 1

    @property
    def rows(self) -> int:
        """Side of Γ: output channels of one group; of a transposed convolution, times offsets."""
        return self._sides.rows

    @property
    def rows_of_channel(self) -> int:
        """Rows of Γ for one output channel: of a transposed convolution its offsets."""
        return prod(self.geometry.kernel_size) if self.layer.counts_inputs else 1

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return self._sides.channels

    @property
    def offsets(self) -> int:
        """Kernel offsets ``|Δ|`` on the input side."""
        return self._sides.offsets

    @property
    def columns(self) -> int:
        """Side of the dense Ω: channels times offsets, plus one with a bias."""
        return self.channels * self.offsets + (self.bias is not None)

    @property
    def has_diagonal_input(self) -> bool:
        """Whether Ω is diagonal, as an embedding's is, or kept so, as a wide linear layer's."""
        return _is_diagonal(self.layer.diagonal_input, self.columns)

    @property
    def has_diagonal_output(self) -> bool:
        """Whether Γ is diagonal, as the one number of a norm is, or kept so, as that of a wide
        linear layer."""
        return _is_diagonal(self.layer.diagonal_output, self.rows)

    def span(self, site: SiteSpec) -> tuple[int, int]:
        """The groups ``[start, stop)`` that one of the block's sites computes."""
        if site.rows is None:
            return (0, self.groups)
        if self.layer.slices == "entries":
            return site.rows
        return (site.rows[0] // self.rows, site.rows[1] // self.rows)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters in the block, weight first."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def _as_tuples(value: Any) -> Any:
    """With tuples in place of lists, which texts have."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _is_diagonal(when: Diagonal, side: int) -> bool:
    return when == "always" or (when == "wide" and side > FACTOR_LIMIT)


@dataclass(frozen=True)
class GenericSpec:
    """A trainable parameter without a block, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class GraphSpec:
    """One captured graph: of a frame of the model, or of a layer by itself."""

    layer: str
    """Path of the layer; empty for a frame."""
    bindings: int
    """Assignments of parameters to its inputs that it has been run with."""
    sites: int
    """Uses of blocks in it, under one of these."""


@dataclass(frozen=True)
class BreakSpec:
    """A place where plain Python runs between the graphs, and why."""

    place: str
    """Source line that the compiler could not follow."""
    function: str
    """The function that it is in, or that is skipped because of it."""
    skipped: bool
    """Whether the whole function runs as plain Python, and not the rest of it as one more graph."""
    reason: str
    alone: tuple[str, ...] = ()
    """Layers that are captured by themselves because of it."""

    def __str__(self) -> str:
        if not self.skipped:
            return f"{self.place}: {self.function} goes on in a graph of its own: {self.reason}"
        count, cost = len(self.alone), ""
        if count:
            names = ", ".join(self.alone[:3]) + ", ..." * (count > 3)
            layers = "1 layer is a graph of its own"
            if count > 1:
                layers = f"{count} layers are graphs of their own"
            cost = f", {layers} on steps with statistics ({names})"
        return f"{self.place}: {self.function} runs as plain Python{cost}: {self.reason}"


@dataclass(frozen=True)
class CurvaturePlan:
    """The account of every parameter: in a block, generic with a reason, or frozen; and of how the
    model was captured."""

    blocks: tuple[BlockSpec, ...]
    generic: tuple[GenericSpec, ...]
    frozen: tuple[str, ...]
    graphs: tuple[GraphSpec, ...] = ()
    breaks: tuple[BreakSpec, ...] = ()
    likelihood: tuple[str, ...] = ()
    """That of the output and how it was found, a line for each tensor of the output."""

    def block(self, name: str) -> BlockSpec:
        """The block of the layer at module path ``name``."""
        for block in self.blocks:
            if block.name == name:
                return block
        known = ", ".join(repr(block.name) for block in self.blocks) or "none"
        raise KfcError(f"no curvature block is named {name!r}; blocks of this plan: {known}")

    def __str__(self) -> str:
        lines = [self._counts]
        for b in self.blocks:
            times = f" x{b.groups} groups" if b.groups > 1 else ""
            uses = f", used {b.uses} times" if b.uses > 1 else ""
            shared = ", reduce" if b.sharing == "reduce" else ""
            omega = f"Ω {b.columns}" + (" diagonal" if b.has_diagonal_input else "²")
            gamma = f"Γ {b.rows}" + (" diagonal" if b.has_diagonal_output and b.rows > 1 else "²")
            sides = f"{omega}, {gamma}"
            grows = f", Ω over {b.locations} locations" if b.grows_with_locations else ""
            lines.append(f"  block    {b.name}: {b.kind}, {sides}{times}{uses}{shared}{grows}")
        lines += [f"  generic  {g.name} {list(g.shape)}: {g.reason}" for g in self.generic]
        lines += [f"  frozen   {name}" for name in self.frozen]
        lines += [f"  likelihood  {line}" for line in self.likelihood]
        if self.graphs_text:
            lines.append(f"  graphs   {self.graphs_text}")
        lines += [f"  break    {found}" for found in self.breaks]
        return "\n".join(lines)

    @property
    def graphs_text(self) -> str:
        """How many graphs there are, where it is more than one; empty else."""
        if len(self.graphs) < 2 and not self.breaks:
            return ""
        bound = sum(graph.bindings for graph in self.graphs)
        alone = sum(bool(graph.layer) for graph in self.graphs)
        text = counted(len(self.graphs), "graph")
        if bound > len(self.graphs):
            text += f", run with {bound} assignments of parameters"
        if alone:
            text += f", {alone} of them of a layer by itself"
        return text

    @property
    def _counts(self) -> str:
        blocks, generic = len(self.blocks), len(self.generic)
        return (
            f"{counted(blocks, 'block')}, {counted(generic, 'generic parameter')}, "
            f"{len(self.frozen)} frozen"
        )

    def _repr_html_(self) -> str:
        """The account as a table, for notebooks."""
        rows: list[tuple[object, ...]] = [
            (b.name or "(root)", b.kind, b.locations, f"{b.columns}²", f"{b.rows}²", b.groups, "")
            for b in self.blocks
        ]
        rows += [(g.name, "generic", "", "", "", "", g.reason) for g in self.generic]
        rows += [(name, "frozen", "", "", "", "", "") for name in self.frozen]
        rows += [("(break)", "", "", "", "", "", str(found)) for found in self.breaks]
        header = ("layer", "kind", "|T|", "Ω", "Γ", "groups", "reason")
        return table_html(self._counts, header, rows)


def block_name(weight: str) -> str:
    """Module path of the layer that owns a weight; the parameter's own name if it is bare."""
    if weight == "weight":
        return ""
    return weight.removesuffix(".weight")
