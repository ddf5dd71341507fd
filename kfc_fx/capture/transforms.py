"""Whether a transform is at work that calls the model for its own ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_transformed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a model that is called now with these inputs is called by a transform: of
    ``torch.func``, by forward mode differentiation, by ``torch.jit.trace``, by ``make_fx`` or by
    ``symbolic_trace``.

    Its tensors stand for others then. Dynamo would give the frames of the model up, for good, and
    there is nothing that statistics could be of.
    """
    return (
        torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or get_proxy_mode() is not None
        or any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
    )
