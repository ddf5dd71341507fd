"""Products with a weight of three dimensions: a linear map for each of its entries.

Entry e of the input meets ``W[e]``, as in an ensemble's layers, in experts, or in heads that have
a map each. Every entry is a block, as every group of a convolution is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from kfc_fx.capture.nodes import dimensions, shape_of
from kfc_fx.plan.layer_calls import LayerCall
from kfc_fx.plan.spec import BatchSpec

LAST = BatchSpec((-3, -1), (-3, -1))
"""``[..., E, rows, C]``: channels last, entries before the rows."""
COLUMNS = BatchSpec((-3, -2), (-3, -2))
"""``[..., E, C, rows]``, of ``W @ x``."""
RAGGED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
"""Names of the functions that multiply rows by one entry after the other; the last is the one by
which transformers does where torch's takes no such dtype."""


def batched_calls(node: fx.Node) -> list[LayerCall]:
    """The batched linear maps that a node of a canonical graph may apply: one for each operand
    that may be the weight."""
    if node.op != "call_function":
        return []
    matcher = _CALLS.get(node.target)
    if matcher is None and getattr(node.target, "__name__", "") in RAGGED:
        matcher = _ragged
    return matcher(node) if matcher else []


def entry_of(call: LayerCall) -> LayerCall:
    """A linear call whose weight is one entry of a batched one."""
    return LayerCall(
        "batched_linear",
        call.x,
        call.weight,
        call.bias,
        call.positions,
        inputs_first=call.inputs_first,
        batch=BatchSpec(),
    )


def _call(
    x: object, weight: object, position: int, inputs_first: bool, batch: BatchSpec
) -> LayerCall:
    positions = frozenset((position,))
    return LayerCall(
        "batched_linear", x, weight, None, positions, inputs_first=inputs_first, batch=batch
    )


def _matmul(node: fx.Node) -> list[LayerCall]:
    left, right = node.args
    calls = []
    if dimensions(right) == 3 and (batch := _lying(left, right, LAST)):
        calls.append(_call(left, right, 1, True, batch))
    if dimensions(left) == 3 and (batch := _lying(right, left, COLUMNS)):
        calls.append(_call(right, left, 0, False, batch))
    return calls


def _lying(x: object, weight: object, batch: BatchSpec) -> BatchSpec | None:
    """``batch``, or what it is where x is one matrix for all entries; None for anything else."""
    shape, entries = shape_of(x), (shape_of(weight) or (0,))[0]
    if not shape or len(shape) < 2:
        return None
    if len(shape) == 2 or (len(shape) == 3 and _is(shape[0], 1) and not _is(entries, 1)):
        return BatchSpec((None, batch.inputs[1]), batch.outputs)
    return batch if _is(shape[-3], entries) else None


def _is(size: object, number: int) -> bool:
    """Whether a size is known to be a number; asks no symbolic size, which would fix it."""
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return known == number


def _baddbmm(node: fx.Node) -> list[LayerCall]:
    bias, x, weight = node.args
    if any(node.kwargs[scale] != 1 for scale in ("beta", "alpha")):
        return []
    call = _call(x, weight, 2, True, LAST)
    shape, wanted = shape_of(bias), shape_of(weight)
    if shape and wanted and shape == (wanted[0], 1, wanted[2]):
        positions = frozenset((0, 2))
        with_bias = LayerCall(
            "batched_linear", x, weight, bias, positions, inputs_first=True, batch=LAST
        )
        return [with_bias, _call(weight, x, 1, False, COLUMNS)]
    return [call, _call(weight, x, 1, False, COLUMNS)]


def _ragged(node: fx.Node) -> list[LayerCall]:
    """``x [S, C_in]``, ``W [E, C_in, C_out]`` and the ends of each entry's rows in x."""
    x, weight, *rest = node.args
    ends = rest[0] if rest else node.kwargs.get("offs")
    biased = len(rest) > 1 or node.kwargs.get("bias") is not None
    if dimensions(x) != 2 or dimensions(weight) != 3 or not isinstance(ends, fx.Node) or biased:
        return []
    return [_call(x, weight, 1, True, BatchSpec((None, -1), (None, -1), ends.name))]


def _einsum(node: fx.Node) -> list[LayerCall]:
    """One letter of the weight in all three terms, one summed over, one in the output alone."""
    if len(node.args) != 3 or not isinstance(node.args[0], str) or node.kwargs:
        return []
    operands, _, output = node.args[0].replace(" ", "").partition("->")
    terms = operands.split(",")
    calls = []
    for position in (1, 2):
        x, weight = node.args[3 - position], node.args[position]
        x_term, w_term = terms[2 - position], terms[position - 1]
        if dimensions(weight) == 3 and (found := _letters(x_term, w_term, output)):
            inputs_first, batch = found
            calls.append(_call(x, weight, position, inputs_first, batch))
    return calls


def _letters(x_term: str, w_term: str, output: str) -> tuple[bool, BatchSpec] | None:
    terms = (x_term, w_term, output)
    if "..." in w_term or any(
        len(set(t.replace(".", ""))) < len(t.replace(".", "")) for t in terms
    ):
        return None
    entry, first, second = tuple(w_term)
    for channel, row in ((first, second), (second, first)):
        others = x_term.replace(entry, "").replace(channel, "")
        if (
            entry in output
            and channel in x_term
            and channel not in output
            and row in output
            and row not in x_term
            and sorted(others) == sorted(output.replace(entry, "").replace(row, ""))
        ):
            inputs = (_from_end(x_term, entry), _axis(x_term, channel))
            outputs = (_from_end(output, entry), _axis(output, row))
            return channel == first, BatchSpec(inputs, outputs)
    return None


def _from_end(term: str, letter: str) -> int | None:
    return _axis(term, letter) if letter in term else None


def _axis(term: str, letter: str) -> int:
    """Position from the end; from the start for a letter before an ellipsis."""
    before, dots, after = term.rpartition("...")
    return before.index(letter) if dots and letter in before else after.index(letter) - len(after)


_CALLS: dict[object, Callable[[fx.Node], list[LayerCall]]] = {
    torch.matmul: _matmul,
    torch.bmm: _matmul,
    torch.baddbmm: _baddbmm,
    torch.einsum: _einsum,
}
