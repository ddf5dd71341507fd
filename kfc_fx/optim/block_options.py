"""Which scaling each block takes, and in which forms its factors are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, get_args

from kfc_fx.codegen.spec import ScalingSpec
from kfc_fx.codegen.stacking import BlockChoice
from kfc_fx.errors import OptionError
from kfc_fx.optim.checks import one_of
from kfc_fx.optim.scalings.scaling import Scaling
from kfc_fx.optim.scalings.table import scaling_of
from kfc_fx.optim.statistics import Statistics
from kfc_fx.plan.forms import FactorForms, InputFactorOption
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan

BLOCK_OPTIONS = ("scaling", "input_factor")
"""What the dict of a pattern may set."""


@dataclass(frozen=True)
class BlockOptions:
    """The options of each block: the general ones, and others by glob on block names.

    Args:
        scaling: of blocks that no pattern names.
        patterns: glob to ``scaling`` and ``input_factor``, either or both; the last match counts.
        statistics: has the general ``input_factor``, and ``basis_limit``.
    """

    scaling: Scaling
    patterns: Mapping[str, Mapping[str, Any]]
    statistics: Statistics
    specs: Mapping[Scaling, ScalingSpec] = field(init=False)
    """Each value that some block may take, the general one first, as generated code knows it."""

    def __post_init__(self) -> None:
        special = [chosen["scaling"] for chosen in self.patterns.values() if "scaling" in chosen]
        specs: dict[Scaling, ScalingSpec] = {}
        for value in dict.fromkeys([self.scaling, *special]):
            same = sum(value.name == other.name for other in specs)
            name = f"{value.name}_{same + 1}" if same else value.name
            specs[value] = ScalingSpec(name, value.generator, value.row_parts)  # type: ignore[arg-type]
        object.__setattr__(self, "specs", specs)

    @property
    def scalings(self) -> tuple[Scaling, ...]:
        """Those that some block may take, the general one first."""
        return tuple(self.specs)

    def value_of(self, spec: ScalingSpec) -> Scaling:
        """The value that a scaling of the generated code is made from."""
        return next(value for value, known in self.specs.items() if known == spec)

    def choice_of(self, block: BlockSpec) -> BlockChoice | None:
        """Scaling and forms of a block; None where its scaling does not fit it and its parameters
        are generic."""
        scaling: Scaling = self._chosen(block.name, "scaling", self.scaling)
        general = self.statistics.input_factor
        input_factor: InputFactorOption = self._chosen(block.name, "input_factor", general)
        forms = scaling.forms(block, input_factor, self.statistics.basis_limit)
        if forms is None:
            return None
        scaling.check_rows(block)
        return BlockChoice(self.specs[scaling], forms)

    def forms_of(self, block: BlockSpec) -> FactorForms | None:
        """Forms of a block's factors; None for a block that is generic, which needs none."""
        choice = self.choice_of(block)
        return choice.forms if choice else None

    def check_patterns(self, plan: CurvaturePlan) -> None:
        """Raise :class:`OptionError` for a pattern that matches no block's name, nor that of a
        frozen layer, which may be a block later."""
        names = [block.name for block in plan.blocks]
        frozen = {name.rpartition(".")[0] for name in plan.frozen}
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in (*names, *frozen)):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
                hint = f"; the nearest name is {near[0]!r}" if near else ""
                raise OptionError(f"blocks: no block matches {pattern!r}{hint}")

    def _chosen(self, block: str, option: str, general: Any) -> Any:
        found = [
            chosen[option]
            for pattern, chosen in self.patterns.items()
            if option in chosen and fnmatchcase(block, pattern)
        ]
        return found[-1] if found else general


def patterns_of(given: object) -> dict[str, dict[str, Any]]:
    """``blocks=`` with a dict of options for each pattern, names of scalings as values.

    Raises:
        OptionError: it is no dict, or what it says of a pattern does not fit.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise OptionError(f"blocks must be a dict of options by pattern, got {given!r}")
    return {pattern: _of_pattern(pattern, chosen) for pattern, chosen in given.items()}


def _of_pattern(pattern: object, chosen: object) -> dict[str, Any]:
    if not isinstance(pattern, str):
        raise OptionError(
            "blocks maps globs on block names to their options, as in "
            f"{{'layer4.*': kfc_fx.Spectral(damping=0.3)}}; got {pattern!r}: {chosen!r}"
        )
    where = f"blocks[{pattern!r}]"
    if not isinstance(chosen, Mapping):
        return {"scaling": scaling_of(where, chosen)}
    found = dict(chosen)
    for name in found:
        one_of(*BLOCK_OPTIONS)(f"an option in {where}", name)
    if "scaling" in found:
        found["scaling"] = scaling_of(f"scaling in {where}", found["scaling"])
    if "input_factor" in found:
        known = get_args(InputFactorOption)
        one_of(*known)(f"input_factor in {where}", found["input_factor"])
    return found
