"""Registration of the statistics ops.

An op is defined by its schema and implemented once in ATen for every device; a faster
implementation for one dispatch key (CUDA) is registered beside it and takes precedence. Plain
registration costs a call a few microseconds, where ``custom_op`` takes tens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("kfc_fx", "FRAGMENT")


def define(schema: str, on_any_device: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``kfc_fx::<schema>`` with the implementation that any device can run."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, on_any_device, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kfc_fx::{name}", fake, lib=LIBRARY)
