"""Generate ``apply``: gradients into steps, and steps into parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.pieces.generic import generic_steps
from kfc_fx.codegen.pieces.matrices import scatter
from kfc_fx.codegen.scalings.rules import RULES, STEP_RULES, VECTOR_RULES
from kfc_fx.codegen.spec import Clip, StackSpec, UpdateSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value
from kfc_fx.plan.choices import Scaling

BOUND_TEXT = ",\n    scaled by sqrt(clip / ν) where ν = vᵀ(F + γ)v > clip"
CLIP_TEXTS: dict[Clip, str] = {
    "none": "",
    "factors": BOUND_TEXT,
    "exact": BOUND_TEXT,
    "model": ", scaled by the step size that the quadratic model is least at",
}
ORTHOGONAL_TEXT = """. What is scaled of a
    matrix moves towards its polar factor by the share ``orthogonalise``, its norm stays"""
PRECONDITION_SUMMARY = "The vectors v of blocks that step by one, before they are scaled."


def apply_graphs(spec: UpdateSpec) -> list[UpdateGraph]:
    """``apply(...)``, and before it ``precondition(...)`` where the scale of v is computed between
    the two."""
    if spec.pauses:
        return [_precondition_graph(spec), _apply_graph(spec)]
    return [_apply_graph(spec)]


def _precondition_graph(spec: UpdateSpec) -> UpdateGraph:
    """``precondition(gradients, state, lr, ...) -> (v by stack, v by parameter, new state)``; for
    the quadratic model, the momentum by parameter before the new state."""
    update = UpdateGraph("precondition", PRECONDITION_SUMMARY)
    names = ["gradients", "state", "lr", *_options(spec, _by_vector(spec))]
    names += ["active"] * spec.partial
    context = Context(update, spec, {name: update.argument(name) for name in names})
    views: dict[str, Value] = {}
    matrices: dict[str, Value] = {}
    momenta: dict[str, Value] = {}
    for stack, _, v in _directions(context):
        matrices[stack.key] = v
        views.update(scatter(update, stack, v))
        if spec.clip == "model" and context.has_momentum(stack):
            momenta.update(scatter(update, stack, context.state("p", stack)))
    found = (matrices, views, momenta) if spec.clip == "model" else (matrices, views)
    return update.finish((*found, context.result))


def _apply_graph(spec: UpdateSpec) -> UpdateGraph:
    summaries = [_summary(spec, scaling) for scaling in spec.scalings]
    update = UpdateGraph("apply", "One step of " + "\n\n    And of ".join(summaries) + "\n    ")
    context = Context(update, spec, _arguments(update, spec))
    vectors = _vectors(context)
    steps: dict[str, Value] = {}
    for scaling in spec.scalings:
        stacks = spec.stacks_of(scaling)
        if scaling in VECTOR_RULES:
            found = _vector_steps(context, stacks, vectors)
        else:
            found = STEP_RULES[scaling].steps(context, stacks)
        for stack, matrix in zip(stacks, found, strict=True):
            steps.update(scatter(update, stack, matrix))
    return _finish(context, steps)


def _summary(spec: UpdateSpec, scaling: Scaling) -> str:
    ahead = scaling in spec.nesterov
    return RULES[scaling].SUMMARY.format(
        clip=CLIP_TEXTS[spec.clip],
        ahead=", with Nesterov's step ahead" if ahead else "",
        orthogonal=ORTHOGONAL_TEXT if spec.orthogonalise else "",
        moved="momentum p + v" if ahead else "p",
    )


def _vector_stacks(spec: UpdateSpec) -> list[StackSpec]:
    return [stack for stack in spec.stacks if stack.scaling in VECTOR_RULES]


def _directions(context: Context) -> Iterator[tuple[StackSpec, Value, Value]]:
    """(stack, gradient, v) of all stacks that step by a vector."""
    for scaling in context.spec.scalings:
        if scaling in VECTOR_RULES:
            stacks = context.spec.stacks_of(scaling)
            found = VECTOR_RULES[scaling].directions(context, stacks)
            for stack, (g, v) in zip(stacks, found, strict=True):
                yield stack, g, v


def _vectors(context: Context) -> dict[str, Value]:
    """v by stack, and how far it is scaled; with the clip from the factors, ν = −Σ lr ⟨∇, v⟩,
    since F v = −lr ∇."""
    update, spec, arguments = context.update, context.spec, context.arguments
    stacks = _vector_stacks(spec)
    if spec.pauses:
        vectors = {stack.key: arguments["v"][stack.key] for stack in stacks}
    else:
        vectors, nu = {}, None
        for stack, g, v in _directions(context):
            vectors[stack.key] = v
            part = -(arguments["lr"][stack.key] * g * v).sum()
            if stack.device != stacks[0].device:
                part = part.to(stacks[0].device)
            nu = part if nu is None else nu + part
        if spec.clip == "factors":
            update.section("ν = vᵀ(F + γ)v = −Σ lr ⟨∇, v⟩, since (F + γ) v = −lr ∇")
            arguments["nu"] = update.let("nu", nu)
    if spec.clip in ("factors", "exact"):
        scale = (arguments["clip"] / arguments["nu"].clamp(min=1e-30)).sqrt().clamp(max=1)
        arguments["clip_scale"] = update.let("clip_scale", scale)
        context.result |= {"nu": arguments["nu"], "clip_scale": arguments["clip_scale"]}
    return vectors


def _vector_steps(
    context: Context, stacks: list[StackSpec], vectors: dict[str, Value]
) -> Iterator[Value]:
    """``p ← momentum p + v``, and the step p or, ahead of it, ``momentum p + v``."""
    update, one = context.update, stacks[0]
    update.section(f'steps of all "{one.scaling}" stacks')
    moved = update.named_list("vectors", [vectors[stack.key] for stack in stacks])
    scale = {"none": None, "model": "step_size"}.get(context.spec.clip, "clip_scale")
    if scale:
        moved = update.call(torch._foreach_mul, moved, context.arguments[scale])
        moved = update.let_list("scaled_vectors", moved)
    if context.has_momentum(one):
        momentum, v = context.option("momentum", one), moved
        p = update.call(torch._foreach_mul, context.states("p", stacks), momentum)
        moved = context.keep("p", stacks, update.call(torch._foreach_add, p, v))
        if context.steps_ahead(one):
            ahead = update.call(torch._foreach_mul, moved, momentum)
            moved = update.let_list("ahead", update.call(torch._foreach_add, ahead, v))
    for index, stack in enumerate(stacks):
        yield context.step(stack, moved[index])


def _by_vector(spec: UpdateSpec) -> list[Scaling]:
    return [scaling for scaling in spec.scalings if scaling in VECTOR_RULES]


def _options(spec: UpdateSpec, scalings: Sequence[Scaling]) -> list[str]:
    """Arguments for the options of ``scalings`` besides their momentum."""
    names: list[str] = []
    for scaling in scalings:
        own = [name for name in RULES[scaling].OPTIONS if name != "step"]
        own += ["orthogonalise"] * (scaling == "adam" and spec.orthogonalise)
        names += [spec.option(name, scaling) for name in own]
    return names + ["step"] * any("step" in RULES[scaling].OPTIONS for scaling in scalings)


def _arguments(update: UpdateGraph, spec: UpdateSpec) -> dict[str, Value]:
    names = ["parameters", "gradients", "state", "lr"]
    names += [spec.option("momentum", s) for s in spec.scalings if s in spec.momentum]
    # Where v is computed before the pause, so are the options that it takes.
    before = _by_vector(spec) if spec.pauses else []
    names += _options(spec, [s for s in spec.scalings if s not in before])
    names += {
        "none": [],
        "factors": ["clip"],
        "exact": ["v", "nu", "clip"],
        "model": ["v", "step_size"],
    }[spec.clip]
    names += ["active"] * spec.partial
    names += ["shrink"] * spec.weight_decay
    names += ["average_decay"] * spec.average
    names += ["masters"] * bool(spec.masters)
    if spec.generic:
        names += ["generic_momentum"] * ("generic" in spec.momentum)
        names += ["step"] * (spec.generic_rule == "adamw" and "step" not in names)
    return {name: update.argument(name) for name in names}


def _finish(context: Context, steps: dict[str, Value]) -> UpdateGraph:
    """Generic parameters, decay, the step itself and the Polyak average; one call for each."""
    update, spec, arguments = context.update, context.spec, context.arguments
    generic = generic_steps(context) if spec.generic else None
    written = {
        name: arguments["masters" if name in spec.masters else "parameters"][name]
        for name in spec.parameters
    }
    update.section("the only writes to the parameters")
    if spec.weight_decay or spec.average:
        everything = update.named_list("everything", list(written.values()))
    if spec.weight_decay:
        update.effect(torch._foreach_mul_, everything, arguments["shrink"])
    update.effect(torch._foreach_add_, [written[n] for n in steps], list(steps.values()))
    if generic is not None:
        names = [parameter.name for parameter in spec.generic]
        update.effect(torch._foreach_sub_, [written[name] for name in names], generic)
    if spec.masters:
        rounded = [arguments["parameters"][name] for name in spec.masters]
        update.effect(torch._foreach_copy_, rounded, [written[name] for name in spec.masters])
    if spec.average:
        averaged = update.call(
            torch._foreach_lerp,
            arguments["state"]["average"],
            everything,
            1 - arguments["average_decay"],
        )
        context.result["average"] = update.let("average", averaged)
    return update.finish(context.result)
