"""The generated update by its parts, and the proof that the printed text is what runs."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.codegen.text.source import UpdateProgram
from kfc_fx.engine.engine import UpdateEngine
from kfc_fx.errors import TargetError
from kfc_fx.inspect.inspection import Inspection

PARTS = ("accumulate", "refresh", "apply")
SEED = 0


def split_update(source: str) -> dict[str, str]:
    """Name of each function to its text, and under ``""`` what stands before the first."""
    lines = source.splitlines(keepends=True)
    functions = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    first = functions[0].lineno - 1 if functions else len(lines)
    parts = {"": "".join(lines[:first])}
    for function in functions:
        parts[function.name] = "".join(lines[function.lineno - 1 : function.end_lineno])
    return parts


def run_text(source: str) -> dict[str, Any]:
    """The functions that the text of an update defines."""
    namespace: dict[str, Any] = {"__name__": "printed_update"}
    exec(source, namespace)
    return {name: namespace[name] for name in split_update(source) if name}


@dataclass(frozen=True)
class Proof:
    """One step by the printed text beside one by the engine."""

    parameters: int
    numbers: int
    changed: int
    """Parameters that the step moved."""
    different: tuple[str, ...]
    """Parameters that the two steps left with different bits."""


def prove_update(inspection: Inspection, source: str) -> Proof:
    """Take one step of a copy of the model by the engine, and of another by ``source``.

    Both see the same inputs and sampled targets.

    Args:
        source: text of the whole update, executed as it is.

    Raises:
        TargetError: the model was captured symbolically, or has no block.
    """
    if inspection.options.capture != "dynamo":
        raise TargetError("--run takes a step, which needs --capture dynamo")
    if not source:
        raise TargetError("--run needs an update, and no parameter of the model has a block")
    before = {name: p.detach().clone() for name, p in inspection.parameters.items()}
    by_engine = _step(inspection, None)
    by_text = _step(inspection, run_text(source))
    return Proof(
        len(before),
        sum(p.numel() for p in before.values()),
        sum(not torch.equal(before[name], value) for name, value in by_engine.items()),
        tuple(n for n, value in by_engine.items() if not torch.equal(value, by_text[n])),
    )


def _step(
    inspection: Inspection, functions: Mapping[str, Callable[..., Any]] | None
) -> dict[str, Tensor]:
    """Parameters of a copy of the model after a step by ``functions``, or by the engine's own."""
    torch.manual_seed(SEED)
    options = inspection.options
    compiled = options.compile(copy.deepcopy(inspection.compiled))
    optimizer = options.optimizer(compiled, SEED)
    outputs = pytree.tree_leaves(compiled(*(spec.example() for spec in inspection.inputs)))
    floats = [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]
    torch.stack([output.float().square().mean() for output in floats]).sum().backward()
    if functions is not None:
        engine = optimizer._engine
        assert isinstance(engine, UpdateEngine)  # of one process
        own = engine.program_for

        def printed(spec: UpdateSpec) -> UpdateProgram:
            program = own(spec)
            return replace(program, functions=dict(functions)) if spec == engine.spec else program

        engine.program_for = printed  # type: ignore[method-assign]
    optimizer.step()
    return {name: p.detach() for name, p in compiled.named_parameters()}
