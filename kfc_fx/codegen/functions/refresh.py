"""Generate ``refresh``: factors into inverses, bases or whitening matrices."""

from __future__ import annotations

from kfc_fx.codegen.pieces.context import Context, StackContext
from kfc_fx.codegen.pieces.decompositions import Made, decompose_together
from kfc_fx.codegen.scalings.rules import rule_of
from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value

RETURNS = "Returns new state by stack, and which of its entries could not be decomposed."


def refresh_graph(spec: UpdateSpec) -> UpdateGraph:
    """``refresh(state, ...) -> {stack: (new state entries, failed [depth])}``."""
    wanted = [
        each for stack in spec.stacks for each in rule_of(stack.scaling).decompositions(spec, stack)
    ]
    follows = any(each.follows for each in wanted)
    update = UpdateGraph("refresh", _summary(spec, follows=follows))
    names = ["state", *(["first"] if follows else [])]
    names += [
        spec.option(option, scaling)
        for scaling in spec.scalings
        for option in rule_of(scaling).REFRESH_OPTIONS
    ]
    context = Context(update, spec, {name: update.argument(name) for name in names})
    made = decompose_together(context, wanted)
    return update.finish({s.key: _refreshed(context, s, made) for s in spec.stacks})


def _summary(spec: UpdateSpec, *, follows: bool) -> str:
    rules = [rule_of(scaling) for scaling in spec.scalings]
    texts = [rule.REFRESH_SUMMARY for rule in rules]
    texts += [rule.FOLLOW_SUMMARY for rule in rules if follows]
    return "\n\n".join(text for text in dict.fromkeys([*texts, RETURNS]) if text)


def _refreshed(context: Context, stack: StackSpec, made: Made) -> Value:
    rule = rule_of(stack.scaling)
    arguments = {"first": context.arguments["first"]} if "first" in context.arguments else {}
    arguments |= {name: context.option(name, stack) for name in rule.REFRESH_OPTIONS}
    for wanted in rule.decompositions(context.spec, stack):
        if (stack.key, wanted.name) in made:
            result, failed = made[stack.key, wanted.name]
            arguments |= {wanted.name: result, f"failed_{wanted.factor}": failed}

    def body(local: StackContext) -> object:
        entries, failed = rule.refresh(local, made)
        any_failed = failed[0]
        for each in failed[1:]:
            any_failed = any_failed | each
        return entries, any_failed

    return context.of_stack("refresh", stack, body, **arguments)
