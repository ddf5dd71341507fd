"""Generate "spectral": steepest descent under the spectral norm in the metric of Ω."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kfc_fx.codegen.pieces.context import Context, StackContext
from kfc_fx.codegen.pieces.decompositions import Decomposition, Made, decomposed
from kfc_fx.codegen.pieces.matrices import (
    from_row_parts,
    in_row_parts,
    rotate_input,
    step_by_parameter,
)
from kfc_fx.codegen.pieces.moments import (
    first_moments,
    half,
    stacked_gradient,
    step_ahead,
    wide,
)
from kfc_fx.codegen.spec import StackSpec, StateEntry, UpdateSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value
from kfc_fx.linalg.polar import polar_factor, polar_factor_by_gram
from kfc_fx.linalg.precision import LEAST_IN_BFLOAT16, has_fast_bfloat16
from kfc_fx.linalg.whitening import bias_whitening, cholesky_whitening, next_whitening

SUMMARY = """One step of steepest descent under the spectral norm, in the metric of Ω.

W Wᵀ = (Ω / mean eigenvalue + damping I)⁻¹; θ ← θ − lr polar(m W) Wᵀ, scaled to the Frobenius norm
sqrt(min(rows, columns)); m is the EMA of the gradient{ahead}. Γ is not needed. ``lr`` holds one
rate for each layer."""
OPTIONS: tuple[str, ...] = ()
REFRESH_OPTIONS: tuple[str, ...] = ("damping",)
REFRESH_SUMMARY = "Whitening matrices W of all input factors."
FOLLOW_SUMMARY = """They follow their factors by products alone, but at the ``first`` refresh, where
there are none to go on from."""
KEEPS_BASES = False
COUNTS_EXAMPLES = False

LONGER_ON_CPU = 2
"""Times that the long side of a matrix may be longer, whose polar factor is all in bfloat16."""
LEAST_LATE_IN_BFLOAT16 = 128
"""Short side from which, of longer ones, the last steps are: smaller matrices are converted for
longer than it spares."""


def state_entries(stack: StackSpec, *, momentum: bool) -> dict[str, StateEntry]:
    """Whitening matrices by factor, and the EMA of the gradient."""
    entries = {
        f"w_{name}": StateEntry(shape, "identity") for name, shape in stack.factor_shapes.items()
    }
    if stack.has_bias_apart:
        entries["w_bias"] = StateEntry((stack.depth, 1, 1), "ones")
    if momentum:
        entries["m"] = StateEntry(stack.matrix_shape, "zeros", is_moment=True)
    return entries


def decompositions(spec: UpdateSpec, stack: StackSpec) -> list[Decomposition]:
    """Whitening matrices; each factor of a separable Ω takes the root of the damping."""
    power = 0.5 if stack.forms.input == "separable" else 1
    found = []
    for factor in stack.basis_shapes:
        name = f"w_{factor}"
        if stack.device == "cpu":
            call = Decomposition(stack, factor, name, cholesky_whitening, (factor,), power)
        else:
            tensors = (factor, name)
            call = Decomposition(stack, factor, name, next_whitening, tensors, power, follows=True)
        found.append(call)
    return found


def refresh(local: StackContext, made: Made) -> tuple[dict[str, Value], list[Value]]:
    """New whitening matrices."""
    stack = local.stack
    entries: dict[str, Value] = {}
    failed: list[Value] = []
    for wanted in decompositions(local.spec, stack):
        entries[wanted.name], lost = decomposed(local, wanted, made)
        failed.append(lost)
    if stack.has_bias_apart:
        width = stack.first.channels * stack.first.offsets
        channel, locations = local.state("channel"), local.state("locations")
        damping = local.arguments["damping"]
        call = local.update.call(bias_whitening, channel, width, locations, damping)
        entries["w_bias"] = call
    return entries, failed


def steps(context: Context, stacks: Sequence[StackSpec]) -> Iterator[Value]:
    """``−lr polar(m W) Wᵀ``, scaled."""
    gradients = [context.of_stack("gather", stack, stacked_gradient) for stack in stacks]
    ahead = _moments(context, stacks, gradients)
    for index, stack in enumerate(stacks):
        given = {"gradient": ahead[index], "lr": context.arguments["lr"][stack.key]}
        yield context.of_stack("step", stack, _step, **given)


def _moments(context: Context, stacks: Sequence[StackSpec], gradients: Sequence[Value]) -> Value:
    """What takes the place of the gradients, a list."""
    one = stacks[0]
    if not context.has_momentum(one):
        return context.update.named_list("gradients_of_stacks", gradients)
    given = {"stacked": list(gradients), "m": context.states("m", stacks)}
    given["momentum"] = context.momentum(stacks)
    if context.spec.partial:
        given["active"] = context.actives(stacks)

    is_half = context.spec.half_moments

    def body(update: UpdateGraph, values: dict[str, Value]) -> object:
        values |= wide(update, context.spec, values)
        own = context.spec.has_own_momenta(one.scaling)
        new_m = first_moments(update, values, values["stacked"], own=own)
        if context.steps_ahead(one):
            ahead = step_ahead(update, values["stacked"], new_m, values["momentum"])
            return ahead, half(update, context.spec, new_m)
        return (new_m, half(update, context.spec, new_m)) if is_half else new_m

    section = f'momentum of all "{stacks[0].scaling}" stacks'
    call = context.of_scaling("moments", one.scaling, section, body, **given)
    m, ahead = context.name("m", one.scaling), context.name("ahead", one.scaling)
    if context.steps_ahead(one) or is_half:
        moved, new = context.update.let_tuple([ahead, m], call)
    else:
        moved = new = context.update.let(m, call)
    context.keep("m", stacks, new)
    return moved


def _step(local: StackContext) -> object:
    update, stack, arguments = local.update, local.stack, local.arguments
    rows, columns = stack.polar_shape[1:]
    whitening = {name: local.state(f"w_{name}") for name in stack.factor_shapes}
    if stack.has_bias_apart:
        whitening["bias"] = local.state("w_bias")
    white = local.let("white", rotate_input(local, whitening, arguments["gradient"]))
    polar = _polar_factor(update, stack, in_row_parts(stack, white))
    polar = local.let("polar", from_row_parts(stack, polar))
    if _in_bfloat16(stack):
        whitening = {name: matrix.to(torch.bfloat16) for name, matrix in whitening.items()}
    moved = rotate_input(local, whitening, polar, back=True)
    if _in_bfloat16(stack):
        moved = moved.to(getattr(torch, stack.dtype))
    moved = update.let("direction", in_row_parts(stack, moved), stack.polar_shape)
    norm = update.call(torch.linalg.matrix_norm, moved, keepdim=True).clamp(min=1e-30)
    norm = update.let("norm", norm, remark="above zero")
    size = update.call(min, rows, columns) ** 0.5
    if stack.row_parts > 1:  # a rate is of a block, or of its weight and its bias
        moved = from_row_parts(stack, moved * (size / norm))
        return step_by_parameter(local, moved * -arguments["lr"])
    return step_by_parameter(local, moved * (-arguments["lr"] * size / norm))


def _polar_factor(update: UpdateGraph, stack: StackSpec, white: Value) -> Value:
    """Of the whitened matrices, in bfloat16 where that is faster.

    On a CPU it is two to three times as fast. Ten products with the long side in it are faster
    then than two of them and twice as many of the short side alone in float32, if the matrix is
    not much longer than wide.
    """
    if not _in_bfloat16(stack):
        return update.call(polar_factor_by_gram, white)
    if stack.device.startswith("cuda") or not _is_long(stack):
        return update.call(polar_factor, white)
    return update.call(polar_factor_by_gram, white, torch.bfloat16)


def _in_bfloat16(stack: StackSpec) -> bool:
    """Whether polar factors are, and their way back from the metric, which then rounds as they
    do: what is left of a step after them is linear in them."""
    if not has_fast_bfloat16(stack.device):
        return False
    if stack.device.startswith("cuda"):
        return True
    least = LEAST_LATE_IN_BFLOAT16 if _is_long(stack) else LEAST_IN_BFLOAT16
    return stack.dtype == "float32" and min(stack.polar_shape[1:]) >= least


def _is_long(stack: StackSpec) -> bool:
    short, long = sorted(stack.polar_shape[1:])
    return long > LONGER_ON_CPU * short
