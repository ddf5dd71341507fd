"""The generated step on tensors that stay where they are, so that a CUDA graph can replay it.

An eager step launches hundreds of kernels, and on a fast GPU takes as long as its launches. As a
graph it is one launch. Nothing in it asks the device for a number: whether the gradients are
finite is decided there too, and a step on gradients that are not changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfc_fx.codegen.scalings.rules import VECTOR_RULES
from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.codegen.text.source import UpdateProgram
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

    def __init__(
        self,
        spec: UpdateSpec,
        program: UpdateProgram,
        given: Mapping[str, Any],
    ) -> None:
        """``given``: arguments of ``apply``, tensors on one device."""
        self._function = program.functions["apply"]
        placeholders = [n for n in program.graphs["apply"].graph.nodes if n.op == "placeholder"]
        self._names = [str(node.target) for node in placeholders]
        self._vector_momenta = [
            spec.option("momentum", scaling) for scaling in spec.momentum if scaling in VECTOR_RULES
        ]
        self.device = next(iter(given["parameters"].values())).device
        self._fixed = {name: given[name] for name in ("parameters", "masters") if name in given}
        self._places = _places(self._fixed)
        self._shapes = {n: (g.shape, g.dtype) for n, g in given["gradients"].items()}
        self._flat, self._gradients = _flat_like(given["gradients"])
        used = _entries_read(program)
        self._state = {
            name: [t.detach().clone() for t in _listed(given["state"][name])] for name in used
        }
        self._lists = {name for name in used if not isinstance(given["state"][name], Tensor)}
        self._rates = {key: rate.clone() for key, rate in given["lr"].items() if key != "generic"}
        self._loaded_rates: dict[str, Tensor] = {}
        self._numbers = {
            "generic": _Numbers(given["lr"]["generic"], self._flat),
            "shrink": _Numbers(given.get("shrink", ()), self._flat),
        }
        self._constants = {
            name: value
            for name, value in given.items()
            if name in self._names
            and name not in ("parameters", "masters", "gradients", "state", "lr", "shrink", "step")
        }
        self._step = torch.zeros((), dtype=_number_dtype(self._flat), device=self.device)
        self._expected_step = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        """Steps so far on gradients that were not finite; on the device."""
        self.report: dict[str, Tensor] = {}
        self._calls = 0
        self._replay: Replay | None = None

    def fits(self, given: Mapping[str, Any]) -> bool:
        """Whether a step on other arguments can be taken: same parameters, same sizes."""
        shapes = {n: (g.shape, g.dtype) for n, g in given["gradients"].items()}
        fixed = {name: given[name] for name in self._fixed}
        return (
            shapes == self._shapes
            and _places(fixed) == self._places
            and self._numbers["generic"].fits(given["lr"]["generic"])
            and self._numbers["shrink"].fits(given.get("shrink", ()))
        )

    def run(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """One step; returns the state tensors that it read and wrote.

        Args:
            given: as in the constructor; ``step`` counts from one.
        """
        self._load(given)
        if self._calls and self._replay is None:
            self._replay = self._recorded()
        self._calls += 1
        (self._replay or self._body)()
        written = [t for values in self._fixed.values() for t in values.values()]
        # A replay writes without autograd's knowing, which would let a stale backward pass.
        torch.autograd.graph.increment_version(written)
        return {
            name: buffers if name in self._lists else buffers[0]
            for name, buffers in self._state.items()
        }

    def forget_skipped(self, count: int) -> None:
        """Take note that the caller does not count so many steps any more."""
        self._expected_step -= count

    # -- between steps -------------------------------------------------------------------

    def _load(self, given: Mapping[str, Any]) -> None:
        names = list(self._gradients)
        torch._foreach_copy_(
            [self._gradients[name] for name in names], [given["gradients"][name] for name in names]
        )
        old: list[Tensor] = []
        new: list[Tensor] = []
        for name, buffers in self._state.items():
            for buffer, tensor in zip(buffers, _listed(given["state"][name]), strict=True):
                if buffer is not tensor:
                    old.append(buffer)
                    new.append(tensor)
        if old:
            torch._foreach_copy_(old, new)
        for key, rate in self._rates.items():
            if self._loaded_rates.get(key) is not given["lr"][key]:
                rate.copy_(given["lr"][key])
                self._loaded_rates[key] = given["lr"][key]
        self._numbers["generic"].load(given["lr"]["generic"])
        self._numbers["shrink"].load(given.get("shrink", ()))
        if given["step"] != self._expected_step:
            self._step.fill_(float(given["step"]))
        self._expected_step = given["step"] + 1

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
        result = self._function(**self._arguments(one))
        self.report = {name: result.pop(name) for name in ("nu", "clip_scale") if name in result}
        for name, value in result.items():
            for buffer, fresh in zip(self._state[name], _listed(value), strict=True):
                torch.where(finite, fresh, buffer, out=buffer)
        self._step += one
        self.skipped += ~finite

    def _all_finite(self) -> Tensor:
        norms = [torch.linalg.vector_norm(flat, float("inf")) for flat in self._flat]
        return torch.stack([norm.float() for norm in norms]).isfinite().all()

    def _arguments(self, one: Tensor) -> dict[str, Any]:
        """The arguments of ``apply``. ``one`` is 0 where gradients are not finite: they are zeros
        then, rates and the momentum of vectors too, and the step is zero."""
        arguments = dict(self._constants)
        for name in self._vector_momenta:
            arguments[name] = arguments[name] * one
        state = {
            name: buffers if name in self._lists else buffers[0]
            for name, buffers in self._state.items()
        }
        rates: dict[str, Any] = {key: rate * one for key, rate in self._rates.items()}
        rates["generic"] = self._numbers["generic"].times(one)
        arguments |= self._fixed
        arguments |= {"gradients": self._gradients, "state": state, "lr": rates}
        if "shrink" in self._names:
            arguments["shrink"] = self._numbers["shrink"].towards_one(one)
        if "step" in self._names:
            arguments["step"] = self._step
        return {name: arguments[name] for name in self._names}


class _Numbers:
    """One number for each of some parameters, on the device: a single one where all are equal,
    which ``_foreach`` functions take in one launch."""

    def __init__(self, values: Sequence[float], gradients: Sequence[Tensor]) -> None:
        self._count, self._uniform = len(values), _is_uniform(values)
        self._size = 1 if self._uniform else len(values)
        dtype, device = _number_dtype(gradients), gradients[0].device
        self._values = torch.zeros(self._size, dtype=dtype, device=device)
        self._loaded: list[float] | None = None

    def fits(self, values: Sequence[float]) -> bool:
        return len(values) == self._count and (not self._uniform or _is_uniform(values))

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


def _number_dtype(gradients: Sequence[Tensor]) -> torch.dtype:
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    return torch.float64 if wide else torch.float32


def _is_uniform(values: Sequence[float]) -> bool:
    return len(values) > 0 and all(value == values[0] for value in values)


def _listed(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _places(fixed: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, ...]:
    return tuple(t.data_ptr() for values in fixed.values() for t in values.values())


def _entries_read(program: UpdateProgram) -> list[str]:
    """Names of the state entries that ``apply`` takes."""
    graph = program.graphs["apply"].graph
    state = next(node for node in graph.nodes if node.op == "placeholder" and node.name == "state")
    return list(dict.fromkeys(str(user.args[1]) for user in state.users))


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
