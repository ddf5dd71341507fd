"""Fits the rates of ``kernels.triton_cost`` to a run of ``gpu_check``.

    python -m kfc_fx.tools.gpu.cost_fit gpu.json [--clock device]

A method's time is taken as ``products / rate + moved bytes / bandwidth + launches · launch``, in
bytes that memory moves meanwhile: linear in ``1 / rate`` by precision mode and in the launch. The
relative errors are least squares, so that short layers count as much as long ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfc_fx.tools.gpu.timing import CLOCKS

METHODS = ("structured", "im2col")
CLEAR = 1.2  # the choice matters where the methods differ by more


@dataclass(frozen=True)
class FittedCost:
    """The constants of ``kernels.triton_cost``, and how often their choice is the faster method.

    ``clear`` counts layers whose methods differ by more than ``CLEAR``, ``right`` those of them
    for which the fitted estimate chooses the faster.
    """

    products_per_byte: dict[str, float]
    launch_bytes: float
    right: int
    clear: int


@dataclass(frozen=True)
class Measured:
    """One method on one layer; ``moved`` and ``time`` in bytes that memory moves meanwhile."""

    mode: str
    products: float
    moved: float
    launches: int
    time: float


def fit_cost(results: Mapping[str, Any], clock: str = "host") -> FittedCost:
    """Fit the constants to the layers of a JSON that ``gpu_check`` wrote.

    Args:
        results: the JSON.
        clock: ``"host"``, since training launches its steps from there, or ``"device"``.

    Raises:
        ValueError: too few layers, or a fitted constant that is not positive.
    """
    layers = list(_layers(results, clock))
    modes = sorted({pair[0].mode for pair in layers})
    measured = [method for pair in layers for method in pair]
    if len(measured) <= len(modes) + 1:
        raise ValueError(f"{len(layers)} layers with times of the {clock} are too few for a fit")
    rates = _least_squares(measured, modes)
    if not (rates > 0).all():
        found = dict(zip([*modes, "launch"], rates.tolist(), strict=True))
        raise ValueError(f"the layers do not determine the rates: {found}")
    costs = dict(zip(modes, rates.tolist(), strict=False))
    launch = rates[-1].item()
    clear = [pair for pair in layers if _ratio(pair) > CLEAR]
    right = sum(_chosen(pair, costs, launch) == _fastest(pair) for pair in clear)
    return FittedCost({mode: 1 / cost for mode, cost in costs.items()}, launch, right, len(clear))


def _layers(results: Mapping[str, Any], clock: str) -> Iterator[tuple[Measured, ...]]:
    bytes_per_ms = results["ceilings"]["copy GB/s"] * 1e6
    for row in results["layers"]:
        times = row.get("times", {})
        if "work" not in row or not all(clock in times.get(name, {}) for name in METHODS):
            continue
        yield tuple(
            Measured(
                row["mode"], row["work"][name]["products"], row["work"][name]["moved_bytes"],
                row["work"][name]["launches"], times[name][clock]["median"] * bytes_per_ms,
            )
            for name in METHODS
        )  # fmt: skip


def _least_squares(measured: Sequence[Measured], modes: Sequence[str]) -> Tensor:
    """Bytes a product by mode, then bytes a launch."""
    equations = [
        [*(m.products / m.time if m.mode == mode else 0.0 for mode in modes), m.launches / m.time]
        for m in measured
    ]
    left = torch.tensor(equations, dtype=torch.float64)
    scale = left.norm(dim=0)  # columns differ by nine orders of magnitude
    right = torch.tensor([[1 - m.moved / m.time] for m in measured], dtype=torch.float64)
    return torch.linalg.lstsq(left / scale, right, driver="gelsd").solution[:, 0] / scale


def _chosen(pair: Sequence[Measured], costs: Mapping[str, float], launch: float) -> int:
    estimated = [m.products * costs[m.mode] + m.moved + m.launches * launch for m in pair]
    return estimated.index(min(estimated))


def _fastest(pair: Sequence[Measured]) -> int:
    times = [m.time for m in pair]
    return times.index(min(times))


def _ratio(pair: Sequence[Measured]) -> float:
    times = sorted(m.time for m in pair)
    return times[-1] / times[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the constants as ``kernels.triton_cost`` has them."""
    parser = argparse.ArgumentParser(description="Fit the cost model to a run of gpu_check.")
    parser.add_argument("results", type=Path, help="JSON that gpu_check wrote")
    parser.add_argument("--clock", choices=CLOCKS, default="host")
    options = parser.parse_args(arguments)
    fitted = fit_cost(json.loads(options.results.read_text(encoding="utf-8")), options.clock)
    rates = ", ".join(f'"{mode}": {rate:.1f}' for mode, rate in fitted.products_per_byte.items())
    print(f"PRODUCTS_PER_BYTE = {{{rates}}}")
    print(f"LAUNCH_BYTES = {fitted.launch_bytes / 1e6:.0f}e6")
    print(f"# right for {fitted.right} of {fitted.clear} layers that differ by more than {CLEAR}")


if __name__ == "__main__":
    main()
