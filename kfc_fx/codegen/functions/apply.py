"""Generate ``apply``: gradients into steps, and steps into parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kfc_fx.codegen.pieces.context import Context, StackContext, kept
from kfc_fx.codegen.pieces.generic import generic_arguments, generic_steps
from kfc_fx.codegen.pieces.matrices import scatter, step_by_parameter
from kfc_fx.codegen.pieces.moments import half, wide
from kfc_fx.codegen.scalings.rules import rule_of, step_rule_of, steps_by_vector, vector_rule_of
from kfc_fx.codegen.spec import Clip, ScalingSpec, StackSpec, UpdateSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value, merged, values_at
from kfc_fx.linalg.cautious import cautious_shrink

BOUND_TEXT = ", scaled by sqrt(clip / ν) where ν = vᵀ(F + γ)v > clip"
CLIP_TEXTS: dict[Clip, str] = {
    "none": "",
    "factors": BOUND_TEXT,
    "shared": BOUND_TEXT,
    "exact": BOUND_TEXT,
    "model": ", scaled by the step size that the quadratic model is least at",
}
CLIP_ARGUMENTS: dict[Clip, tuple[str, ...]] = {
    "none": (),
    "factors": ("clip",),
    "shared": ("v", "nu", "clip"),
    "exact": ("v", "nu", "clip"),
    "model": ("v", "step_size"),
}
ORTHOGONAL_TEXT = """What is scaled of a matrix moves towards its polar factor by the share
``orthogonalize``, its norm stays. """
GIVEN_SUMMARY = "The steps of all layers, which come from their owners, into the parameters."
SHARED_SUMMARY = """The vectors v of layers that step by one, before they are scaled.

Returns v by stack, and their part of ν = vᵀ(F + γ)v{state}."""
PRECONDITION_SUMMARY = """The vectors v of layers that step by one, before they are scaled.

Returns v by stack and by parameter{momenta}{state}."""


def apply_graphs(spec: UpdateSpec) -> list[UpdateGraph]:
    """``apply(...)``, and before it ``precondition(...)`` where the scale of v is computed between
    the two."""
    if spec.pauses:
        return [_precondition_graph(spec), _apply_graph(spec)]
    return [_apply_graph(spec)]


def _precondition_graph(spec: UpdateSpec) -> UpdateGraph:
    """``precondition(gradients, state, lr, ...) -> {"v": by stack, "views": by parameter}``; for
    the quadratic model with ``"momenta"`` by parameter, and with ``"state"`` where it is new."""
    names = ["gradients", "state", "lr", *_options(spec, _by_vector(spec))]
    names += ["active"] * spec.partial + ["max_block_norm"] * spec.bounds_gradients
    update = UpdateGraph("precondition")
    context = Context(update, spec, {name: update.argument(name) for name in names})
    if spec.clip == "shared":
        shared, nu = _vectors_with_nu(context)
        result: dict[str, object] = {"v": shared, "nu": nu}
        if context.result:
            result["state"] = context.result
        update.summary = SHARED_SUMMARY.format(
            state=", and new state by stack" * bool(context.result)
        )
        return update.finish(result)
    found = list(_directions(context))
    vectors = {stack.key: update.let(f"v_{stack.key}", v) for stack, v in found}
    views = [context.of_stack("split", s, _views, matrix=vectors[s.key]) for s, _ in found]
    result = {"v": vectors, "views": update.call(merged, *views)}
    moving = [s for s, _ in found if spec.clip == "model" and context.has_momentum(s)]
    if moving:
        held = {s.key: wide(update, spec, {"p": [context.state("p", s)]})["p"][0] for s in moving}
        momenta = [context.of_stack("split", s, _views, matrix=held[s.key]) for s in moving]
        result["momenta"] = update.call(merged, *momenta)
    if context.result:
        result["state"] = context.result
    update.summary = PRECONDITION_SUMMARY.format(
        momenta=", and the momentum by parameter" * bool(moving),
        state=", and new state by stack" * bool(context.result),
    )
    return update.finish(result)


def _views(local: StackContext) -> object:
    return scatter(local.stack, local.arguments["matrix"])


def _apply_graph(spec: UpdateSpec) -> UpdateGraph:
    texts = [GIVEN_SUMMARY] if spec.given_steps else [_summary(spec, s) for s in spec.scalings]
    update = UpdateGraph("apply", "\n\n".join(texts))
    names = dict.fromkeys(_arguments(spec))
    context = Context(update, spec, {name: update.argument(name) for name in names})
    if spec.given_steps:
        return _finish(context, [context.arguments["steps"]])
    vectors = _vectors(context)
    steps: list[Value] = []
    for scaling in spec.scalings:
        stacks = spec.stacks_of(scaling)
        if steps_by_vector(scaling.generator):
            steps += _vector_steps(context, stacks, vectors)
        else:
            steps += step_rule_of(scaling).steps(context, stacks)
    return _finish(context, steps)


def _summary(spec: UpdateSpec, scaling: ScalingSpec) -> str:
    ahead = scaling in spec.nesterov
    return rule_of(scaling).SUMMARY.format(
        clip=CLIP_TEXTS[spec.clip],
        ahead=", with Nesterov's step ahead" if ahead else "",
        orthogonal=ORTHOGONAL_TEXT if scaling in spec.orthogonalize else "",
        moved="momentum p + v" if ahead else "p",
    )


def _directions(context: Context) -> Iterator[tuple[StackSpec, Value]]:
    """Each stack that steps by a vector, and its v."""
    for scaling in _by_vector(context.spec):
        stacks = context.spec.stacks_of(scaling)
        rule = vector_rule_of(scaling)
        assert rule is not None
        found = rule.directions(context, stacks)
        yield from zip(stacks, found, strict=True)


def _vectors(context: Context) -> dict[str, Value]:
    """v by stack, and how far it is scaled."""
    update, spec, arguments = context.update, context.spec, context.arguments
    if spec.pauses:
        vectors = {
            s.key: arguments["v"][s.key]
            for s in spec.stacks
            if steps_by_vector(s.scaling.generator)
        }
    elif spec.clip == "factors":
        vectors, arguments["nu"] = _vectors_with_nu(context)
    else:
        vectors = {stack.key: v for stack, v in _directions(context)}
    if spec.clip in ("factors", "shared", "exact"):
        ratio = arguments["clip"] / arguments["nu"].clamp(min=1e-30)
        scale = update.let("clip_scale", ratio.sqrt().clamp(max=1), remark="ν may be zero")
        arguments["clip_scale"] = scale
        context.result["report"] = {"nu": arguments["nu"], "clip_scale": scale}
    return vectors


def _vectors_with_nu(context: Context) -> tuple[dict[str, Value], Value]:
    update = context.update
    vectors, parts, first = {}, [], ""
    for stack, pair in _directions(context):
        names = (f"v_{stack.key}", f"nu_{stack.key}")
        vectors[stack.key], part = update.let_tuple(names, pair)
        first = first or stack.device
        parts.append(part.to(first) if stack.device != first else part)
    nu = parts[0]
    for part in parts[1:]:
        nu = nu + part
    update.section("ν = vᵀ(F + γ)v = −Σ lr ⟨∇, v⟩, since (F + γ) v = −lr ∇")
    return vectors, update.let("nu", nu)


def _vector_steps(
    context: Context, stacks: list[StackSpec], vectors: dict[str, Value]
) -> Iterator[Value]:
    """``p ← momentum p + v``, and the step p or, ahead of it, ``momentum p + v``."""
    update, one = context.update, stacks[0]

    def named(word: str, values: Value) -> Value:
        return update.let(context.name(word, one.scaling), values)

    update.section(f'steps of all "{one.scaling}" stacks')
    moved = named("vectors", update.call(list, tuple(vectors[stack.key] for stack in stacks)))
    scale = {"none": None, "model": "step_size"}.get(context.spec.clip, "clip_scale")
    if scale:
        scaled = update.call(torch._foreach_mul, moved, context.arguments[scale])
        moved = named("scaled_vectors", scaled)
    if context.has_momentum(one):
        momentum, v = context.momentum(stacks), moved
        old = wide(update, context.spec, {"p": context.states("p", stacks)})["p"]
        p = update.call(torch._foreach_add, update.call(torch._foreach_mul, old, momentum), v)
        moved = named("p", kept(update, context.actives(stacks), p, old))
        rounded = half(update, context.spec, moved)
        new = named("kept_p", rounded) if context.spec.half_moments else moved
        context.keep("p", stacks, new)
        if context.steps_ahead(one):
            ahead = update.call(torch._foreach_mul, moved, momentum)
            moved = named("ahead", update.call(torch._foreach_add, ahead, v))
    for index, stack in enumerate(stacks):
        yield context.of_stack("step", stack, _vector_step, vector=moved[index])


def _vector_step(local: StackContext) -> object:
    vector = local.arguments["vector"]
    if local.spec.partial:
        return step_by_parameter(local, vector)
    return scatter(local.stack, vector)


def _by_vector(spec: UpdateSpec) -> list[ScalingSpec]:
    return [scaling for scaling in spec.scalings if steps_by_vector(scaling.generator)]


def _options(spec: UpdateSpec, scalings: Sequence[ScalingSpec]) -> list[str]:
    """Arguments for the options of ``scalings`` besides their momentum."""
    names: list[str] = []
    for scaling in scalings:
        own = [name for name in rule_of(scaling).OPTIONS if name != "step"]
        own += ["orthogonalize"] if scaling in spec.orthogonalize else []
        names += [spec.option(name, scaling) for name in own]
    counts = any("step" in rule_of(scaling).OPTIONS for scaling in scalings)
    return [*names, "step"] if counts else names


def _arguments(spec: UpdateSpec) -> list[str]:
    """Names of the arguments of ``apply``; some may come twice."""
    computed, generic = not spec.given_steps, bool(spec.generic)
    # Where v is computed before the pause, so are the options that it takes.
    before = _by_vector(spec) if spec.pauses else []
    before_all = len(before) == len(spec.scalings)
    wanted = [
        (True, ["parameters"]),
        (computed or generic, ["gradients"]),
        (computed and not before_all and spec.bounds_gradients, ["max_block_norm"]),
        (computed, ["state"]),
        (not computed, ["steps"]),
        (computed or generic, ["lr"]),
        (computed, _momenta(spec)),
        (computed, _options(spec, [s for s in spec.scalings if s not in before])),
        (computed, CLIP_ARGUMENTS[spec.clip]),
        (computed and spec.partial, ["active"]),
        (spec.weight_decay, ["shrink"]),
        (spec.average, ["average", "average_decay"]),
        (bool(spec.master_weights), ["master_weights"]),
        (generic, generic_arguments(spec)),
    ]
    return [name for is_taken, names in wanted if is_taken for name in names]


def _momenta(spec: UpdateSpec) -> list[str]:
    own = [scaling for scaling in spec.scalings if spec.has_own_momenta(scaling)]
    shared = [s for s in spec.scalings if s in spec.momentum and s not in own]
    return ["momentum"] * bool(own) + [spec.option("momentum", scaling) for scaling in shared]


def _finish(context: Context, steps: Sequence[Value]) -> UpdateGraph:
    """Generic parameters, decay, the step itself and the Polyak average; one call for each."""
    update, spec, arguments = context.update, context.spec, context.arguments
    generic = generic_steps(context) if spec.generic else None
    parameters = arguments["parameters"]
    update.section("steps by parameter" + ", and all that is written" * bool(spec.master_weights))
    found = _by_parameter(update, steps)
    written = parameters
    if spec.master_weights:
        written = update.let(
            "written", update.call(merged, parameters, arguments["master_weights"])
        )
    everything = update.call(list, written.values())
    shrink = _shrink(context, written, found, generic) if spec.weight_decay else None
    if spec.weight_decay and spec.average:
        everything = update.let("everything", everything)
    if spec.average:  # nothing takes memory after the first write, and can fail for want of it
        copies = update.call(torch._foreach_mul, arguments["average"], 1.0)
        context.result["average"] = update.let("new_average", copies)
    update.section("the only writes to the parameters")
    if spec.weight_decay:
        update.effect(torch._foreach_mul_, everything, shrink)
    if found is not None:
        moved = update.call(values_at, written, found)
        update.effect(torch._foreach_add_, moved, update.call(list, found.values()))
    if generic is not None:
        names = [parameter.name for parameter in spec.generic]
        update.effect(torch._foreach_sub_, [written[name] for name in names], generic)
    if spec.master_weights:
        master_weights = arguments["master_weights"]
        rounded = update.call(values_at, parameters, master_weights)
        update.effect(torch._foreach_copy_, rounded, update.call(list, master_weights.values()))
    if spec.average:
        weight = 1 - arguments["average_decay"]
        update.effect(torch._foreach_lerp_, context.result["average"], everything, weight)
    return update.finish(context.result)


def _shrink(context: Context, written: Value, steps: Value | None, generic: Value | None) -> Value:
    """What weight decay multiplies the parameters by, a list in their order.

    Args:
        written: the parameters, or the copies that are written in their place.
        steps: to add, by name.
        generic: steps to subtract from the generic parameters, a list.
    """
    update, spec, shrink = context.update, context.spec, context.arguments["shrink"]
    if not spec.cautious_decay:
        return shrink
    names = [parameter.name for parameter in spec.generic]
    subtracted = {} if generic is None else {n: generic[i] for i, n in enumerate(names)}
    added = {} if steps is None else steps
    return update.let("shrunk", update.call(cautious_shrink, written, added, subtracted, shrink))


def _by_parameter(update: UpdateGraph, steps: Sequence[Value]) -> Value | None:
    """The steps of all blocks in one mapping; None where there is no block."""
    if not steps:
        return None
    return update.let("steps", update.call(merged, *steps) if len(steps) > 1 else steps[0])
