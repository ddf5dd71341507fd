"""The state dict of an optimizer, looked at as a whole before any of it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfc_fx.engine.state import SavedState
from kfc_fx.errors import OptionError


def checked_states(
    state_dict: Mapping[str, Any], models: int, betas: tuple[float, float]
) -> list[tuple[SavedState, Mapping[str, Any]]]:
    """The state of each model, and the plain data that it is from.

    Args:
        models: how many the optimizer has.
        betas: what its groups have by default.

    Raises:
        OptionError: it is not the whole state of such an optimizer for as many models.
    """
    if "kfc" not in state_dict:
        raise OptionError("this state_dict is not of a KFC optimizer: it has no entry 'kfc'")
    kfc = state_dict["kfc"]
    try:
        states = [kfc, *kfc["others"]]
        saved = [SavedState.from_dict(state) for state in states]
        for state in states:
            _ = state["counters"], state["likelihood"], state["generators"]["states"]
    except KeyError as error:
        raise OptionError(f"this state_dict is not whole: {error} is missing") from None
    if len(states) != models:
        raise OptionError(
            f"this state_dict is of {len(states)} models, and the optimizer has {models}"
        )
    for group in state_dict["param_groups"]:
        second = tuple(group.get("betas", betas))[1]
        if second != betas[1]:
            raise OptionError(
                f"this state_dict is of another scaling, or of other betas: the second one is "
                f"{second} in it, and {betas[1]} here. Make KFC with the options that it was saved "
                "with"
            )
    return list(zip(saved, states, strict=True))
