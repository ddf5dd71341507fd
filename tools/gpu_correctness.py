"""What must hold on a GPU: each check raises, or returns a line that says what it saw.

Errors are measured against float64 and compared with torch's own in the same dtype, so the checks
need no tolerance that was found on some other machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kfc_fx
from kfc_fx import ops
from kfc_fx.kernels.products import product_plan
from kfc_fx.kernels.triton_im2col_gram import im2col_gram_reference
from kfc_fx.kernels.triton_multi_tensor import (
    moving_average_,
    moving_average_reference,
    update_,
    update_reference,
)
from kfc_fx.kernels.triton_row_gram import row_gram_reference
from kfc_fx.ops import cuda_dispatch
from kfc_fx.ops.convolution import encoded
from kfc_fx.plan.geometry import ConvGeometry, conv_geometry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("highest", "high")
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Check:
    """A named check; ``run`` takes the device and whether to keep to tiny sizes."""

    name: str
    run: Callable[[torch.device, bool], str]


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


ROWS = ((4096, 512), (1000, 33), (64 * 196, 768), (17, 1), (1, 130), (45, 20))
PATCHES = (
    PatchShape((32, 64, 32, 32), conv_geometry((3, 3), padding=1)),
    PatchShape((32, 256, 14, 14), conv_geometry((3, 3), padding=1)),
    PatchShape((16, 512, 7, 7), conv_geometry((3, 3), padding=1)),
    PatchShape((13, 70, 9, 11), conv_geometry((3, 3), padding=1)),
    PatchShape((5, 3, 33, 31), conv_geometry((7, 7), stride=2, padding=3)),
    PatchShape((9, 24, 15, 15), conv_geometry((5, 5), padding=2, dilation=2)),
    PatchShape((33, 12, 10, 10), conv_geometry((3, 3), stride=2, groups=3)),
    PatchShape((8, 32, 8, 8), conv_geometry((3, 3), padding=1, groups=32)),
    PatchShape((3, 6, 4, 5, 6), conv_geometry((2, 3, 2), padding=1)),
    PatchShape((5, 4, 6, 7), conv_geometry((3, 3), padding=1)),
    PatchShape((7, 5, 50), conv_geometry((4,), padding="same")),
)
TINY_NUMBERS = 1000
TINY_PROGRAMS = 30


def check_row_gram(device: torch.device, tiny: bool) -> str:
    """Row Gram, every dtype and precision, against float64; the same bits twice."""
    worst = 0.0
    for rows, columns in ROWS:
        if tiny and rows * columns > TINY_NUMBERS:
            continue
        for dtype, precision in _modes(device):
            for bias in (False, True):
                x = _values((rows, columns), dtype, device)
                compute = partial(cuda_dispatch.row_gram, x, bias)
                reference = partial(row_gram_reference, bias=bias)
                worst = max(worst, _compare(compute, reference, x, precision))
    return f"largest error / torch's: {worst:.2f}"


def check_patch_gram(device: torch.device, tiny: bool) -> str:
    """Patch Gram by every method, dtype, precision and memory format."""
    worst = 0.0
    for shape in PATCHES:
        if tiny and shape.programs > TINY_PROGRAMS:
            continue
        reference = partial(im2col_gram_reference, geometry=shape.geometry, bias=True)
        for dtype, precision in _modes(device):
            x = _values(shape.shape, dtype, device)
            for laid in (x, x.movedim(1, -1).contiguous().movedim(-1, 1))[: 1 if tiny else 2]:
                for method in ("structured", "im2col"):
                    compute = partial(_patch_gram, laid, shape.geometry, method)
                    worst = max(worst, _compare(compute, reference, laid, precision))
    return f"largest error / torch's: {worst:.2f}"


def check_large_addresses(device: torch.device, tiny: bool) -> str:
    """A tensor of more than 2³¹ elements: its Gram must equal the sum over its halves."""
    if tiny or torch.cuda.get_device_properties(device).total_memory < 30 << 30:
        return "left out: needs a GPU of 32 GiB"
    x = torch.randn(2**21 + 3, 1040, device=device, dtype=torch.bfloat16)
    whole = cuda_dispatch.row_gram(x, False)
    parts = cuda_dispatch.row_gram(x[: 2**20], False) + cuda_dispatch.row_gram(x[2**20 :], False)
    difference = (whole - parts).abs().max() / whole.abs().max()
    assert difference < 1e-4, f"relative difference {difference:.2e}"
    return f"relative difference {difference:.1e}"


def check_multi_tensor(device: torch.device, tiny: bool) -> str:
    """The moving average and the pointwise end of an update, over many sizes."""
    sizes = [1, 7, 2048, 2049, 33_333] + ([] if tiny else [5_000_000])
    old, new = ([_values((n,), torch.float32, device) for n in sizes] for _ in range(2))
    expected = [
        moving_average_reference(a.double(), b.double(), 0.9) for a, b in zip(old, new, strict=True)
    ]
    moving_average_(old, new, 0.9)
    for result, reference in zip(old, expected, strict=True):
        torch.testing.assert_close(result.double(), reference, rtol=1e-6, atol=1e-6)
    numbers: dict[str, Any] = {"shrink": 0.01, "momentum": 0.9, "average_decay": 0.5}
    lists = [[_values((n,), torch.float32, device) for n in sizes] for _ in range(4)]
    updated = [
        update_reference(*(t.double() for t in row), scale=0.5, **numbers)
        for row in zip(*lists, strict=True)
    ]
    update_(*lists, scale=torch.tensor(0.5, device=device), **numbers)
    for row, references in zip(
        zip(lists[0], lists[2], lists[3], strict=True), updated, strict=True
    ):
        for result, reference in zip(row, references, strict=True):
            torch.testing.assert_close(result.double(), reference, rtol=1e-6, atol=1e-6)
    return f"{len(sizes)} tensors"


def check_registration(device: torch.device, tiny: bool) -> str:
    """``torch.library.opcheck`` of every op on this device, and one graph with a dynamic batch."""
    x = _values((6, 4, 7, 7), torch.float32, device)
    geometry = conv_geometry((3, 3), padding=1)
    numbers = encoded(geometry)
    library = torch.ops.kfc_fx
    slots = library.patch_products(x, numbers, True)
    torch.library.opcheck(library.row_gram.default, (x, True))
    torch.library.opcheck(library.patch_products.default, (x, numbers, True))
    torch.library.opcheck(library.patch_gram.default, (x, numbers, True, "auto"))
    torch.library.opcheck(library.assemble.default, (slots, list(x.shape[1:]), numbers, True))

    def statistic(values: Tensor) -> Tensor:
        return ops.patch_gram(values.relu(), (3, 3), padding=1) * 2

    compiled = torch.compile(statistic, fullgraph=True, dynamic=True)
    for batch in (6, 3):
        torch.testing.assert_close(compiled(x[:batch]), statistic(x[:batch]))
    return "4 ops"


def check_training(device: torch.device, tiny: bool) -> str:
    """A few steps of training equal those on the CPU, from the same start."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 9, 10),
    )  # fmt: skip
    x, y = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    results = []
    with _precision("highest"):
        for place in (torch.device("cpu"), device):
            model = kfc_fx.compile(copy.deepcopy(network).to(place))
            # Sampled targets would differ: each device has a random generator of its own.
            optimizer = kfc_fx.KFC(
                model, lr=0.1, scaling="inverse", damping=0.1, fisher="empirical"
            )
            for _ in range(3 if tiny else 8):
                nn.functional.cross_entropy(model(x.to(place)), y.to(place)).backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    difference = (results[0] - results[1]).norm() / (results[0] - start).norm()
    assert difference < 1e-2, f"relative difference of the steps {difference:.2e}"
    return f"relative difference of the steps {difference:.1e}"


CHECKS = (
    Check("row Gram", check_row_gram),
    Check("patch Gram", check_patch_gram),
    Check("more than 2^31 elements", check_large_addresses),
    Check("multi-tensor", check_multi_tensor),
    Check("op registration", check_registration),
    Check("training as on CPU", check_training),
)


def _patch_gram(x: Tensor, geometry: ConvGeometry, method: str) -> Tensor:
    return cuda_dispatch.patch_gram(x, encoded(geometry), True, method)


def _modes(device: torch.device) -> list[tuple[torch.dtype, str]]:
    precisions = PRECISIONS if device.type == "cuda" else PRECISIONS[:1]
    return [(torch.float32, p) for p in precisions] + [(dtype, "high") for dtype in DTYPES[1:]]


class _precision:  # noqa: N801 - used as a context manager
    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.name)

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def _values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) + 0.25).to(dtype).to(device)


def _compare(
    compute: Callable[[], Tensor],
    reference: Callable[[Tensor], Tensor],
    x: Tensor,
    precision: str,
) -> float:
    """Error over torch's own; raises where it is above two, or bits differ between two runs."""
    exact, magnitude = reference(x.double()), reference(x.double().abs())
    with _precision(precision):
        result, again = compute(), compute()
        in_torch = reference(x.float())
    assert torch.equal(result, again), "two runs gave different bits"
    assert torch.equal(result, result.mT), "the result is not symmetric"
    error = (result.double() - exact).abs().max().item()
    own = (in_torch.double() - exact).abs().max().item()
    floor = 2 * EPSILON * magnitude.max().item()
    where = f"{tuple(x.shape)} {x.dtype} {precision}"
    assert error <= 2 * own + floor, f"{where}: error {error:.3g}, torch's own {own:.3g}"
    return error / (own + floor)
