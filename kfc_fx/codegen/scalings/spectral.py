"""Generate "spectral": steepest descent under the spectral norm in the metric of Ω."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.pieces.decompositions import Decomposition, decomposed
from kfc_fx.codegen.pieces.matrices import rotate_input
from kfc_fx.codegen.pieces.moments import first_moments, stacked_gradient
from kfc_fx.codegen.spec import StackSpec, StateEntry
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value
from kfc_fx.linalg.polar import polar_factor, polar_factor_by_gram
from kfc_fx.linalg.precision import LEAST_IN_BFLOAT16, has_fast_bfloat16
from kfc_fx.linalg.whitening import bias_whitening, cholesky_whitening, newton_schulz_whitening

SUMMARY = """Steepest descent under the spectral norm, in the metric of Ω.

    W Wᵀ = (Ω / mean eigenvalue + damping I)⁻¹; θ ← θ − lr polar(m W) Wᵀ, scaled to the Frobenius
    norm sqrt(min(rows, columns)); m the EMA of the gradient{ahead}.
    Γ is not needed. ``lr`` holds one rate per block."""
OPTIONS: tuple[str, ...] = ()
REFRESH_OPTIONS: tuple[str, ...] = ("damping",)
REFRESH_SUMMARY = """Whitening matrices W of all input factors."""
START_SUMMARY: str | None = "Whitening matrices of all input factors, from scratch."

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
        entries["m"] = StateEntry(stack.matrix_shape, "zeros")
    return entries


def decompositions(context: Context, stack: StackSpec, *, first: bool) -> list[Decomposition]:
    """Whitening matrices; each factor of a separable Ω takes the root of the damping."""
    damping, number = context.option("damping", stack), "damping"
    if stack.forms.input == "separable":
        damping, number = damping**0.5, "root of the damping"
    found = []
    for factor in stack.basis_shapes:
        ema, name = context.state(factor, stack), f"w_{factor}"
        function: Callable[..., Any] = cholesky_whitening
        tensors: tuple[Value, ...] = (ema,)
        if not first and stack.device != "cpu":
            function, tensors = newton_schulz_whitening, (ema, context.state(name, stack))
        found.append(Decomposition(stack, factor, name, function, tensors, damping, number))
    return found


def refresh(context: Context, stack: StackSpec, *, first: bool) -> list[Value]:
    """New whitening matrices."""
    update, result, key = context.update, context.result, stack.key
    damping = context.option("damping", stack)
    failed: list[Value] = []
    for wanted in decompositions(context, stack, first=first):
        result[wanted.key], lost = decomposed(context, wanted)
        failed.append(lost)
    if stack.has_bias_apart:
        width = stack.first.channels * stack.first.offsets
        channel, locations = context.state("channel", stack), context.state("locations", stack)
        weight = update.call(bias_whitening, channel, width, locations, damping)
        result[f"w_bias_{key}"] = update.let(f"w_bias_{key}", weight, (stack.depth, 1, 1))
    return failed


def steps(context: Context, stacks: Sequence[StackSpec]) -> Iterator[Value]:
    """``−lr polar(m W) Wᵀ``, scaled."""
    update = context.update
    found = [stacked_gradient(context, stack) for stack in stacks]
    update.section('momentum of all "spectral" stacks')
    ahead = first_moments(context, stacks, update.named_list("gradients_of_stacks", found))
    for index, stack in enumerate(stacks):
        update.section(f"{stack.key}: step")
        yield _step(context, stack, ahead[index])


def _step(context: Context, stack: StackSpec, ahead: Value) -> Value:
    update, arguments = context.update, context.arguments
    key, shape = stack.key, stack.matrix_shape
    whitening = {name: context.state(f"w_{name}", stack) for name in stack.factor_shapes}
    if stack.has_bias_apart:
        whitening["bias"] = context.state("w_bias", stack)
    white = rotate_input(update, stack, whitening, ahead)
    white = update.let(f"white_{key}", white, shape)
    polar = _polar_factor(update, stack, white)
    direction = update.let(f"polar_{key}", polar, shape)
    if _in_bfloat16(stack):
        whitening = {name: matrix.to(torch.bfloat16) for name, matrix in whitening.items()}
    moved = rotate_input(update, stack, whitening, direction, back=True)
    if _in_bfloat16(stack):
        moved = moved.to(getattr(torch, stack.dtype))
    moved = update.let(f"direction_{key}", moved, shape)
    norm = update.call(torch.linalg.matrix_norm, moved, keepdim=True).clamp(min=1e-30)
    scale = -arguments["lr"][key] * min(shape[1:]) ** 0.5 / norm
    return context.step(stack, moved * update.let(f"scale_{key}", scale, (stack.depth, 1, 1)))


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
    return stack.dtype == "float32" and min(stack.matrix_shape[1:]) >= least


def _is_long(stack: StackSpec) -> bool:
    short, long = sorted(stack.matrix_shape[1:])
    return long > LONGER_ON_CPU * short
