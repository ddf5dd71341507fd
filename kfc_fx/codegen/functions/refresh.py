"""Generate ``start`` and ``refresh``: factors into inverses, bases or whitening matrices."""

from __future__ import annotations

from kfc_fx.codegen.functions.accumulate import describe
from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.pieces.decompositions import decompose_together
from kfc_fx.codegen.scalings.rules import RULES
from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value


def refresh_graphs(spec: UpdateSpec) -> list[UpdateGraph]:
    """``refresh(state, ...) -> (new state entries, failed by stack)``, and ``start``.

    ``start`` is the first refresh, where that is another: there is no basis to start from.
    """
    rules = [RULES[scaling] for scaling in spec.scalings]
    summary = "\n\n    ".join(rule.REFRESH_SUMMARY for rule in rules)
    graphs = [_refresh_graph(spec, "refresh", summary, first=False)]
    if any(rule.START_SUMMARY for rule in rules):
        starts = [rule.START_SUMMARY or rule.REFRESH_SUMMARY for rule in rules]
        graphs.insert(0, _refresh_graph(spec, "start", "\n\n    ".join(starts), first=True))
    return graphs


def _refresh_graph(spec: UpdateSpec, name: str, summary: str, *, first: bool) -> UpdateGraph:
    update = UpdateGraph(name, summary + ("\n    " if "\n" in summary else ""))
    names = ["state"]
    names += [
        spec.option(option, scaling)
        for scaling in spec.scalings
        for option in RULES[scaling].REFRESH_OPTIONS
    ]
    context = Context(update, spec, {name: update.argument(name) for name in names})
    failed: dict[str, list[Value]] = {}
    wanted = [
        each
        for stack in spec.stacks
        for each in RULES[stack.scaling].decompositions(context, stack, first=first)
    ]
    decompose_together(context, wanted)
    for stack in spec.stacks:
        update.section(describe(stack))
        failed[stack.key] = RULES[stack.scaling].refresh(context, stack, first=first)
    return update.finish((context.result, failed))
