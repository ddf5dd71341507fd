"""What must hold on a GPU: each check raises, or returns a line that says what it saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kfc_fx import ops
from kfc_fx.kernels.geometry import conv_geometry
from kfc_fx.ops.convolution import encoded
from kfc_fx.ops.patch_gram import METHODS
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


def check_registration(device: torch.device, tiny: bool) -> str:
    """``torch.library.opcheck`` of every op on this device, and one graph with a dynamic batch."""
    x = values((6, 4, 7, 7), torch.float32, device)
    geometry = conv_geometry((3, 3), padding=1)
    numbers = encoded(geometry)
    library = torch.ops.kfc_fx
    torch.library.opcheck(library.row_gram.default, (x, True))
    for method in METHODS:
        torch.library.opcheck(library.patch_gram.default, (x, numbers, True, method))
    torch.library.opcheck(library.separable_gram.default, (x, numbers))

    def statistic(maps: Tensor) -> Tensor:
        return ops.patch_gram(maps.relu(), (3, 3), padding=1) * 2

    compiled = torch.compile(statistic, fullgraph=True, dynamic=True)
    for batch in (6, 3):
        torch.testing.assert_close(compiled(x[:batch]), statistic(x[:batch]))
    return "3 ops"


CHECKS = (
    Check("row Gram", check_row_gram),
    Check("patch Gram", check_patch_gram),
    Check("separable Gram", check_separable_gram),
    Check("more than 2^31 elements", check_large_addresses),
    Check("op registration", check_registration),
    Check("every scaling as on CPU", check_scalings),
    Check("whitening", check_whitening),
    Check("update as a CUDA graph", check_cuda_graph),
    Check("compiled update", check_compiled_update),
    Check("inductor", check_inductor),
    Check("autocast", check_autocast),
)
