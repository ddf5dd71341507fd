"""Whether a transform is at work that calls the model for its own ends."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_transformed() -> bool:
    """Whether a model that is called now is called by a transform: of ``torch.func``, by forward
    mode differentiation, by ``torch.jit.trace`` or by ``make_fx``.

    Its tensors stand for others then. Dynamo would give the frames of the model up, for good, and
    there is nothing that statistics could be of.
    """
    return (
        torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or get_proxy_mode() is not None
    )
