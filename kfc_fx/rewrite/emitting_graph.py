"""A graph that returns statistics besides its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, fx

from kfc_fx.capture.checkpoints import run_by_op
from kfc_fx.capture.dynamo import compile_emitting
from kfc_fx.capture.graph import Stage
from kfc_fx.plan.forms import statistic_shapes
from kfc_fx.plan.spec import BlockSpec, SiteSpec
from kfc_fx.rewrite.emitting import Emitter, Emitters, emitting_stages
from kfc_fx.statistics.share import WHOLE

MOST_FIXED = 2
"""Shares and sizes of a batch that an emitting graph is compiled for."""

Span = tuple[int, int]
"""The groups ``[start, stop)`` of a block."""


class RowCounts(NamedTuple):
    """How many output rows the sites of a run have, site by site."""

    blocks: list[BlockSpec]
    spans: list[Span]
    """The groups of the block that the rows are of."""
    rows: list[int]
    """N·|T| of each of these groups."""


class EmittingRuns:
    """What a backend makes of an emitting graph.

    Statistics of the whole batch are compiled for any size of it. Of a share, which examples count
    is fixed in the code. It is compiled for few shares and sizes, and others run op by op: steps
    with statistics are rare, and batches of many sizes would be compiled again and again.
    """

    def __init__(self, backend: str, module: fx.GraphModule) -> None:
        self._backend, self._module = backend, module
        self._compiled: dict[object, Callable[..., Any]] = {}

    def fitting(
        self, shares: tuple[object, ...], inputs: Sequence[Any], *, by_op: bool
    ) -> Callable[..., Any]:
        """What runs the graph on these inputs for these shares of the batch; what is compiled is so
        at its first call.

        Args:
            by_op: op by op, whatever the backend is.
        """
        if self._backend == "eager" or all(share == WHOLE for share in shares):
            key = None
        else:
            key = (shares, tuple(map(_size_of, inputs)))
        if self._backend != "eager" and (by_op or self._is_full_for(key)):
            return self._by_op
        if key not in self._compiled:
            self._compiled[key] = compile_emitting(self._backend, self._module)
        return self._compiled[key]

    def _is_full_for(self, key: object) -> bool:
        """Whether a share and sizes are some of too many to be compiled for."""
        fixed = self._compiled.keys() - {None}
        return key is not None and key not in fixed and len(fixed) >= MOST_FIXED

    @cached_property
    def _by_op(self) -> Callable[..., Any]:
        return run_by_op(self._module)


def _size_of(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Emitted:
    """What a run of an emitting graph gives."""

    outputs: Any
    """What the plain graph returns."""
    rows: RowCounts
    inputs: list[tuple[BlockSpec, dict[str, Tensor]]]
    """Statistics by name of each site of a block without Γ."""


@dataclass(frozen=True)
class EmittingGraph:
    """A graph that returns statistics besides its outputs; made by :func:`emitting_graph`."""

    stages: tuple[Stage, ...]
    """What each pass of the rewrite left behind."""
    runs: EmittingRuns
    """What runs the last stage."""
    probed: tuple[Emitter, ...]
    """The blocks with Γ. It takes a probe of each of their statistics, in this order."""
    counted: tuple[tuple[BlockSpec, Span], ...]
    """Block and groups of every site whose rows it counts, in graph order."""
    alone: tuple[Emitter, ...]
    """The block of every site whose input statistics it returns, in graph order."""

    @property
    def emitters(self) -> tuple[Emitter, ...]:
        """Every block that emits, with the forms of its factors."""
        return (*self.probed, *dict.fromkeys(self.alone))

    def __call__(
        self,
        inputs: Sequence[Any],
        probes: Sequence[Tensor],
        shares: tuple[object, ...] = (),
        *,
        by_op: bool = False,
    ) -> Emitted:
        """Run the graph. Where the rows of groups are data, reading them waits for the device.

        Args:
            inputs: those of the plain graph.
            probes: of the statistics of :attr:`probed`, in the order of ``statistic_shapes``.
            shares: of the batch that the statistics of :attr:`emitters` are of; the whole where
                none is given.
            by_op: run it op by op, whatever the backend is.
        """
        run = self.runs.fitting(shares, inputs, by_op=by_op)
        outputs, rows, returned = run(*inputs, *probes)
        statistics = [
            (block, dict(zip(statistic_shapes(block, forms), values, strict=True)))
            for (block, forms), values in zip(self.alone, returned, strict=True)
            if values
        ]
        return Emitted(outputs, counts_by_span(self.counted, rows), statistics)


def emitting_blocks(sites: Sequence[SiteSpec], emitters: Emitters) -> tuple[Emitter, ...]:
    """Which of the blocks emit in a graph with these sites, in the order of their first sites."""
    weights = dict.fromkeys(site.weight for site in sites if site.weight in emitters)
    return tuple(emitters[weight] for weight in weights)


def emitting_graph(
    canonical: fx.GraphModule, sites: Sequence[SiteSpec], emit: Sequence[Emitter], backend: str
) -> EmittingGraph:
    """Rewrite a canonical graph so that blocks emit.

    Args:
        canonical: the graph after ``canonicalise``; it is left as it was.
        sites: all uses of blocks in it.
        emit: the blocks that emit, as :func:`emitting_blocks` gives them.
        backend: what runs the emitting graph; it is compiled at its first call.
    """
    emitters = {emitter[0].weight: emitter for emitter in emit}
    live = [site for site in sites if site.weight in emitters]
    stages = emitting_stages(canonical, live, emitters)
    own = [emitters[site.weight] for site in live]
    return EmittingGraph(
        stages=tuple(stages),
        runs=EmittingRuns(backend, stages[-1].module),
        probed=tuple(emitter for emitter in emit if emitter[1].output != "absent"),
        counted=tuple((b, b.span(site)) for (b, _), site in zip(own, live, strict=True)),
        alone=tuple(emitter for emitter in own if emitter[1].output == "absent"),
    )


def counts_by_span(
    counted: Sequence[tuple[BlockSpec, Span]], rows: Sequence[int | Tensor]
) -> RowCounts:
    """Split the sites whose groups differ in their rows.

    Args:
        counted: block and groups of each site.
        rows: N·|T| of each site: one number for all of its groups, or a tensor of one for each.
    """
    found = RowCounts([], [], [])
    for (block, (start, stop)), count in zip(counted, rows, strict=True):
        if isinstance(count, Tensor):
            spans, counts = [(g, g + 1) for g in range(start, stop)], count.tolist()
        else:
            spans, counts = [(start, stop)], [count]
        found.blocks.extend([block] * len(spans))
        found.spans.extend(spans)
        found.rows.extend(counts)
    return found
