"""What must hold on a GPU: each check raises, or returns a line that says what it saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfc_fx import ops
from kfc_fx.kernels.geometry import conv_geometry
from kfc_fx.kernels.triton_multi_tensor import (
    moving_average_,
    moving_average_reference,
    update_,
    update_reference,
)
from kfc_fx.ops.convolution import encoded
from kfc_fx.tools.gpu.accuracy import (
    check_large_addresses,
    check_patch_gram,
    check_row_gram,
    check_separable_gram,
    values,
)
from kfc_fx.tools.gpu.graph import check_cuda_graph
from kfc_fx.tools.gpu.training import (
    check_autocast,
    check_compiled_update,
    check_inductor,
    check_scalings,
    check_whitening,
)


@dataclass(frozen=True)
class Check:
    """A named check; ``run`` takes the device and whether to keep to tiny sizes."""

    name: str
    run: Callable[[torch.device, bool], str]


def check_multi_tensor(device: torch.device, tiny: bool) -> str:
    """The moving average and the pointwise end of an update, over many sizes."""
    sizes = [1, 7, 2048, 2049, 33_333] + ([] if tiny else [5_000_000])
    old, new = ([values((n,), torch.float32, device) for n in sizes] for _ in range(2))
    expected = [
        moving_average_reference(a.double(), b.double(), 0.9) for a, b in zip(old, new, strict=True)
    ]
    moving_average_(old, new, 0.9)
    for result, reference in zip(old, expected, strict=True):
        torch.testing.assert_close(result.double(), reference, rtol=1e-6, atol=1e-6)
    numbers: dict[str, Any] = {"shrink": 0.01, "momentum": 0.9, "average_decay": 0.5}
    lists = [[values((n,), torch.float32, device) for n in sizes] for _ in range(4)]
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
    x = values((6, 4, 7, 7), torch.float32, device)
    geometry = conv_geometry((3, 3), padding=1)
    numbers = encoded(geometry)
    library = torch.ops.kfc_fx
    slots = library.patch_products(x, numbers, True)
    torch.library.opcheck(library.row_gram.default, (x, True))
    torch.library.opcheck(library.patch_products.default, (x, numbers, True))
    torch.library.opcheck(library.patch_gram.default, (x, numbers, True, "auto"))
    torch.library.opcheck(library.separable_gram.default, (x, numbers))
    torch.library.opcheck(library.assemble.default, (slots, list(x.shape[1:]), numbers, True))

    def statistic(maps: Tensor) -> Tensor:
        return ops.patch_gram(maps.relu(), (3, 3), padding=1) * 2

    compiled = torch.compile(statistic, fullgraph=True, dynamic=True)
    for batch in (6, 3):
        torch.testing.assert_close(compiled(x[:batch]), statistic(x[:batch]))
    return "5 ops"


CHECKS = (
    Check("row Gram", check_row_gram),
    Check("patch Gram", check_patch_gram),
    Check("separable Gram", check_separable_gram),
    Check("more than 2^31 elements", check_large_addresses),
    Check("multi-tensor", check_multi_tensor),
    Check("op registration", check_registration),
    Check("every scaling as on CPU", check_scalings),
    Check("whitening", check_whitening),
    Check("update as a CUDA graph", check_cuda_graph),
    Check("compiled update", check_compiled_update),
    Check("inductor", check_inductor),
    Check("autocast", check_autocast),
)
