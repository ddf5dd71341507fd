"""The state of a run by torch.optim.AdamW, for a run that goes on by KFC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfc_fx.errors import OptionError
from kfc_fx.optim.gradients import as_real

MOMENTS = ("exp_avg", "exp_avg_sq")
"""As torch.optim.AdamW and Adam name them."""


def adamw_entries(
    state_dict: Mapping[str, Any], parameters: Sequence[Tensor]
) -> dict[Tensor, tuple[Tensor, Tensor, int]]:
    """First and second moment, and the count of steps, by parameter.

    Args:
        parameters: those that the state is of, in its order.

    Raises:
        OptionError: the state is not of AdamW, or of other parameters.
    """
    try:
        listed = [index for group in state_dict["param_groups"] for index in group["params"]]
        state = state_dict["state"]
    except (KeyError, TypeError) as error:
        raise OptionError(f"adopt takes the state_dict of a torch.optim.AdamW: {error}") from None
    if len(listed) != len(parameters):
        raise OptionError(
            f"the state_dict is of {len(listed)} parameters, and the optimizer has "
            f"{len(parameters)}: make both for the same ones, in the same order"
        )
    found = {}
    for index, parameter in zip(listed, parameters, strict=True):
        entry = state.get(index)
        if entry is None:
            continue
        if not {"step", *MOMENTS} <= entry.keys():
            raise OptionError(
                f"adopt takes the state_dict of a torch.optim.AdamW, and this one has "
                f"{', '.join(map(str, entry))} for a parameter"
            )
        if entry[MOMENTS[0]].shape != parameter.shape:
            raise OptionError(
                f"the state_dict has moments of shape {tuple(entry[MOMENTS[0]].shape)} for a "
                f"parameter of shape {tuple(parameter.shape)}"
            )
        first, second = (as_real(entry[name].detach()) for name in MOMENTS)
        found[parameter] = (first, second, int(entry["step"]))
    if not found:
        raise OptionError("the state_dict holds no moments: no step was taken by it")
    return found
