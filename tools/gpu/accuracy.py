"""How accurate the Gram kernels must be on a GPU, and the checks that they are.

Errors are taken from float64 and held against torch's own in the same precision plus a bound for
summation, so that the checks need no tolerance that was found on some other machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from kfc_fx.kernels.geometry import ConvGeometry, conv_geometry
from kfc_fx.kernels.products import product_plan
from kfc_fx.kernels.triton_configs import MOST_ROWS
from kfc_fx.kernels.triton_im2col_gram import im2col_gram_reference
from kfc_fx.kernels.triton_pack import round_to_tf32_reference
from kfc_fx.kernels.triton_row_gram import row_gram_reference
from kfc_fx.kernels.triton_separable_gram import separable_gram_reference
from kfc_fx.ops import cuda_dispatch
from kfc_fx.ops.convolution import encoded
from kfc_fx.tools.gpu.clock import refuse_synchronising

EPSILON = torch.finfo(torch.float32).eps
HALF_SHAPES = 2  # float16 takes the kernels of bfloat16; more shapes would only compile longer
TINY_NUMBERS = 1000
TINY_PROGRAMS = 30
LEAST_MEMORY = 30 << 30
CHUNK_ROWS = 2**16


@dataclass(frozen=True)
class PatchShape:
    """Input ``[N, C, *spatial]`` and geometry of one patch Gram."""

    shape: tuple[int, ...]
    geometry: ConvGeometry

    @property
    def programs(self) -> int:
        """A count of the programs that the kernels run, by which the interpreter's time goes."""
        plan = product_plan(self.geometry, self.shape[2:])
        channels = self.shape[1] // self.geometry.groups
        return len(plan.slots) * self.geometry.groups * (1 + channels // 16)

    @property
    def rows(self) -> int:
        """Number of patches."""
        return self.shape[0] * prod(self.geometry.output_size(self.shape[2:]))


@dataclass(frozen=True)
class Mode:
    """A dtype, and the precision of float32 products."""

    dtype: torch.dtype
    precision: str

    @property
    def truncates(self) -> bool:
        """Whether tensor cores multiply."""
        return self.dtype != torch.float32 or self.precision != "highest"

    @property
    def rounding(self) -> float:
        """Relative error of the product of two numbers that are rounded for the tensor cores."""
        if self == TF32:
            return 2.0**-10
        return torch.finfo(self.dtype).eps if self.truncates else 0.0

    def __str__(self) -> str:
        return f"{self.dtype}".removeprefix("torch.") + f" {self.precision}"


TF32 = Mode(torch.float32, "high")


@dataclass(frozen=True)
class Comparison:
    """The largest error of one result over what is allowed, and what else is wrong with it."""

    shape: tuple[int, ...]
    mode: Mode
    ratio: float
    problem: str = ""

    @property
    def failed(self) -> bool:
        """Whether it is to be reported as wrong; an error that is not a number is."""
        return bool(self.problem) or not self.ratio <= 1


ROWS = ((4096, 512), (1000, 33), (64 * 196, 768), (17, 1), (1, 130), (45, 20))
PATCHES = (
    PatchShape((32, 64, 32, 32), conv_geometry((3, 3), padding=1)),
    PatchShape((5, 4, 6, 7), conv_geometry((3, 3), padding=1)),
    PatchShape((32, 256, 14, 14), conv_geometry((3, 3), padding=1)),
    PatchShape((16, 512, 7, 7), conv_geometry((3, 3), padding=1)),
    PatchShape((13, 70, 9, 11), conv_geometry((3, 3), padding=1)),
    PatchShape((5, 3, 33, 31), conv_geometry((7, 7), stride=2, padding=3)),
    PatchShape((9, 24, 15, 15), conv_geometry((5, 5), padding=2, dilation=2)),
    PatchShape((33, 12, 10, 10), conv_geometry((3, 3), stride=2, groups=3)),
    PatchShape((8, 32, 8, 8), conv_geometry((3, 3), padding=1, groups=32)),
    PatchShape((3, 6, 4, 5, 6), conv_geometry((2, 3, 2), padding=1)),
    PatchShape((7, 5, 50), conv_geometry((4,), padding="same")),
)


def check_row_gram(device: torch.device, tiny: bool) -> str:
    """Row Gram, every dtype and precision, against float64; the same bits twice."""
    shapes = [shape for shape in ROWS if not tiny or prod(shape) <= TINY_NUMBERS]
    found = [
        _compare(
            partial(cuda_dispatch.row_gram, x, bias), partial(row_gram_reference, bias=bias),
            x, shape[0], mode,
        )
        for number, shape in enumerate(shapes)
        for mode, x in _inputs(shape, device, halves=number < HALF_SHAPES)
        for bias in (False, True)
    ]  # fmt: skip
    return summary(found)


def check_patch_gram(device: torch.device, tiny: bool) -> str:
    """Patch Gram by every method, dtype, precision and memory format."""
    shapes = [shape for shape in PATCHES if not tiny or shape.programs <= TINY_PROGRAMS]
    found = [
        _compare(
            partial(_patch_gram, laid, shape.geometry, method),
            partial(im2col_gram_reference, geometry=shape.geometry, bias=True),
            laid, shape.rows, mode,
        )
        for number, shape in enumerate(shapes)
        for mode, x in _inputs(shape.shape, device, halves=number < HALF_SHAPES)
        for laid in _memory_formats(x)[: 1 if tiny else 2]
        for method in ("structured", "im2col")
    ]  # fmt: skip
    return summary(found)


def check_separable_gram(device: torch.device, tiny: bool) -> str:
    """Both traces of the patch Gram; from the second call on the host never waits."""
    shapes = [shape for shape in PATCHES if not tiny or shape.programs <= TINY_PROGRAMS]
    found = []
    for number, shape in enumerate(shapes):
        for mode, x in _inputs(shape.shape, device, halves=number < HALF_SHAPES):
            for laid in _memory_formats(x)[: 1 if tiny else 2]:
                found += _compare_traces(laid, shape, mode)
                if device.type == "cuda":
                    refuse_synchronising(partial(_separable_gram, laid, shape.geometry, 0))
    return summary(found)


def check_large_addresses(device: torch.device, tiny: bool) -> str:
    """Row Gram of more than 2³¹ elements, rows or columns adjacent.

    The last 64th of the rows, which lies beyond 2³¹, is eight times as large and makes half of
    the result: what is read from elsewhere is far outside the bound.
    """
    if not tiny and torch.cuda.get_device_properties(device).total_memory < LEAST_MEMORY:
        return "left out: needs a GPU of 32 GiB"
    rows, columns = (128, 20) if tiny else (2**21 + 8, 1040)
    torch.manual_seed(0)
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    x[rows - rows // 64 :] *= 8
    exact = _gram_by_chunks(x)
    allowed = summation_error(rows, truncates=True) * exact.diagonal().max().item()
    mode = Mode(torch.bfloat16, "high")
    found = []
    for laid, shape in ((x, (rows, columns)), (x.mT.contiguous().mT, (columns, rows))):
        error = (cuda_dispatch.row_gram(laid, False) - exact).abs().max().item()
        found.append(Comparison(shape, mode, error / allowed))
    return summary(found)


def summation_error(rows: int, *, truncates: bool) -> float:
    """Bound of the error of a sum of ``rows`` products in float32, relative to their magnitudes.

    Rounding to nearest: ``√n ε``, which is ``λ √n u`` of Higham and Mary 2019 (theorem 3.1) with
    λ = 2. Tensor cores truncate, which does not average out: 1/16 ε a row was measured on an
    H100, for as many rows as one part adds up; twice that is allowed.
    """
    truncation = min(rows, MOST_ROWS) / 8 if truncates else 0.0
    return (rows**0.5 + truncation) * EPSILON


def summary(found: Iterable[Comparison]) -> str:
    """The worst ratio of every shape, the largest first.

    Raises:
        AssertionError: with every comparison that failed.
    """
    found = list(found)
    failed = [entry for entry in found if entry.failed]
    if failed:
        lines = [
            f"{entry.shape} {entry.mode}: {entry.problem or f'error {entry.ratio:.3g} of allowed'}"
            for entry in failed
        ]
        raise AssertionError(f"{len(failed)} of {len(found)}: " + "; ".join(dict.fromkeys(lines)))
    worst: dict[tuple[int, ...], float] = {}
    for entry in found:
        worst[entry.shape] = max(worst.get(entry.shape, 0.0), entry.ratio)
    ranked = sorted(worst.items(), key=lambda item: -item[1])
    return "error / allowed " + ", ".join(f"{ratio:.2f} {shape}" for shape, ratio in ranked)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Run with one setting of ``torch.set_float32_matmul_precision``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal values with a mean away from zero, the same on every device."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) + 0.25).to(dtype).to(device)


def _inputs(
    shape: tuple[int, ...], device: torch.device, *, halves: bool
) -> Iterator[tuple[Mode, Tensor]]:
    modes = [Mode(torch.float32, "highest"), Mode(torch.bfloat16, "high")]
    if device.type == "cuda":
        modes.append(TF32)
    if halves:
        modes.append(Mode(torch.float16, "high"))
    for mode in modes:
        x = values(shape, mode.dtype, device)
        # Torch rounds to TF32 otherwise than the kernels, and not at all where it multiplies
        # without tensor cores: with numbers that TF32 holds, only the sums differ.
        yield mode, round_to_tf32_reference(x) if mode == TF32 else x


def _memory_formats(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.movedim(1, -1).contiguous().movedim(-1, 1)


def _patch_gram(x: Tensor, geometry: ConvGeometry, method: str) -> Tensor:
    return cuda_dispatch.patch_gram(x, encoded(geometry), True, method)


def _separable_gram(x: Tensor, geometry: ConvGeometry, factor: int) -> Tensor:
    return cuda_dispatch.separable_gram(x, encoded(geometry))[factor]


def _compare_traces(x: Tensor, shape: PatchShape, mode: Mode) -> list[Comparison]:
    channels = x.shape[1] // shape.geometry.groups
    # Pixels are weighted, and rounded after that, for the trace over offsets only.
    terms = (x.numel() // x.shape[1], shape.rows * channels)
    rounding = (mode.rounding, 0.0)
    return [
        _compare(
            partial(_separable_gram, x, shape.geometry, factor),
            partial(_trace, geometry=shape.geometry, factor=factor),
            x, terms[factor], mode, rounding[factor],
        )
        for factor in (0, 1)
    ]  # fmt: skip


def _trace(x: Tensor, geometry: ConvGeometry, factor: int) -> Tensor:
    return separable_gram_reference(x, geometry)[factor]


def _gram_by_chunks(x: Tensor) -> Tensor:
    total = x.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float64)
    for chunk in x.split(CHUNK_ROWS):
        wide = chunk.double()
        total.addmm_(wide.mT, wide)
    return total


def _compare(
    compute: Callable[[], Tensor],
    reference: Callable[[Tensor], Tensor],
    x: Tensor,
    rows: int,
    mode: Mode,
    rounding: float = 0.0,
) -> Comparison:
    """At most twice torch's own error, the bound of a sum and ``rounding`` of every product may
    be lost."""
    exact = reference(x.double())
    with matmul_precision(mode.precision):
        result, again = compute(), compute()
        in_torch = reference(x.float())
    # By Cauchy and Schwarz no sum of magnitudes exceeds the largest sum of squares.
    magnitude = exact.diagonal(dim1=-2, dim2=-1).max().item()
    own = (in_torch.double() - exact).abs().max().item()
    lost = summation_error(rows, truncates=mode.truncates) + rounding
    allowed = 2 * own + lost * magnitude
    error = (result.double() - exact).abs().max().item()
    problem = "" if torch.equal(result, again) else "two runs gave different bits"
    if not torch.equal(result, result.mT):
        problem = "the result is not symmetric"
    return Comparison(tuple(x.shape), mode, error / allowed, problem)
