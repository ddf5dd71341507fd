"""Copies and pickles of an optimizer, together with its models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from torch import nn

from kfc_fx.optim.options import KFCOptions, by_name

Optimizer = TypeVar("Optimizer")


@dataclass
class Given:
    """What an optimizer like another one is made of; models and groups are copied with it."""

    models: list[nn.Module]
    groups: list[dict[str, Any]]
    options: dict[str, Any]
    """Arguments of the optimizer, by name."""

    @classmethod
    def of(
        cls,
        models: list[nn.Module],
        groups: Iterable[Mapping[str, Any]],
        options: KFCOptions,
        defaults: Mapping[str, Any],
        process_group: Any,
    ) -> Self:
        """From an optimizer's models, groups, options, defaults of groups and process group."""
        own = by_name(options) | {"process_group": process_group}
        own |= {name: defaults[name] for name in ("lr", "weight_decay")}
        return cls(models, [dict(group) for group in groups], own)


def restored(kind: type[Optimizer], given: Given, state: dict[str, Any]) -> Optimizer:
    """An optimizer anew, of models that were copied or unpickled with it. Gradients are neither
    copied nor pickled, and so statistics of them are not.

    Args:
        kind: its class.
        state: its ``state_dict``.
    """
    opt: Any = kind(given.groups, model=given.models[0], **given.options)  # type: ignore[call-arg]
    opt.load_state_dict(state)
    return opt  # type: ignore[no-any-return]
