"""Generate ``apply``: gradients into steps, and steps into parameters."""

from __future__ import annotations

import torch

from kfc_fx.codegen.accumulate import describe
from kfc_fx.codegen.generic import generic_steps
from kfc_fx.codegen.layout import StackSpec
from kfc_fx.codegen.matrices import gather, rotate, rotate_input, scatter
from kfc_fx.codegen.options import UpdateSpec
from kfc_fx.codegen.update_graph import UpdateGraph, Value

ADAM_SUMMARY = """One step of Adam in the eigenbasis of Ω ⊗ Γ.

    Both moments live in the basis, and ``refresh`` turns them with it; both are bias-corrected,
    m with Nesterov's step ahead. ``step`` counts from one, ``lr`` holds one rate per block.
    """
INVERSE_SUMMARY = """One step of KFC-pre (Grosse & Martens 2016, algorithm 1).

    v = −lr Γ⁻¹ ∇ Ω⁻¹{clip};
    p ← momentum p + v; θ ← θ + p.
    """
CLIP_TEXT = ", scaled by sqrt(clip / ν) where ν = vᵀ(F + γ)v > clip"
PRECONDITION_SUMMARY = "The direction v = −lr Γ⁻¹ ∇ Ω⁻¹ of every block, before it is clipped."


def apply_graphs(spec: UpdateSpec) -> list[UpdateGraph]:
    """``apply(...)``, and before it ``precondition(...)`` where ν is computed between the two."""
    if spec.scaling == "adam":
        return [_adam_graph(spec)]
    if spec.clip == "exact":
        return [_precondition_graph(spec), _inverse_graph(spec)]
    return [_inverse_graph(spec)]


def _adam_graph(spec: UpdateSpec) -> UpdateGraph:
    update = UpdateGraph("apply", ADAM_SUMMARY)
    arguments = _arguments(update, spec, ["step", "second_moment_decay", "eps"])
    steps: dict[str, Value] = {}
    result: dict[str, Value] = {}
    for stack in spec.stacks:
        update.section(describe(stack))
        matrix = _adam_stack(update, spec, stack, arguments, result)
        steps.update(scatter(update, stack, matrix))
    return _finish(update, spec, arguments, steps, result)


def _adam_stack(
    update: UpdateGraph,
    spec: UpdateSpec,
    stack: StackSpec,
    arguments: dict[str, Value],
    result: dict[str, Value],
) -> Value:
    key, shape, state = stack.key, stack.matrix_shape, arguments["state"]
    decay, step = arguments["second_moment_decay"], arguments["step"]
    g = update.let(f"g_{key}", gather(update, stack, arguments["gradients"]), shape)
    bases = {
        factor: update.let(f"q_{factor}_{key}", state[f"q_{factor}_{key}"], size)
        for factor, size in stack.basis_shapes.items()
    }
    rotated = g
    if bases:
        rotated = update.let(f"rotated_{key}", rotate(update, stack, bases, g), shape)
    v = update.call(torch.lerp, state[f"v_{key}"], rotated.square(), 1 - decay)
    v = update.let(f"v_{key}", _masked(update, spec, arguments, key, v, state[f"v_{key}"]), shape)
    result[f"v_{key}"] = v
    ahead = rotated
    if spec.momentum:
        momentum = arguments["momentum"]
        m = update.call(torch.lerp, state[f"m_{key}"], rotated, 1 - momentum)
        m = _masked(update, spec, arguments, key, m, state[f"m_{key}"])
        result[f"m_{key}"] = m = update.let(f"m_{key}", m, shape)
        ahead = update.call(torch.lerp, rotated, m, momentum) / (1 - momentum ** (step + 1))
        ahead = update.let(f"ahead_{key}", ahead, shape)
    scale = update.let(f"scale_{key}", (v / (1 - decay**step)).sqrt() + arguments["eps"], shape)
    scaled = update.let(f"scaled_{key}", ahead / scale, shape)
    turned = rotate(update, stack, bases, scaled, back=True)
    moved = turned * -arguments["lr"][key]
    return update.let(f"step_{key}", _masked_step(spec, arguments, key, moved), shape)


def _precondition_graph(spec: UpdateSpec) -> UpdateGraph:
    update = UpdateGraph("precondition", PRECONDITION_SUMMARY)
    arguments = {name: update.argument(name) for name in ("gradients", "state", "lr")}
    views: dict[str, Value] = {}
    matrices: dict[str, Value] = {}
    for stack in spec.stacks:
        update.section(describe(stack))
        _, v = _direction(update, stack, arguments)
        matrices[stack.key] = v
        views.update(scatter(update, stack, v))
    return update.finish((matrices, views))


def _inverse_graph(spec: UpdateSpec) -> UpdateGraph:
    clip = CLIP_TEXT if spec.clip != "none" else ""
    update = UpdateGraph("apply", INVERSE_SUMMARY.format(clip=clip))
    extra = {"none": [], "factors": ["clip"], "exact": ["v", "nu", "clip"]}[spec.clip]
    arguments = _arguments(update, spec, extra)
    vectors = _vectors(update, spec, arguments)
    result: dict[str, Value] = {}
    if spec.clip != "none":
        scale = (arguments["clip"] / arguments["nu"].clamp(min=1e-30)).sqrt().clamp(max=1)
        arguments["clip_scale"] = update.let("clip_scale", scale)
        result |= {"nu": arguments["nu"], "clip_scale": arguments["clip_scale"]}
    steps: dict[str, Value] = {}
    for stack in spec.stacks:
        update.section(f"{stack.key}: step")
        matrix = _momentum_step(update, spec, stack, arguments, vectors[stack.key], result)
        steps.update(scatter(update, stack, matrix))
    return _finish(update, spec, arguments, steps, result)


def _vectors(
    update: UpdateGraph, spec: UpdateSpec, arguments: dict[str, Value]
) -> dict[str, Value]:
    """v by stack; with the clip from the factors, ν = −Σ lr ⟨∇, v⟩ too, since F v = −lr ∇."""
    if spec.clip == "exact":
        return {stack.key: arguments["v"][stack.key] for stack in spec.stacks}
    vectors, nu = {}, None
    for stack in spec.stacks:
        update.section(describe(stack))
        g, v = _direction(update, stack, arguments)
        vectors[stack.key] = v
        part = -(arguments["lr"][stack.key] * g * v).sum()
        if stack.device != spec.stacks[0].device:
            part = part.to(spec.stacks[0].device)
        nu = part if nu is None else nu + part
    if spec.clip == "factors":
        update.section("ν = vᵀ(F + γ)v = −Σ lr ⟨∇, v⟩, since (F + γ) v = −lr ∇")
        arguments["nu"] = update.let("nu", nu)
    return vectors


def _direction(
    update: UpdateGraph, stack: StackSpec, arguments: dict[str, Value]
) -> tuple[Value, Value]:
    """(gradient, v = −lr Γ⁻¹ ∇ Ω⁻¹) of a stack."""
    key, shape, state = stack.key, stack.matrix_shape, arguments["state"]
    g = update.let(f"g_{key}", gather(update, stack, arguments["gradients"]), shape)
    inverse = state[f"gamma_inverse_{key}"]
    left = inverse * g if stack.forms.output == "diagonal" else inverse @ g
    if stack.forms.input == "diagonal":
        natural = left * state[f"omega_inverse_{key}"]
    elif stack.forms.input == "dense":
        natural = left @ state[f"omega_inverse_{key}"]
    else:
        bases = {name: state[f"q_{name}_{key}"] for name in ("channel", "offset")}
        rotated = rotate_input(update, stack, bases, left)
        scaled = update.let(f"scaled_{key}", rotated * state[f"input_scale_{key}"], shape)
        natural = rotate_input(update, stack, bases, scaled, back=True)
    return g, update.let(f"v_{key}", natural * -arguments["lr"][key], shape)


def _momentum_step(
    update: UpdateGraph,
    spec: UpdateSpec,
    stack: StackSpec,
    arguments: dict[str, Value],
    v: Value,
    result: dict[str, Value],
) -> Value:
    key, shape, state = stack.key, stack.matrix_shape, arguments["state"]
    moved = arguments["clip_scale"] * v if spec.clip != "none" else v
    if spec.momentum:
        moved = arguments["momentum"] * state[f"p_{key}"] + moved
        moved = _masked(update, spec, arguments, key, moved, state[f"p_{key}"])
        result[f"p_{key}"] = moved = update.let(f"p_{key}", moved, shape)
        if not spec.partial:
            return moved
    return update.let(f"step_{key}", _masked_step(spec, arguments, key, moved), shape)


def _masked(
    update: UpdateGraph,
    spec: UpdateSpec,
    arguments: dict[str, Value],
    key: str,
    new: Value,
    old: Value,
) -> Value:
    """Keep the old state of blocks that have no gradient in this step."""
    return update.call(torch.where, arguments["active"][key], new, old) if spec.partial else new


def _masked_step(spec: UpdateSpec, arguments: dict[str, Value], key: str, step: Value) -> Value:
    return step * arguments["active"][key] if spec.partial else step


def _arguments(update: UpdateGraph, spec: UpdateSpec, extra: list[str]) -> dict[str, Value]:
    names = ["parameters", "gradients", "state", "lr"]
    names += ["momentum"] * spec.momentum
    names += extra
    names += ["active"] * spec.partial
    names += ["shrink"] * spec.weight_decay
    names += ["average_decay"] * spec.average
    if spec.generic and spec.generic_rule == "adamw":
        names += ["step"] * ("step" not in names)
    return {name: update.argument(name) for name in names}


def _finish(
    update: UpdateGraph,
    spec: UpdateSpec,
    arguments: dict[str, Value],
    steps: dict[str, Value],
    result: dict[str, Value],
) -> UpdateGraph:
    """Generic parameters, decay, the step itself and the Polyak average; one call for each."""
    generic = generic_steps(update, spec, arguments, result) if spec.generic else None
    parameters = arguments["parameters"]
    update.section("the only writes to the parameters")
    if spec.weight_decay or spec.average:
        named = [parameters[name] for name in spec.parameters]
        everything = update.named_list("everything", named)
    if spec.weight_decay:
        update.effect(torch._foreach_mul_, everything, arguments["shrink"])
    update.effect(torch._foreach_add_, [parameters[n] for n in steps], list(steps.values()))
    if generic is not None:
        names = [parameter.name for parameter in spec.generic]
        update.effect(torch._foreach_sub_, [parameters[name] for name in names], generic)
    if spec.average:
        averaged = update.call(
            torch._foreach_lerp,
            arguments["state"]["average"],
            everything,
            1 - arguments["average_decay"],
        )
        result["average"] = update.let("average", averaged)
    return update.finish(result)
