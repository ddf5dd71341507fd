"""Hooks on a state dict that run around the whole of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def packed_with_hooks(
    optimizer: torch.optim.Optimizer, pack: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What ``pack`` returns, between the hooks on ``state_dict``: those after it see it whole.

    Args:
        pack: calls torch's ``state_dict``, which runs the same hooks on a part.
    """
    for before in optimizer._optimizer_state_dict_pre_hooks.values():
        before(optimizer)
    kinds = ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
    with _put_aside(optimizer, *kinds):
        packed = pack()
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        packed = after(optimizer, packed) or packed
    return packed


def loaded_with_hooks(
    optimizer: torch.optim.Optimizer,
    state_dict: Mapping[str, Any],
    load: Callable[[Mapping[str, Any]], None],
) -> None:
    """Load a state dict between the hooks on ``load_state_dict``, which see all of the state.

    Args:
        load: calls torch's ``load_state_dict``, which runs the same hooks on a part.
    """
    state_dict = dict(state_dict)  # as torch has it: hooks may change it
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = before(optimizer, state_dict) or state_dict
    kinds = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    with _put_aside(optimizer, *kinds):
        load(state_dict)
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


@contextmanager
def _put_aside(optimizer: torch.optim.Optimizer, *kinds: str) -> Iterator[None]:
    own = {kind: getattr(optimizer, kind) for kind in kinds}
    try:
        for kind in kinds:
            setattr(optimizer, kind, OrderedDict())
        yield
    finally:
        for kind, hooks in own.items():
            setattr(optimizer, kind, hooks)
