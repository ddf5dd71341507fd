"""Bind an optimizer to a plan: which blocks it updates, how they stack, at which rate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfc_fx.codegen.columns import stack_columns
from kfc_fx.codegen.engine import UpdateEngine
from kfc_fx.codegen.layout import stack_blocks
from kfc_fx.codegen.options import GenericParameter, UpdateSpec
from kfc_fx.codegen.scaling import VECTOR_RULES
from kfc_fx.codegen.state import SavedState
from kfc_fx.compile import CompiledModel
from kfc_fx.errors import KfcWarning, OptionError
from kfc_fx.gradients import as_real
from kfc_fx.optim_options import KFCOptions
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan

ORTHOGONAL_ITERATION_FROM = 128
"""Narrower sides take ``eigh`` at every refresh, which is cheap there and exact."""

Group = Mapping[str, Any]


class Binding:
    """The engine that fits a compiled model's plan, its parameters and the groups as they are.

    Methods take the optimizer's ``param_groups``, which belong to it and may change at any time.
    """

    def __init__(self, compiled: CompiledModel, options: KFCOptions) -> None:
        self.names = {p: name for name, p in compiled.original.named_parameters()}
        """Parameter to name."""
        self._compiled = compiled
        self._options = options
        self._engine: UpdateEngine | None = None
        self._key: object = None
        self._loaded = SavedState.empty()
        self._rates: tuple[object, dict[str, Any]] = (None, {})

    def by_name(self, groups: Sequence[Group]) -> dict[str, Group]:
        """Parameter group by parameter name."""
        return {self.names[p]: group for group in groups for p in group["params"]}

    def engine(self, groups: Sequence[Group]) -> UpdateEngine:
        """The engine for the plan, devices and groups as they are now.

        Raises:
            OptionError: the plan has no block to precondition, a group splits a block, or a loaded
                state does not fit.
        """
        parameters = real_parameters(self._compiled)
        key = (
            self._compiled.revision,
            tuple((p.requires_grad, p.device, p.dtype) for p in parameters.values()),
            tuple((len(g["params"]), g["weight_decay"] > 0) for g in groups),
        )
        if self._engine is None or self._key != key:
            spec = update_spec(self._compiled, self._options, parameters, self.by_name(groups))
            if self._engine is None or self._engine.spec != spec:
                compiled, graph = self._options.compile_update, self._options.cuda_graph
                _check_one_device(spec, parameters, compiled=compiled)
                captured = _captures(spec, parameters, graph)
                engine = UpdateEngine(
                    spec, self.saved(), parameters, compiled=compiled, captured=captured
                )
                self._check_loaded(engine.anew)
                self._tell_of_lost_blocks(spec)
                self._engine, self._loaded = engine, SavedState.empty()
            self._key = key
        self._engine.parameters = parameters  # the real views of complex ones are new
        return self._engine

    @property
    def current(self) -> UpdateEngine | None:
        """The engine of the last step, if there was one."""
        return self._engine

    def learning_rates(self, engine: UpdateEngine, groups: Sequence[Group]) -> dict[str, Any]:
        """Rates as the generated code takes them, rebuilt only when one has changed."""
        key = (id(engine), tuple(float(group["lr"]) for group in groups))
        if self._rates[0] != key:
            ratio = self._options.generic_ratio
            self._rates = (key, learning_rates(engine.spec, self.by_name(groups), ratio))
        return self._rates[1]

    def saved(self) -> SavedState:
        """State of the engine; before there is one, the state that it will start from."""
        return self._loaded if self._engine is None else self._engine.saved()

    def load(self, state: SavedState) -> None:
        """Start the next engine from ``state``."""
        self._engine, self._loaded = None, state

    def _check_loaded(self, anew: Sequence[str]) -> None:
        """What the user might take for resumed.

        Args:
            anew: blocks that a loaded state, if there is one, has nothing for that fits.

        Raises:
            OptionError: what it has for one of them is of another kind.
        """
        if not (self._loaded.blocks and anew):
            return
        other = [name for name in anew if name in self._loaded.blocks]
        if other:
            raise OptionError(
                f"the loaded state does not fit {len(other)} blocks ({_shown(other)}): it is of "
                "another scaling, of factors in another form, or of another layer. Make KFC with "
                "the options that it was saved with, or load the model's state alone"
            )
        warnings.warn(
            f"{len(anew)} blocks begin anew ({_shown(anew)}): the loaded state has none of them",
            KfcWarning,
            stacklevel=5,
        )

    def _tell_of_lost_blocks(self, spec: UpdateSpec) -> None:
        """Warn of blocks that have become generic while the model was trained."""
        if self._engine is None:
            return
        reasons = {generic.name: generic.reason for generic in self._compiled.plan.generic}
        kept = {block.weight for stack in spec.stacks for block in stack.blocks}
        lost = [block for block in self._engine.blocks if block.weight not in kept]
        lost = [block for block in lost if block.weight in reasons]
        if lost:
            first = lost[0]
            warnings.warn(
                f"{len(lost)} layers have no block any more ({_shown([b.name for b in lost])}) and "
                f"are updated as generic parameters; {first.weight}: {reasons[first.weight]}",
                KfcWarning,
                stacklevel=5,
            )

    @property
    def average(self) -> Mapping[str, Tensor]:
        """Polyak-averaged parameters by name; empty where there are none."""
        return (self._loaded if self._engine is None else self._engine).average


def real_parameters(compiled: CompiledModel) -> dict[str, Tensor]:
    """The model's parameters by name; complex ones as pairs of real numbers, as
    ``torch.optim.AdamW`` steps them."""
    return {
        name: as_real(p.detach()).requires_grad_(p.requires_grad) if p.is_complex() else p
        for name, p in compiled.original.named_parameters()
    }


def update_spec(
    compiled: CompiledModel,
    options: KFCOptions,
    parameters: Mapping[str, Tensor],
    groups: Mapping[str, Group],
) -> UpdateSpec:
    """The update for the parameters that the optimizer holds.

    Args:
        parameters: all of the model, by name.
        groups: parameter group by the name of each parameter that is updated.

    Raises:
        OptionError: the plan has no block to precondition, or a group splits a block.
    """
    plan = compiled.plan
    options.check_patterns(plan)
    held = [block for block in plan.blocks if block.weight in groups]
    _check_blocks(plan, held, groups)
    choices = {block: choice for block in held if (choice := options.choice_of(block))}
    if not choices:
        raise OptionError(
            f"there is nothing to precondition: no layer among {len(held)} blocks takes scaling "
            f"{options.scaling!r}, which is for matrices whose sides are not too wide; use 'adam'"
        )

    def placement(block: BlockSpec) -> tuple[str, str, bool]:
        weight = parameters[block.weight]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return str(weight.device), str(dtype).removeprefix("torch."), dtype != weight.dtype

    in_blocks = {name for block in choices for name in block.parameters}
    scalings = {choice.scaling for choice in choices.values()}
    kept: list[Any] = [s for s in options.scalings if s in scalings and options.momentum_of(s)]
    kept += ["generic"] * (options.generic_momentum > 0)
    return UpdateSpec(
        title=type(compiled.original).__name__,
        stacks=stack_blocks(list(choices), choices.__getitem__, placement),
        generic=tuple(
            GenericParameter(name, tuple(p.shape), _is_half(p))
            for name, p in parameters.items()
            if name in groups and name not in in_blocks and p.requires_grad
        ),
        generic_rule=options.generic_rule,
        momentum=tuple(kept),
        nesterov=tuple(s for s in kept if s != "generic" and options.nesterov_of(s)),
        orthogonalise=options.orthogonalise > 0 and "adam" in scalings,
        weight_decay=any(group["weight_decay"] for group in groups.values()),
        clip=options.clipping if scalings & set(VECTOR_RULES) else "none",
        average=options.average is not None,
        masters=tuple(
            name
            for name, p in parameters.items()
            if options.masters and name in groups and p.requires_grad and _is_half(p)
        ),
        partial=False,
        orthogonal_iteration_from=ORTHOGONAL_ITERATION_FROM,
        factors_in_basis=options.factor_interval == options.inverse_interval,
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def _is_half(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _check_one_device(
    spec: UpdateSpec, parameters: Mapping[str, Tensor], *, compiled: bool
) -> None:
    devices = {str(parameters[name].device) for name in spec.parameters}
    if compiled and len(devices) > 1:
        raise OptionError(
            "compile_update needs all parameters on one device, and these are on "
            f"{', '.join(sorted(devices))}; leave it out, or make a KFC for each device"
        )


def _captures(spec: UpdateSpec, parameters: Mapping[str, Tensor], wanted: bool | None) -> bool:
    """Whether steps are replayed as a CUDA graph.

    Raises:
        OptionError: it is wanted, and cannot be.
    """
    kinds = {parameters[name].device for name in spec.parameters}
    on_one_gpu = len(kinds) == 1 and next(iter(kinds)).type == "cuda"
    possible = on_one_gpu and not spec.pauses
    if wanted and not possible:
        why = (
            "the exact Fisher matrix is asked in the middle of a step (use clip_by='factors', and "
            "no quadratic_model)"
            if on_one_gpu
            else f"the parameters are on {', '.join(sorted(map(str, kinds)))}, not on one GPU"
        )
        raise OptionError(f"cuda_graph=True: {why}")
    return possible and wanted is not False


def _check_blocks(
    plan: CurvaturePlan, blocks: Sequence[BlockSpec], groups: Mapping[str, Group]
) -> None:
    if not blocks:
        reasons = "; ".join(f"{g.name}: {g.reason}" for g in plan.generic[:5]) or "none is trained"
        raise OptionError(
            "there is nothing to precondition: no conv or linear layer of the model is among the "
            f"optimizer's parameters ({reasons}). Use torch.optim for this model"
        )
    for block in blocks:
        if block.bias is not None and block.bias not in groups:
            raise OptionError(
                f"layer {block.name!r}: its weight is among the optimizer's parameters and its "
                "bias is not, but they are one block [W b]; pass both, or freeze the bias"
            )


def learning_rates(
    spec: UpdateSpec, groups: Mapping[str, Group], generic_ratio: float
) -> dict[str, Any]:
    """``lr`` argument of the generated update: by stack ``[depth, 1, 1]``, and a list for generic.

    Args:
        groups: parameter group by parameter name.
        generic_ratio: learning rate of generic parameters relative to their group's.

    Raises:
        OptionError: weight and bias of one layer have different rates.
    """
    columns: dict[str, list[float]] = {}
    for stack in spec.stacks:
        column = columns.setdefault(stack.key, [])
        for block in stack.blocks:
            weight_rate = float(groups[block.weight]["lr"])
            if block.bias is not None and float(groups[block.bias]["lr"]) != weight_rate:
                raise OptionError(
                    f"layer {block.name!r}: weight and bias have different learning rates, but "
                    "they are one block [W b]; give them one rate"
                )
            column += [weight_rate] * block.groups
    rates: dict[str, Any] = dict(stack_columns(columns, spec.stacks))
    rates["generic"] = {p.name: generic_ratio * float(groups[p.name]["lr"]) for p in spec.generic}
    return rates


def option_arguments(
    spec: UpdateSpec, options: KFCOptions, inverse_damping: float | None = None
) -> dict[str, Any]:
    """Options as arguments of the generated code, by the names that it may have for them.

    Args:
        inverse_damping: of "inverse", where it was adapted.
    """
    arguments: dict[str, Any] = {
        "generic_momentum": options.generic_momentum,
        "clip": options.clip,
    }
    for scaling in spec.scalings:
        own = {
            "momentum": options.momentum_of(scaling),
            "damping": options.damping_of(scaling),
            "second_moment_decay": options.second_moment_decay,
            "eps": options.eps,
            "orthogonalise": options.orthogonalise,
        }
        if scaling == "inverse" and inverse_damping is not None:
            own["damping"] = inverse_damping
        arguments |= {spec.option(name, scaling): value for name, value in own.items()}
    return arguments
