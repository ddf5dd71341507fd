"""Options of KFC by the names of their fields alone, for tests that try several scalings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import kfc_fx
from kfc_fx.optim.checks import checks_of
from kfc_fx.optim.generic import GENERIC
from kfc_fx.optim.scalings.scaling import Scaling
from kfc_fx.optim.scalings.table import SCALINGS

BY_VALUE = {"momentum", "second_moment_decay", "lr_ratio"}.union(
    *(checks_of(kind) for kind in (*SCALINGS.values(), kfc_fx.Statistics))
)


def spelled(
    scaling: str | Scaling = "adam",
    blocks: Mapping[str, Any] | None = None,
    generic: Any = None,
    **flat: Any,
) -> dict[str, Any]:
    """Keywords for KFC: the values that hold the options of ``flat``.

    Every scaling takes those that it has. A momentum is that of generic parameters too. The early
    phase has no budget: one network that is written in two ways has other stacks, which would be
    due at other steps.
    """
    flat = {"budget": None, **flat}
    general = scaling_with(scaling, flat)
    statistics = {n: flat[n] for n in checks_of(kfc_fx.Statistics) if n in flat}
    others = {name: value for name, value in flat.items() if name not in BY_VALUE}
    found = {"scaling": general, "statistics": kfc_fx.Statistics(**statistics), **others}
    if blocks is not None:
        found["blocks"] = {pattern: _of_block(chosen, flat) for pattern, chosen in blocks.items()}
    by_name = generic is None or isinstance(generic, str)
    if by_name and {"momentum", "lr_ratio"} & flat.keys():
        generic = _generic(generic or general.generic, flat)
    found["generic"] = generic
    return found


def kfc(compiled: nn.Module, params: Any = None, **flat: Any) -> kfc_fx.KFC:
    """A KFC for a compiled model, or for some of its parameters, by options as in `spelled`."""
    if params is None:
        return kfc_fx.KFC(compiled, **spelled(**flat))
    return kfc_fx.KFC(params, model=compiled, **spelled(**flat))


def scaling_with(scaling: str | Scaling, flat: Mapping[str, Any]) -> Scaling:
    """A scaling with those of the options that it has."""
    if isinstance(scaling, Scaling):
        return scaling
    kind = SCALINGS[scaling]
    own = {name: flat[name] for name in checks_of(kind) if name in flat}
    if scaling == "adam" and {"momentum", "second_moment_decay"} & flat.keys():
        own["betas"] = (flat.get("momentum", 0.9), flat.get("second_moment_decay", 0.95))
    if own.get("nesterov", False) is None:
        del own["nesterov"]
    return kind(**own)


def _of_block(chosen: Any, flat: Mapping[str, Any]) -> Any:
    if not isinstance(chosen, Mapping):
        return scaling_with(chosen, flat)
    found = dict(chosen)
    if "scaling" in found:
        found["scaling"] = scaling_with(found["scaling"], flat)
    return found


def _generic(rule: str, flat: Mapping[str, Any]) -> Any:
    own = {"lr_ratio": flat["lr_ratio"]} if "lr_ratio" in flat else {}
    if "momentum" in flat:
        own |= {"betas": (flat["momentum"], 0.999)} if rule == "adamw" else {}
        own |= {"momentum": flat["momentum"]} if rule == "sgd" else {}
    return GENERIC[rule](**own)
