"""What training would hold, by optimizer and option: does it fit?

Everything is counted from what would run, on tensors without data. Activations are not: they are
the same for every optimizer, and grow with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.engine.engine import GENERIC_STATE
from kfc_fx.engine.step_inputs import refresh_arguments
from kfc_fx.errors import OptionError
from kfc_fx.inspect.inspection import Inspection
from kfc_fx.inspect.methods import counted_call
from kfc_fx.inspect.peak import PeakCounter
from kfc_fx.inspect.update_costs import engine_without_data, state_bytes, statistics_without_data
from kfc_fx.linalg.half import kept_dtype
from kfc_fx.optim.groups import Group
from kfc_fx.optim.options import KFCOptions
from kfc_fx.optim.rates import option_numbers
from kfc_fx.optim.scalings.table import SCALINGS
from kfc_fx.optim.statistics import Statistics
from kfc_fx.optim.update_spec import update_spec

COUNTER_BYTES = 4
"""Of the count of steps that ``torch.optim.AdamW`` keeps by parameter, a float32."""
ALTERNATIVES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("adam", {"input_factor": "separable"}),
    ("adam", {"input_factor": "dense"}),
    ("adam", {"basis_limit": 128}),
    ("adam", {"every": 10}),
    ("adam", {"state_dtype": torch.bfloat16}),
)
"""Options that change what is held, of the statistics or of the optimizer. Other intervals of
statistics and of refreshes keep the averages of factors whole."""

OWN = ("state_dtype",)
"""Those of the optimizer."""


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one optimizer."""

    optimizer: str
    options: str
    """Those that are not the defaults, as they are written."""
    state: int
    """Between steps."""
    statistics: int
    """Sums of a step with statistics, from the backward pass to their use."""
    refresh: int
    """The most that new averages and a refresh hold beside the state and the sums: what takes the
    place of the state, and intermediates."""


@dataclass(frozen=True)
class Memory:
    """Bytes that hold whatever the optimizer is, and those of each."""

    parameters: int
    gradients: int
    average: int
    """More with ``average=``."""
    master_weights: int
    """More with ``master_weights=True``; zero where no parameter is in half precision."""
    rows: tuple[MemoryRow, ...]
    left_out: tuple[str, ...]
    """Scalings that fit no layer of the model."""


def memory_of(inspection: Inspection) -> Memory:
    """What training the inspected model would hold."""
    parameters = inspection.parameters
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    size = sum(p.nbytes for p in trained.values())
    half = [p for p in trained.values() if p.dtype in (torch.bfloat16, torch.float16)]
    counters = COUNTER_BYTES * len(trained)
    rows = [
        MemoryRow("SGD", "momentum=0.9", size, 0, 0),
        MemoryRow("AdamW", "", 2 * size + counters, 0, 0),
    ]
    left_out = []
    for scaling, changed in (*((name, {}) for name in SCALINGS), *ALTERNATIVES):
        try:
            rows.append(kfc_row(inspection, scaling, changed))
        except OptionError:
            left_out.append(scaling)
    return Memory(
        parameters=sum({id(p): p.nbytes for p in parameters.values()}.values()),
        gradients=size,
        average=size,
        master_weights=sum(torch.float32.itemsize * p.numel() for p in half),
        rows=tuple(rows),
        left_out=tuple(dict.fromkeys(left_out)),
    )


def memory_document(inspection: Inspection) -> dict[str, Any]:
    """As plain data."""
    return asdict(memory_of(inspection))


def kfc_row(inspection: Inspection, scaling: str, changed: Mapping[str, Any]) -> MemoryRow:
    """Bytes of KFC with a scaling, and options of its statistics or its own.

    Raises:
        OptionError: the scaling fits no layer of the model.
    """
    general = inspection.optimizer.options
    own = {name: value for name, value in changed.items() if name in OWN}
    of_statistics = {name: value for name, value in changed.items() if name not in OWN}
    statistics = Statistics(**of_statistics)
    options = replace(general, scaling=scaling, generic=None, statistics=statistics, **own)
    group: Group = {"lr": 0.01, "betas": options.betas, "weight_decay": 0.0}
    parameters = inspection.parameters
    groups = dict.fromkeys(parameters, group)
    spec = update_spec("memory", inspection.plan, options, parameters, groups)
    given = [f"{name}={value!r}" for name, value in own.items()]
    if of_statistics:
        inner = ", ".join(f"{name}={value!r}" for name, value in of_statistics.items())
        given.append(f"Statistics({inner})")
    return MemoryRow(
        optimizer=f'KFC "{scaling}"',
        options=", ".join(given),
        state=whole_state_bytes(spec, parameters),
        statistics=sum(s.nbytes for s in statistics_without_data(spec).sums.values()),
        refresh=_refresh_peak(spec, options, parameters),
    )


def whole_state_bytes(spec: UpdateSpec, parameters: Mapping[str, Tensor]) -> int:
    """Bytes of all state: of stacks, and the moments of generic parameters."""
    blocks = sum(sum(state_bytes(spec, stack).values()) for stack in spec.stacks)
    generic = 0
    for entry in spec.generic:
        own = parameters[entry.name]
        wide = torch.promote_types(own.dtype, torch.float32)
        kept = kept_dtype(wide, halves=spec.half_moments)
        generic += len(GENERIC_STATE) * own.numel() * kept.itemsize
    return blocks + generic


def _refresh_peak(spec: UpdateSpec, options: KFCOptions, parameters: Mapping[str, Tensor]) -> int:
    engine, counter = engine_without_data(spec, parameters), PeakCounter()
    statistics = statistics_without_data(engine.spec)
    held: list[Any] = []  # the old state stays until the step has succeeded

    def run() -> None:
        engine.accumulate(statistics)
        program, numbers = engine.program, option_numbers(engine.spec, options)
        given = refresh_arguments(program, engine.state, numbers, first=False)
        held.append(program.functions["refresh"](**given))

    counted_call(counter, run)
    return counter.peak
