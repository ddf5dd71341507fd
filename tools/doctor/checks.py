"""Every statistics op on a small case, against unfold and multiply in float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kfc_fx.inspect.methods import patch_method
from kfc_fx.kernels.cpu_cost import estimate
from kfc_fx.kernels.geometry import conv_geometry
from kfc_fx.kernels.products import product_plan
from kfc_fx.ops.cuda_dispatch import uses_triton
from kfc_fx.ops.patch_gram import METHODS, patch_gram
from kfc_fx.ops.row_gram import row_gram
from kfc_fx.ops.separable_gram import separable_gram

ALLOWED = {"cpu": 1e-5, "cuda": 5e-3}
"""Relative error in the Frobenius norm; products on CUDA may round their inputs to TF32."""

SHAPE = (4, 16, 14, 14)
KERNEL = (3, 3)
CASES = (
    ("stride 1, same padding", {"padding": 1}),
    ("stride 2, no padding", {"stride": 2}),
    ("4 groups, dilation 2", {"groups": 4, "dilation": 2, "padding": 2}),
)


@dataclass(frozen=True)
class CheckResult:
    """One op on one case: its error, and what is allowed."""

    op: str
    device: str
    case: str
    path: str
    error: float
    allowed: float
    milliseconds: float

    @property
    def passed(self) -> bool:
        """Whether the op agrees with its reference; not for an error that is not finite."""
        return self.error <= self.allowed


def usable_devices() -> list[str]:
    """The CPU, and every GPU that torch sees."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def kernel_path(device: str) -> str:
    """What runs the statistics ops on a device."""
    if device == "cpu":
        return "ATen, by a cost model: structured, lines, im2col or row"
    if uses_triton(torch.empty(0, device=device)):
        return "Triton kernels; float64 by ATen"
    return "ATen: Triton is missing, or does not compile for this GPU"


def check_ops(device: str) -> Iterator[CheckResult]:
    """Results of every op on every case."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    rows = x.movedim(1, -1)
    reference = _with_ones(rows.double().flatten(0, -2))
    yield _result(
        "row_gram",
        device,
        "rows with a bias",
        "row",
        partial(row_gram, rows, bias=True),
        reference.mT @ reference,
    )
    for case, options in CASES:
        yield from _convolution_checks(device, x, case, options)


def _convolution_checks(
    device: str, x: Tensor, case: str, options: dict[str, int]
) -> Iterator[CheckResult]:
    groups = options.get("groups", 1)
    patches = _patches(x, options)
    dense, biased = patches.mT @ patches, _gram(_with_ones(patches))
    paths = _paths(device, x, options)
    for method in METHODS:
        path = paths["patch_gram"] if method == "auto" else method
        gram = partial(patch_gram, x, KERNEL, bias=True, method=method, **options)
        yield _result(f"patch_gram {method}", device, case, path, gram, biased)

    channels = x.shape[1] // groups
    offsets = KERNEL[0] * KERNEL[1]
    split = dense.unflatten(2, (channels, offsets)).unflatten(1, (channels, offsets))
    traces = (
        split.diagonal(dim1=2, dim2=4).sum(-1).flatten(),
        split.diagonal(dim1=1, dim2=3).sum(-1).flatten(),
    )

    def separable() -> Tensor:
        return torch.cat([part.flatten() for part in separable_gram(x, KERNEL, **options)])

    path = paths["separable_gram"]
    yield _result("separable_gram", device, case, path, separable, torch.cat(traces))


def _paths(device: str, x: Tensor, options: dict[str, int]) -> dict[str, str]:
    """Op to what computes it: a method of the CPU's, or the kernels of a GPU."""
    ops = ("patch_gram", "separable_gram")
    if device != "cpu":
        return dict.fromkeys(ops, "triton" if uses_triton(x) else "aten")
    geometry = conv_geometry(KERNEL, **options)
    maps = (len(x) * x.shape[1] // geometry.groups, geometry.groups, *x.shape[2:])
    cost = estimate(geometry, product_plan(geometry, tuple(x.shape[2:])), tuple(x.shape))
    separable = f"row + {patch_method(maps, geometry)[0]}"
    return dict(zip(ops, (cost.best, separable), strict=True))


def _result(
    op: str, device: str, case: str, path: str, run: Callable[[], Tensor], reference: Tensor
) -> CheckResult:
    run()  # compiles kernels, and fills caches
    started = time.perf_counter()
    found = run().double()
    if found.is_cuda:
        torch.cuda.synchronize()
    milliseconds = 1000 * (time.perf_counter() - started)
    error = torch.linalg.vector_norm(found - reference) / torch.linalg.vector_norm(reference)
    allowed = ALLOWED[device.partition(":")[0]]
    return CheckResult(op, device, case, path, error.item(), allowed, milliseconds)


def _patches(x: Tensor, options: dict[str, int]) -> Tensor:
    """``[groups, N·T, C/groups·K]`` in float64, by ``F.unfold``."""
    numbers = {name: value for name, value in options.items() if name != "groups"}
    groups = options.get("groups", 1)
    columns = F.unfold(x.double(), KERNEL, **numbers)
    return columns.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


def _gram(rows: Tensor) -> Tensor:
    return rows.mT @ rows
