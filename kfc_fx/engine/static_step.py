"""The generated step on tensors that stay where they are, so that a CUDA graph can replay it.

An eager step launches hundreds of kernels, and on a fast GPU takes as long as its launches. As a
graph it is one launch. Nothing in it asks the device for a number: whether the gradients are
finite is decided there too, and a step on gradients that are not changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfc_fx.codegen.scalings.rules import steps_by_vector
from kfc_fx.codegen.spec import ScalingSpec
from kfc_fx.codegen.text.source import UpdateProgram
from kfc_fx.engine.step_inputs import StepInputs, arguments
from kfc_fx.errors import warn

ALIGNMENT = 64
"""Elements; where a gradient begins in the flat buffer, for vectorised loads."""

Replay = Callable[[], None]


def record(body: Replay, device: torch.device) -> Replay:
    """Record ``body``, which runs on ``device``, and return what replays it. It does not run."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as a data loader's, may go on with what a capture forbids its own.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        body()
    return graph.replay


class StaticStep:
    """One program's ``apply``, its arguments in buffers of its own.

    The first call runs it launch by launch, so that libraries and generated code are loaded; the
    second records it. Parameters are written in place, and so are the state tensors that the step
    reads: those that :meth:`run` returns belong to the optimizer's state from then on.
    """

    def __init__(self, program: UpdateProgram, inputs: StepInputs) -> None:
        """``inputs``: of the first step, tensors on one device."""
        self._program = program
        self.device: torch.device = next(iter(inputs.parameters.values())).device
        self._fixed = inputs
        self._places = _places(inputs)
        self._shapes = _shapes(inputs.gradients)
        self._flat, self._gradients = _flat_like(inputs.gradients)
        self._state = {
            key: {name: inputs.state[key][name].detach().clone() for name in names}
            for key, names in program.state_of_step.items()
        }
        self._generic = {n: [_copy(t) for t in values] for n, values in inputs.generic.items()}
        self._average = [_copy(tensor) for tensor in inputs.average]
        self._rates = _Columns(inputs.rates)
        self._momenta = _Columns(inputs.stack_momenta)
        self._generic_rates = _Numbers(inputs.generic_rates, self._flat)
        self._generic_momenta = _Momenta(_own(inputs.generic_momentum), self._flat)
        self._shrink = _Numbers(inputs.shrink, self._flat)
        self._step = torch.zeros((), dtype=_number_dtype(self._flat), device=self.device)
        self._expected_step = 0
        self.skipped: Tensor = torch.zeros((), dtype=torch.int64, device=self.device)
        """Steps so far on gradients that were not finite; on the device."""
        self._report: dict[str, Tensor] = {}
        self._calls = 0
        self._replay: Replay | None = None

    def fits(self, inputs: StepInputs) -> bool:
        """Whether a step on other inputs can be taken: same parameters, same sizes, same numbers
        where those are fixed."""
        return (
            _shapes(inputs.gradients) == self._shapes
            and _places(inputs) == self._places
            and inputs.momenta == self._fixed.momenta
            and self._generic_rates.fits(inputs.generic_rates)
            and self._generic_momenta.fits(_own(inputs.generic_momentum))
            and self._shrink.fits(inputs.shrink)
        )

    def run(self, inputs: StepInputs) -> dict[str, Any]:
        """One step; returns the state that it wrote, and what it reports.

        Args:
            inputs: ``step`` counts from one.
        """
        self._load(inputs)
        if self._calls and self._replay is None:
            self._replay = self._recorded()
        self._calls += 1
        (self._replay or self._body)()
        # A replay writes without autograd's knowing, which would let a stale backward pass.
        torch.autograd.graph.increment_version(_written(inputs))
        return {
            **self._state,
            "generic": self._generic,
            "average": self._average,
            "report": self._report,
        }

    def forget_skipped(self, count: int) -> None:
        """Take note that the caller does not count so many steps any more."""
        self._expected_step -= count

    # -- between steps -------------------------------------------------------------------

    def _load(self, inputs: StepInputs) -> None:
        names = list(self._gradients)
        torch._foreach_copy_(
            [self._gradients[name] for name in names], [inputs.gradients[name] for name in names]
        )
        self._load_state(inputs)
        self._rates.load(inputs.rates)
        self._momenta.load(inputs.stack_momenta)
        self._generic_rates.load(inputs.generic_rates)
        self._generic_momenta.load(_own(inputs.generic_momentum))
        self._shrink.load(inputs.shrink)
        if inputs.step != self._expected_step:
            self._step.fill_(float(inputs.step))
        self._expected_step = int(inputs.step) + 1

    def _load_state(self, inputs: StepInputs) -> None:
        pairs = [
            (buffer, inputs.state[key][name])
            for key, own in self._state.items()
            for name, buffer in own.items()
        ]
        for name, buffers in self._generic.items():
            pairs += zip(buffers, inputs.generic[name], strict=True)
        pairs += zip(self._average, inputs.average, strict=True)
        moved = [(buffer, tensor) for buffer, tensor in pairs if buffer is not tensor]
        if moved:
            torch._foreach_copy_([pair[0] for pair in moved], [pair[1] for pair in moved])

    def _recorded(self) -> Replay:
        try:
            return record(self._body, self.device)
        except RuntimeError as error:
            warn(
                f"the step cannot be captured in a CUDA graph and runs launch by launch: {error} "
                "(cuda_graph=False does not try)"
            )
            return self._body

    # -- what is recorded ----------------------------------------------------------------

    def _body(self) -> None:
        finite = self._all_finite()
        one = finite.to(torch.float32)
        for flat in self._flat:
            flat.masked_fill_(~finite, 0)
        given = arguments(self._program, "apply", self._inputs(one))
        result = self._program.functions["apply"](**given)
        self._report = result.pop("report", {})
        for buffer, fresh in self._renewed(result):
            torch.where(finite, fresh, buffer, out=buffer)
        self._step += one
        self.skipped += ~finite

    def _renewed(self, result: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Buffers of the state, and the tensors to put into them."""
        for key, own in self._state.items():
            for name, fresh in result.get(key, {}).items():
                yield own[name], fresh
        for name, values in result.get("generic", {}).items():
            yield from zip(self._generic[name], values, strict=True)
        yield from zip(self._average, result.get("average", ()), strict=True)

    def _all_finite(self) -> Tensor:
        norms = [torch.linalg.vector_norm(flat, float("inf")) for flat in self._flat]
        return torch.stack([norm.float() for norm in norms]).isfinite().all()

    def _inputs(self, one: Tensor) -> StepInputs:
        """The inputs in buffers. ``one`` is 0 where gradients are not finite: they are zeros then,
        rates and the momentum of vectors too, and the step is zero."""
        vectors = [stack.key for stack in self._program.spec.stacks if _is_by_vector(stack.scaling)]
        fixed = self._fixed
        generic = self._generic_momenta.values() if self._generic_momenta.count else None
        return replace(
            fixed,
            gradients=self._gradients,
            state=self._state,
            generic=self._generic,
            average=self._average,
            step=self._step,
            rates=self._rates.times(one),
            momenta={
                scaling: momentum * one if _is_by_vector(scaling) else momentum
                for scaling, momentum in fixed.momenta.items()
            },
            stack_momenta=self._momenta.times(one, vectors),
            generic_rates=self._generic_rates.times(one),
            generic_momentum=fixed.generic_momentum if generic is None else generic,
            shrink=self._shrink.towards_one(one),
        )


class _Columns:
    """Columns by stack in buffers of their own, copied where another one is given."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self._buffers = {key: column.clone() for key, column in columns.items()}
        self._loaded: dict[str, Tensor] = {}

    def load(self, columns: Mapping[str, Tensor]) -> None:
        for key, buffer in self._buffers.items():
            if self._loaded.get(key) is not columns[key]:
                buffer.copy_(columns[key])
                self._loaded[key] = columns[key]

    def times(self, one: Tensor, keys: Collection[str] | None = None) -> dict[str, Tensor]:
        """Those of ``keys``, by default all, times ``one``, and the others."""
        return {
            key: buffer * one if keys is None or key in keys else buffer
            for key, buffer in self._buffers.items()
        }


class _Numbers:
    """One number for each of some parameters, on the device: a single one where all are equal,
    which ``_foreach`` functions take in one launch."""

    def __init__(self, values: Sequence[float], gradients: Sequence[Tensor]) -> None:
        self.count, self._uniform = len(values), self._is_one(values)
        self._size = 1 if self._uniform else len(values)
        dtype, device = self._dtype(gradients), gradients[0].device
        self._values = torch.zeros(self._size, dtype=dtype, device=device)
        self._loaded: list[float] | None = None

    def fits(self, values: Sequence[float]) -> bool:
        return len(values) == self.count and (not self._uniform or self._is_one(values))

    def load(self, values: Sequence[float]) -> None:
        wanted = [float(value) for value in values[: self._size]]
        if wanted != self._loaded:
            for number, value in enumerate(wanted):  # a fill takes its number along, unlike a copy
                self._values[number].fill_(value)
            self._loaded = wanted

    def times(self, one: Tensor) -> Any:
        return self._given(self._values * one)

    def towards_one(self, one: Tensor) -> Any:
        """The numbers where ``one`` is 1, ones where it is 0."""
        return self._given(1 - (1 - self._values) * one)

    def _given(self, values: Tensor) -> Any:
        return values[0] if self._uniform else list(values.unbind())

    def _is_one(self, values: Sequence[float]) -> bool:
        return _is_uniform(values)

    def _dtype(self, gradients: Sequence[Tensor]) -> torch.dtype:
        return _number_dtype(gradients)


class _Momenta(_Numbers):
    """A list in any case, in double precision: ``1 − momentum`` loses digits in single."""

    def values(self) -> list[Tensor]:
        return list(self._values.unbind())

    def _is_one(self, values: Sequence[float]) -> bool:
        return False

    def _dtype(self, gradients: Sequence[Tensor]) -> torch.dtype:
        return torch.float64


def _number_dtype(gradients: Sequence[Tensor]) -> torch.dtype:
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    return torch.float64 if wide else torch.float32


def _is_uniform(values: Sequence[float]) -> bool:
    return len(values) > 0 and all(value == values[0] for value in values)


def _own(momentum: Any) -> list[float]:
    """Where generic parameters have momenta of their own, these."""
    return momentum if isinstance(momentum, list) else []


def _is_by_vector(scaling: ScalingSpec) -> bool:
    return steps_by_vector(scaling.generator)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _shapes(gradients: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (gradient.shape, gradient.dtype) for name, gradient in gradients.items()}


def _written(inputs: StepInputs) -> list[Tensor]:
    return [*inputs.parameters.values(), *inputs.master_weights.values()]


def _places(inputs: StepInputs) -> list[int]:
    return [tensor.data_ptr() for tensor in _written(inputs)]


def _flat_like(gradients: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One buffer of zeros for each dtype, and views of it laid out as the gradients are."""
    ends: dict[torch.dtype, int] = {}
    begins = {}
    for name, gradient in gradients.items():
        begins[name] = ends.get(gradient.dtype, 0)
        size = -(-gradient.numel() // ALIGNMENT) * ALIGNMENT
        ends[gradient.dtype] = begins[name] + size
    device = next(iter(gradients.values())).device
    flat = {dtype: torch.zeros(end, dtype=dtype, device=device) for dtype, end in ends.items()}
    views = {
        name: flat[gradient.dtype].as_strided(gradient.shape, _strides(gradient), begins[name])
        for name, gradient in gradients.items()
    }
    return list(flat.values()), views


def _strides(gradient: Tensor) -> tuple[int, ...]:
    """Those of the gradient where it is dense, of a contiguous tensor where it is not."""
    return torch.empty_like(gradient, device="meta").stride()
