"""What a parameter group may set, checked."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from kfc_fx.errors import OptionError, warn
from kfc_fx.optim.checks import BETAS, NOT_NEGATIVE
from kfc_fx.optim.other_options import OTHERS
from kfc_fx.optim.scalings.scaling import Scaling

LARGE_RATE = 0.5
GROUP_OPTIONS = ("lr", "weight_decay", "betas")

Group = Mapping[str, Any]


def check_group(group: Group, betas: tuple[float, float]) -> None:
    """Check what a parameter group sets; entries that torch or schedulers keep are left alone.

    Args:
        betas: those of a group that sets none.

    Raises:
        OptionError: a rate, a decay or a beta is out of range or of the wrong type, or the group
            sets an option that is not one of a group.
    """
    for name in set(group) - set(GROUP_OPTIONS):
        if name in OTHERS or difflib.get_close_matches(name, GROUP_OPTIONS, cutoff=0.8):
            raise OptionError(
                f"a parameter group may set {', '.join(GROUP_OPTIONS)}, got {name!r}; the other "
                "options are for all groups, and blocks= has some by layer"
            )
    for name in ("lr", "weight_decay"):
        value = group[name]
        is_one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
        NOT_NEGATIVE(name, float(value) if is_one else value)
    BETAS("betas", group["betas"])
    check_second_beta(group, betas)


def check_second_beta(group: Group, betas: tuple[float, float]) -> None:
    """Raise :class:`OptionError` for another second beta than the scaling's: it belongs to the
    moments of all blocks, and no scheduler of torch changes it."""
    if group["betas"][1] != betas[1]:
        raise OptionError(
            f"the second of betas is one for all groups, {betas[1]}, and a group has "
            f"{group['betas'][1]}: give it to the scaling, as in kfc_fx.Adam(betas=...)"
        )


def check_loaded_groups(groups: Sequence[Group], betas: tuple[float, float]) -> None:
    """Raise :class:`OptionError` for groups that were saved with another second beta."""
    for group in groups:
        second = tuple(group.get("betas", betas))[1]
        if second != betas[1]:
            raise OptionError(
                f"this state_dict is of another scaling, or of other betas: the second one is "
                f"{second} in it, and {betas[1]} here. Make KFC with the options that it was saved "
                "with"
            )


def warn_of_large_rates(groups: Sequence[Group], scaling: Scaling) -> None:
    """Warn of a rate that is meant for another optimizer: where steps are of the rate's size,
    whatever the gradient's is, one of this size leaves nothing of a weight."""
    largest = max(float(group["lr"]) for group in groups)
    if not scaling.steps_by_vector and largest >= LARGE_RATE:
        warn(
            f"lr={largest:g}: steps of scaling={scaling.name!r} are of the rate's size, whatever "
            f"that of the gradient is. Its default is {scaling.lr:g}"
        )


def groups_of(opt: weakref.ref[Optimizer]) -> Callable[[], Sequence[Group]]:
    """The groups of an optimizer as they are, for as long as it lives."""

    def groups() -> Sequence[Group]:
        found = opt()
        return () if found is None else found.param_groups

    return groups


def momentum_of(group: Group, betas: tuple[float, float], own: float) -> float:
    """The momentum that a group sets; where it has the default one, that of a scaling or rule.

    Args:
        betas: those of a group that sets none.
        own: of the scaling or rule.
    """
    first: float = group["betas"][0]
    return own if first == betas[0] else first
