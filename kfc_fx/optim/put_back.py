"""Parameters of before, where what has begun to write them fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def put_back_if_raised(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Put parameters back as they were if the body raises.

    Yields:
        Copies of before the body, in the order of the parameters.
    """
    own = [parameter.detach() for parameter in parameters]
    before = [parameter.clone() for parameter in own]
    try:
        yield before
    except BaseException:
        torch._foreach_copy_(own, before)
        raise
