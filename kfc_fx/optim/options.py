"""Options of the optimizer, checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, get_args

from kfc_fx.codegen.scalings.rules import VECTOR_RULES
from kfc_fx.codegen.spec import Clip, GenericRule
from kfc_fx.errors import OptionError
from kfc_fx.plan.choices import BlockChoice, Scaling
from kfc_fx.plan.forms import (
    FactorForms,
    InputFactorOption,
    check_input_factor,
    cut,
    factor_forms,
    takes_matrix_step,
)
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan
from kfc_fx.statistics.likelihood import Categorical, Likelihood
from kfc_fx.statistics.request import Fisher, Samples

GENERIC_MOMENTUM = 0.9
"""Of generic parameters, unless a momentum is given: torch.optim.AdamW's default."""


@dataclass(frozen=True)
class ScalingDefaults:
    """Options whose meaning, and so whose default, depends on the scaling."""

    lr: float
    momentum: float
    nesterov: bool
    damping: float
    generic: GenericRule
    generic_lr_ratio: float


DEFAULTS: dict[Scaling, ScalingDefaults] = {
    "adam": ScalingDefaults(0.01, 0.9, True, 1e-2, "adamw", 1.0),
    "spectral": ScalingDefaults(0.07, 0.95, True, 0.3, "adamw", 0.1),
    "eigen": ScalingDefaults(0.03, 0.7, False, 1e-2, "sgd", 1.0),
    "inverse": ScalingDefaults(0.03, 0.7, False, 1e-2, "sgd", 1.0),
}

SCALE_FREE: set[Scaling] = {"adam", "spectral"}
"""Scalings whose step does not depend on the scale of Γ: "adam" takes eigenvectors of it alone,
"spectral" nothing."""

BLOCK_OPTIONS = ("scaling", "input_factor")
"""What ``blocks=`` may set."""


GROUP_OPTIONS = ("lr", "weight_decay")
"""What a parameter group may set."""


@dataclass(frozen=True)
class KFCOptions:
    """Everything of :class:`kfc_fx.KFC` that is not per parameter group.

    ``None`` for ``momentum``, ``nesterov``, ``damping``, ``generic`` and ``generic_lr_ratio`` takes
    the default of the scaling.
    """

    scaling: Scaling
    momentum: float | None
    nesterov: bool | None
    damping: float | None
    ema_decay: float
    factor_interval: int
    factor_samples: Samples
    inverse_interval: int
    clip: float | None
    clip_by: Clip
    clip_samples: int | None
    quadratic_model: bool
    adapt_damping: int | None
    average: float | None
    fisher: Fisher | None
    input_factor: InputFactorOption
    basis_limit: int
    second_moment_decay: float
    eps: float
    orthogonalise: float
    generic: GenericRule | None
    generic_lr_ratio: float | None
    masters: bool
    compile_update: bool
    cuda_graph: bool | None
    blocks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (
            ("scaling", get_args(Scaling)),
            ("clip_by", ("factors", "exact")),
        ):
            _one_of(name, getattr(self, name), known)
        if self.fisher is not None:
            _one_of("fisher", self.fisher, get_args(Fisher))
        if self.generic is not None:
            _one_of("generic", self.generic, get_args(GenericRule))
        check_input_factor(self.input_factor)
        for name in ("momentum", "ema_decay", "second_moment_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise OptionError(f"{name} must be in [0, 1), got {value!r}")
        for name in ("factor_interval", "inverse_interval"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise OptionError(
                    f"{name} must be a whole number of steps, at least 1; got {value!r}"
                )
        if not (isinstance(self.basis_limit, int) and self.basis_limit >= 1):
            raise OptionError(
                f"basis_limit must be a whole number, at least 1; got {self.basis_limit!r}"
            )
        damping = self.damping
        if damping is not None and not (damping > 0 or (damping == 0 and self._all("inverse"))):
            raise OptionError(f"damping must be positive, got {damping!r}")
        for name in ("clip", "average", "clip_samples"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"{name} must be positive or None, got {value!r}")
        samples = self.factor_samples
        counted = isinstance(samples, int) and samples >= 1
        if not (samples is None or samples == "auto" or counted):
            raise OptionError(
                f"factor_samples must be a whole number of examples, at least 1, 'auto' or None; "
                f"got {samples!r}"
            )
        if self.quadratic_model and not self._all("inverse"):
            raise OptionError(
                f"quadratic_model is for scaling='inverse', got {' and '.join(self.scalings)}"
            )
        if self.quadratic_model and self.nesterov:
            raise OptionError(
                "nesterov=True does not go with quadratic_model, which takes the momentum of every "
                "step from the model"
            )
        interval = self.adapt_damping
        if interval is not None and not (isinstance(interval, int) and interval >= 1):
            raise OptionError(
                f"adapt_damping must be a whole number of steps, at least 1, or None; "
                f"got {interval!r}"
            )
        if interval is not None and not self._all("inverse"):
            raise OptionError(
                f"adapt_damping is for scaling='inverse', got {' and '.join(self.scalings)}"
            )
        if not 0 <= self.orthogonalise <= 1:
            raise OptionError(f"orthogonalise must be in [0, 1], got {self.orthogonalise!r}")
        if not self.eps > 0:
            raise OptionError(f"eps must be positive, got {self.eps!r}")
        ratio = self.generic_lr_ratio
        if ratio is not None and not ratio >= 0:
            raise OptionError(f"generic_lr_ratio must not be negative, got {ratio!r}")
        self._check_blocks()

    def _check_blocks(self) -> None:
        if not isinstance(self.blocks, Mapping):
            raise OptionError(f"blocks must be a dict of options by pattern, got {self.blocks!r}")
        for pattern, chosen in self.blocks.items():
            if not (isinstance(pattern, str) and isinstance(chosen, Mapping)):
                raise OptionError(
                    "blocks takes a dict of options for each pattern of names, as in "
                    f"{{'layer4.*': {{'scaling': 'spectral'}}}}; got {pattern!r}: {chosen!r}"
                )
            for name, value in chosen.items():
                _one_of(f"an option in blocks[{pattern!r}]", name, BLOCK_OPTIONS)
                if name == "scaling":
                    _one_of(f"scaling in blocks[{pattern!r}]", value, get_args(Scaling))
                else:
                    check_input_factor(value)

    def _all(self, scaling: Scaling) -> bool:
        return self.scalings == (scaling,)

    @property
    def scale_free(self) -> bool:
        """Whether no step depends on the scale of Γ."""
        return set(self.scalings) <= SCALE_FREE

    @property
    def scalings(self) -> tuple[Scaling, ...]:
        """Those that some block may take, the general one first."""
        special = [chosen["scaling"] for chosen in self.blocks.values() if "scaling" in chosen]
        return tuple(dict.fromkeys([self.scaling, *special]))

    # -- by block ----------------------------------------------------------------------------

    def fisher_for(self, likelihood: Likelihood) -> Fisher:
        """What Γ is estimated from. By default the loss's own backward pass, where that trains as
        well: for classes. With Bernoulli outputs its gradients are much alike at first."""
        if self.fisher is not None:
            return self.fisher
        fits = self.scale_free and isinstance(likelihood, Categorical)
        return "empirical" if fits else "sampled"

    def choice_of(self, block: BlockSpec) -> BlockChoice | None:
        """Scaling and forms of a block; None where its scaling does not fit it and its parameters
        are generic: "spectral" is for matrices, neither tables of embeddings nor norms, and not
        for sides so wide that a factor would be diagonal."""
        scaling: Scaling = self._chosen(block.name, "scaling")
        forms = factor_forms(block, self._chosen(block.name, "input_factor"))
        if scaling in ("adam", "eigen"):
            return BlockChoice(scaling, cut(block, forms, self.basis_limit))
        if scaling != "spectral":
            return BlockChoice(scaling, forms)
        if not takes_matrix_step(block):
            return None
        return BlockChoice(scaling, FactorForms(forms.input, "absent"))

    def forms_of(self, block: BlockSpec) -> FactorForms | None:
        """Forms of a block's factors; None for a block that is generic, which needs none."""
        choice = self.choice_of(block)
        return choice.forms if choice else None

    def check_patterns(self, plan: CurvaturePlan) -> None:
        """Raise :class:`OptionError` for a pattern of ``blocks`` that matches no block's name, nor
        that of a frozen layer, which may be a block later."""
        names = [block.name for block in plan.blocks]
        frozen = {name.rpartition(".")[0] for name in plan.frozen}
        for pattern in self.blocks:
            if not any(fnmatchcase(name, pattern) for name in (*names, *frozen)):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
                hint = f"; the nearest name is {near[0]!r}" if near else ""
                raise OptionError(f"blocks: no block matches {pattern!r}{hint}")

    def _chosen(self, block: str, option: str) -> Any:
        found = [
            chosen[option]
            for pattern, chosen in self.blocks.items()
            if option in chosen and fnmatchcase(block, pattern)
        ]
        return found[-1] if found else getattr(self, option)

    # -- by scaling --------------------------------------------------------------------------

    def momentum_of(self, scaling: Scaling) -> float:
        """Decay of the momentum of a scaling's blocks."""
        return DEFAULTS[scaling].momentum if self.momentum is None else self.momentum

    def nesterov_of(self, scaling: Scaling) -> bool:
        """Whether the momentum of a scaling's blocks takes Nesterov's step ahead."""
        return DEFAULTS[scaling].nesterov if self.nesterov is None else self.nesterov

    def damping_of(self, scaling: Scaling) -> float:
        """Damping of a scaling's blocks."""
        return DEFAULTS[scaling].damping if self.damping is None else self.damping

    @property
    def default_lr(self) -> float:
        """Learning rate where none is given."""
        return DEFAULTS[self.scaling].lr

    @property
    def generic_momentum(self) -> float:
        """Decay of the momentum of generic parameters."""
        return GENERIC_MOMENTUM if self.momentum is None else self.momentum

    @property
    def generic_rule(self) -> GenericRule:
        """Rule for generic parameters."""
        return self.generic or DEFAULTS[self.scaling].generic

    @property
    def generic_ratio(self) -> float:
        """Learning rate of generic parameters relative to that of blocks."""
        ratio = self.generic_lr_ratio
        return DEFAULTS[self.scaling].generic_lr_ratio if ratio is None else ratio

    @property
    def clipping(self) -> Clip:
        """How steps by a vector are scaled: by the quadratic model, by what ν is computed from,
        or not."""
        if self.quadratic_model:
            return "model"
        clips = self.clip is not None and any(s in VECTOR_RULES for s in self.scalings)
        return self.clip_by if clips else "none"

    @property
    def needs_inputs(self) -> bool:
        """Whether the exact Fisher matrix is asked, which takes the inputs of the last batch."""
        return self.clipping in ("exact", "model") or self.adapt_damping is not None


def check_group(group: Mapping[str, Any]) -> None:
    """Raise :class:`OptionError` for a parameter group with a rate below zero, or with an option
    that is not one of a group: entries that torch or schedulers keep in one are left alone."""
    others = {option.name for option in fields(KFCOptions)} | {"seed"}
    for name in set(group) - set(GROUP_OPTIONS):
        if name in others or difflib.get_close_matches(name, GROUP_OPTIONS, cutoff=0.8):
            raise OptionError(
                f"a parameter group may set {' and '.join(GROUP_OPTIONS)}, got {name!r}; the other "
                "options are for all groups, and blocks= has some by layer"
            )
    for name in GROUP_OPTIONS:
        if not float(group[name]) >= 0:
            raise OptionError(f"{name} must not be negative, got {group[name]!r}")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name} must be one of {', '.join(known)}; got {value!r}")
