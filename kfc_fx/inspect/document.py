"""What a compilation did, as one dictionary: the JSON document that every view reads.

Schema 1, in ``schema.json`` beside this file (JSON Schema, draft 2020-12):

- ``schema`` (1), ``kfc_fx`` and ``torch`` (versions), ``target``, ``capture``, ``inputs``
  (``shape``, ``dtype``);
- ``summary``: numbers by name. ``*_parameters`` count numbers, ``blocks``, ``generic`` and
  ``frozen`` entries; ``factor_bytes`` is the memory of factors and bases or inverses, held by
  every rank alike (``factor_bytes_per_rank``); ``gradient_``, ``statistics_``, ``refresh_`` and
  ``update_`` ``flops`` and ``bytes`` are the work of each kind of step, for these inputs;
- ``warnings``: texts;
- ``blocks``, ``generic``, ``frozen``: the account of every parameter;
- ``breaks``: where plain Python runs between the graphs: ``place``, ``function``, ``skipped``,
  ``reason``, and ``alone``, the layers that are captured by themselves because of it;
- ``graphs``: of each captured graph, under each assignment of parameters that it is run with, the
  ``layer`` it is of (empty for a frame of the model) and its stages, with code, nodes, and what the
  pass created and erased, by node name;
- ``update``: text of each generated function by name, empty where there is none; ``preamble``
  holds the text before them;
- ``run``: a recorded training run, or null;
- ``world``: what some ranks would hold, send and compute, only where it was asked for;
- ``memory``: bytes of every optimizer, only where it was asked for.

A later schema has another number; one schema only gains keys.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from math import prod
from typing import Any

import torch

from kfc_fx.errors import first_line
from kfc_fx.inspect.block_entries import block_entries, generic_entries
from kfc_fx.inspect.costs import fisher_work, gradient_work
from kfc_fx.inspect.counting import Work
from kfc_fx.inspect.graph_entries import graph_entries
from kfc_fx.inspect.inspection import Inspection
from kfc_fx.inspect.update_costs import factor_bytes, state_bytes, update_work
from kfc_fx.inspect.update_text import PARTS, split_update
from kfc_fx.inspect.warnings_list import warnings_of
from kfc_fx.plan.spec import BreakSpec

SCHEMA = 1


def load_schema() -> dict[str, Any]:
    """The JSON Schema that every document fits."""
    return json.loads(files("kfc_fx.inspect").joinpath("schema.json").read_text("utf-8"))


def build_document(inspection: Inspection) -> dict[str, Any]:
    """The document of an inspection; every number in it is counted, not estimated by hand."""
    blocks = block_entries(inspection)
    costs, uncounted = _step_costs(inspection, blocks)
    code = code_document(inspection)
    return {
        **code,
        "summary": {**_counts(inspection), **_memory(inspection), **costs},
        "warnings": [*code["warnings"], *uncounted],
        "blocks": blocks,
        "generic": generic_entries(inspection),
        "frozen": list(inspection.plan.frozen),
        "run": None,
    }


def code_document(inspection: Inspection) -> dict[str, Any]:
    """The part of the document that needs no counting: graphs and update."""
    return {
        "schema": SCHEMA,
        "kfc_fx": version("kfc_fx"),
        "torch": torch.__version__,
        "target": inspection.target,
        "capture": inspection.options.capture,
        "inputs": [{"shape": list(i.shape), "dtype": i.dtype} for i in inspection.inputs],
        "warnings": warnings_of(inspection),
        "breaks": [_entry(found) for found in inspection.plan.breaks],
        "graphs": graph_entries(inspection),
        "update": _update(inspection),
    }


def _entry(found: BreakSpec) -> dict[str, Any]:
    return {**asdict(found), "alone": list(found.alone)}


def _update(inspection: Inspection) -> dict[str, str]:
    if not inspection.update_source:
        return {"preamble": "", **dict.fromkeys(PARTS, "")}
    parts = split_update(inspection.update_source)
    absent = dict.fromkeys((name for name in PARTS if name not in parts), "")
    return {"preamble": parts.pop(""), **parts, **absent}


def _counts(inspection: Inspection) -> dict[str, int]:
    plan = inspection.plan
    sizes = {name: p.numel() for name, p in inspection.parameters.items()}
    in_blocks = sum(sizes[name] for block in plan.blocks for name in block.parameters)
    return {
        "parameters": sum(sizes.values()),
        "block_parameters": in_blocks,
        "generic_parameters": sum(prod(g.shape) for g in plan.generic),
        "frozen_parameters": sum(sizes[name] for name in plan.frozen),
        "blocks": len(plan.blocks),
        "generic": len(plan.generic),
        "frozen": len(plan.frozen),
        "stacks": len(inspection.spec.stacks) if inspection.spec else 0,
        "graphs": len(plan.graphs),
    }


def _memory(inspection: Inspection) -> dict[str, int]:
    spec = inspection.spec
    stacks = spec.stacks if spec else ()
    factors = sum(factor_bytes(spec, stack) for stack in stacks) if spec else 0
    state = sum(sum(state_bytes(spec, stack).values()) for stack in stacks) if spec else 0
    held = {id(p): p.nbytes for p in inspection.parameters.values()}
    return {
        "parameter_bytes": sum(held.values()),
        "factor_bytes": factors,
        "factor_bytes_per_rank": factors,
        "block_state_bytes": state,
    }


def _step_costs(
    inspection: Inspection, blocks: list[dict[str, Any]]
) -> tuple[dict[str, int], list[str]]:
    """Work of each kind of step, and a warning for what the graphs do not let be counted.

    A statistics step is the Fisher pass, if there is one, the statistics of all sites, and their
    EMA; it comes beside the gradient step, as a refresh and an update do.
    """
    costs: dict[str, int] = {}
    factors = Work(sum(b["flops"] for b in blocks), sum(b["bytes_moved"] for b in blocks))
    accumulate = Work()
    if inspection.spec:
        work = update_work(
            inspection.spec, inspection.optimizer.options, inspection.parameters, inspection.groups
        )
        accumulate = work.accumulate
        costs |= _named("refresh", work.refresh) | _named("update", work.apply)
    try:
        passes = [gradient_work(graph) for graph in inspection.graphs]
        fisher = Work()
        if inspection.fisher == "sampled":
            fisher = sum((fisher_work(graph) for graph in inspection.graphs), fisher)
    except Exception as error:  # an operator without a fake implementation, or that needs data
        return costs, [f"the work of the graphs cannot be counted: {first_line(error)}"]
    gradient = sum((p.forward + p.backward for p in passes), Work())
    statistics = fisher + factors + accumulate
    unknown = sorted(frozenset().union(*(p.uncounted for p in passes)))
    warning = [f"FLOPs inside of {', '.join(unknown)} are not counted"] if unknown else []
    return _named("gradient", gradient) | _named("statistics", statistics) | costs, warning


def _named(name: str, work: Work) -> dict[str, int]:
    return {f"{name}_flops": work.flops, f"{name}_bytes": work.bytes}
