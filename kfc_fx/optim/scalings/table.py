"""The scalings by name."""

from __future__ import annotations

from kfc_fx.errors import OptionError
from kfc_fx.optim.scalings.adam import Adam
from kfc_fx.optim.scalings.eigen import Eigen
from kfc_fx.optim.scalings.inverse import Inverse
from kfc_fx.optim.scalings.scaling import Scaling
from kfc_fx.optim.scalings.spectral import Spectral

SCALINGS: dict[str, type[Scaling]] = {s.name: s for s in (Adam, Spectral, Eigen, Inverse)}


def scaling_of(where: str, given: object) -> Scaling:
    """A scaling from its name, which stands for its defaults, or from the value itself.

    Args:
        where: what an error calls the option.

    Raises:
        OptionError: it is neither.
    """
    if isinstance(given, Scaling):
        return given
    if isinstance(given, str) and given in SCALINGS:
        return SCALINGS[given]()
    names = ", ".join(map(repr, SCALINGS))
    values = ", ".join(f"kfc_fx.{kind.__name__}(...)" for kind in SCALINGS.values())
    raise OptionError(f"{where} must be one of {names}, or one of {values}; got {given!r}")
