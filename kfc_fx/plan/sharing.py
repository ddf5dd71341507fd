"""How a linear layer over shared locations (tokens, pixels) is approximated.

"expand" sums ``a aᵀ`` and ``g gᵀ`` over locations, as a convolution does; "reduce" averages ``a``
and sums ``g`` over them first (Eschenhagen et al. 2023, K-FAC-expand and K-FAC-reduce).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

from kfc_fx.errors import OptionError

Sharing = Literal["expand", "reduce"]
SharingOption = str | Mapping[str, str]
"""One of the two for all linear layers, or by glob on block names; the last match counts."""


def check_sharing(option: SharingOption) -> None:
    """Raise :class:`OptionError` unless the option names known approximations."""
    known = get_args(Sharing)
    for value in [option] if isinstance(option, str) else option.values():
        if value not in known:
            raise OptionError(f"weight_sharing must be one of {', '.join(known)}; got {value!r}")


def sharing_of(name: str, option: SharingOption) -> Sharing:
    """What the linear block ``name`` takes; "expand" where no pattern matches."""
    if isinstance(option, str):
        return option  # type: ignore[return-value]
    found = [value for pattern, value in option.items() if fnmatchcase(name, pattern)]
    return found[-1] if found else "expand"  # type: ignore[return-value]


def check_patterns(option: SharingOption, linear_blocks: Sequence[str]) -> None:
    """Raise :class:`OptionError` for a pattern that no linear block's name matches."""
    for pattern in () if isinstance(option, str) else option:
        if not any(fnmatchcase(name, pattern) for name in linear_blocks):
            near = difflib.get_close_matches(pattern, linear_blocks, n=1, cutoff=0.0)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise OptionError(f"weight_sharing: no linear block matches {pattern!r}{hint}")
