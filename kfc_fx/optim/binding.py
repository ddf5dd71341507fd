"""Bind an optimizer to a plan: which blocks it updates, how they stack, at which rate."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from kfc_fx.capture.wrappers import reshard
from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.compilation import Compilation
from kfc_fx.distributed.divided_engine import DividedEngine
from kfc_fx.distributed.generic_rows import whole_where_foreign
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.distributed.shards import is_distributed, is_sharded, locals_of
from kfc_fx.engine.state import SavedState, fitting
from kfc_fx.engine.step_inputs import Momenta
from kfc_fx.errors import OptionError, counted, some_of, warn
from kfc_fx.optim.consolidated import Consolidated
from kfc_fx.optim.engines import Engine, built_engine
from kfc_fx.optim.groups import Group, check_second_beta
from kfc_fx.optim.moved_parameters import held_by, renamed_state
from kfc_fx.optim.options import KFCOptions
from kfc_fx.optim.rates import LearningRates, learning_rates, momenta
from kfc_fx.optim.states.state_dict import PLACES
from kfc_fx.optim.update_spec import real_parameters, update_spec
from kfc_fx.plan.coverage import NOT_USED
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan, block_name

SETTLED = 10
"""Steps for which parameters that were frozen keep their place in the update. Halves of a model
that are frozen by turns take the same update then, and one that stays frozen leaves it."""


class Binding:
    """The engine that fits a compiled model's plan, its parameters and the groups as they are.

    Methods take the optimizer's ``param_groups``, which belong to it and may change at any time.
    """

    def __init__(
        self,
        compilation: Compilation,
        options: KFCOptions,
        ranks: Ranks,
        outside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """``outside``: parameters of no compiled model by name, generic ones beside the model's."""
        self._ranks = ranks
        self._owners: dict[str, int] = {}
        self.consolidated: Consolidated = Consolidated(ranks)
        """State of other ranks, where somebody has asked."""
        self._outside = dict(outside or {})
        self._compilation = compilation
        self._tree: tuple[list[nn.Module], list[object]] | None = None
        """The model's modules, and what they held when they were last looked at."""
        self._held: dict[str, Tensor] = {}
        self._real: dict[str, Tensor] | None = None
        self.names: dict[Tensor, str] = {}
        """Parameter to name."""
        self.follow()
        self._options = options
        self._engine: Engine | None = None
        self._key: object = None
        self._revision: object = -1
        self._agreed: tuple[CurvaturePlan, int] | None = None
        """The plan that all ranks have, and how often it has changed."""
        self._since = 0
        """Steps since the key has changed, also those before the state was saved."""
        self._loaded = SavedState.empty()
        self._resumes = False
        """Whether what the next engine starts from was loaded by the user."""
        self._changes = 0
        self._parked: dict[str, dict[str, Tensor]] = {}
        """State by name of blocks that are not in the engine now."""
        self._parked_plan: dict[str, dict[str, Any]] = {}
        self._parked_elsewhere: dict[str, tuple[str, ...]] = {}
        """Blocks that are parked on other ranks, and the names of what there is of them."""
        self._rates: tuple[object, LearningRates] = (None, LearningRates({}, {}))
        self._momenta: tuple[object, Momenta] = (None, Momenta({}, {}))

    def follow(self) -> bool:
        """Take the parameters that the model holds now, and their names, for those that are meant;
        returns whether there were others before. State goes with the parameter that it is of."""
        if self._tree and self._tree[1] == held_by(self._tree[0]):
            return False
        modules = list(self._compilation.model.modules())
        self._tree = (modules, held_by(modules))
        held: dict[str, Tensor] = dict(self._compilation.model.named_parameters())
        before = self._held
        # in a forward pass, and after one without a backward pass, others stand in for the shards
        held = {
            name: before[name] if is_distributed(before.get(name)) and not is_distributed(p) else p
            for name, p in held.items()
        }
        same = held.keys() == before.keys() and all(held[name] is before[name] for name in held)
        if same and self.names:
            return False
        names = {parameter: name for name, parameter in before.items()}
        renamed = {names[p]: name for name, p in held.items() if p in names and names[p] != name}
        # a replaced parameter of the same size goes on with the state of its place; a moved one
        # takes its own along, over what was there
        gone = {n for n, p in before.items() if n not in renamed and n in renamed.values()}
        self._held, self._real = held, None
        self.names = {parameter: name for name, parameter in held.items()}
        self.names |= {parameter: name for name, parameter in self._outside.items()}
        if renamed:
            self.take_over(renamed_state(self.held(), renamed, gone))
            blocks = {block_name(old): block_name(new) for old, new in renamed.items()}
            self._owners = {blocks.get(name, name): rank for name, rank in self._owners.items()}
        self._key = None
        return bool(before)

    def by_name(self, groups: Sequence[Group]) -> dict[str, Group]:
        """Parameter group by parameter name."""
        return {
            self.names[p]: group for group in groups for p in group["params"] if p in self.names
        }

    def of_model(self, groups: Sequence[Group]) -> list[str]:
        """Names of the model's parameters in groups."""
        return [name for name in self.by_name(groups) if name not in self._outside]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, complex ones as pairs of real numbers."""
        if self._real is None:
            own = real_parameters(self._held.items()) | real_parameters(self._outside.items())
            if any(p.is_complex() for p in self.names):
                return own  # views, of where the parameters are now
            self._real = own
        return self._real

    def reshard(self) -> None:
        """Let a model that is sharded hold its shards, so that what is written to them counts."""
        reshard(self._compilation.model)

    @property
    def local_parameters(self) -> dict[str, Tensor]:
        """The same; of those that are sharded this rank's part."""
        return locals_of(self.parameters)

    def engine(self, groups: Sequence[Group]) -> Engine:
        """The engine for the plan, devices and groups as they are now.

        Raises:
            OptionError: the plan has no block to precondition, a group splits a block, or a loaded
                state does not fit.
        """
        parameters = self.parameters
        key = (
            tuple((p.requires_grad, p.device, p.dtype) for p in parameters.values()),
            tuple(
                (tuple(map(id, g["params"])), g["weight_decay"] > 0, g["betas"][0] > 0)
                for g in groups
            ),
            self.divided and self._ranks.count,
        )
        if self._key != key:
            self._since = self._loaded.since if self._engine is None else 0
        plan, revision = self._plan_and_revision
        changed = (self._key, self._revision) != (key, revision)
        self._changes += changed
        if self._engine is None or changed or self._since == SETTLED:
            by_name = self.by_name(groups)
            spec = update_spec(
                type(self._compilation.model).__name__,
                plan,
                self._options,
                parameters,
                by_name,
                self._blocks_beside(plan, parameters, by_name),
                self._generic_beside(parameters, by_name),
            )
            fits = isinstance(self._engine, DividedEngine) == self.divided
            if self._engine is None or self._engine.spec != spec or not fits:
                self._engine = self._built(spec, parameters, groups)
            self._key, self._revision = key, revision
        self._engine.take_parameters(parameters)  # the real views of complex ones are new
        return self._engine

    def agree(self, plan: CurvaturePlan) -> None:
        """Take a plan that all ranks have, until the next one. What is captured between two of them
        would make the update of one rank another than that of the others."""
        known, changes = self._agreed or (None, -1)
        if known is None or (known.blocks, known.generic) != (plan.blocks, plan.generic):
            self._agreed = (plan, changes + 1)

    @property
    def _plan_and_revision(self) -> tuple[CurvaturePlan, object]:
        if self._agreed is None:
            return self._compilation.plan, self._compilation.revision
        plan, changes = self._agreed
        return plan, ("agreed", changes)

    @property
    def owners(self) -> dict[str, int]:
        """Blocks that have an owner among the ranks, and its number."""
        return self._owners

    def take_owners(self, owners: Mapping[str, int]) -> None:
        """Let blocks have the owners that they have in another optimizer."""
        self._owners = dict(owners)

    def signature(self, groups: Sequence[Group]) -> object:
        """What the ranks have to agree on anew where it changes: names, shapes, what is trained."""
        shapes = tuple((n, tuple(p.shape), p.requires_grad) for n, p in self._held.items())
        members = tuple(tuple(self.names.get(p) for p in group["params"]) for group in groups)
        return shapes, members

    @property
    def divided(self) -> bool:
        """Whether each rank has the state of the blocks that it owns alone."""
        divides = self._ranks.several and self._options.distribute == "update"
        return divides or is_sharded(self._held.values())

    @property
    def elsewhere(self) -> list[str]:
        """Blocks, and parameters without one, whose state is on other ranks or in part there."""
        if self.consolidated.is_whole:
            return []
        held = self.held()
        whole = {name for name, p in self.parameters.items() if not is_distributed(p)}
        in_part = [
            name
            for name, entry in held.generic.items()
            if name in whole and is_sharded(entry.values())
        ]
        return [*held.elsewhere, *in_part]

    def gather_blocks(self) -> None:
        """Bring the state of all ranks' blocks to all ranks, for as long as it is that."""
        self.consolidated.forget()
        self.consolidated.gather_blocks(self.held())

    def consolidate(self, rank: int) -> None:
        """Bring the state of all ranks' blocks, and what is divided of parameters, to one rank, for
        as long as it is that."""
        self.consolidated.forget()
        self.consolidated.bring_to(rank, self.held(), self.parameters)

    def note_step(self) -> None:
        """Count a step that was taken."""
        self._since += 1
        self.consolidated.forget()

    def _blocks_beside(
        self, plan: CurvaturePlan, parameters: Mapping[str, Tensor], groups: Mapping[str, Group]
    ) -> list[BlockSpec]:
        """Blocks that are not in the plan and keep their place: of layers that were frozen a few
        steps ago, and of those that a loaded state has and that were not called yet."""
        taken = {name for block in plan.blocks for name in block.parameters}
        unused = {generic.name for generic in plan.generic if generic.reason == NOT_USED}
        found = []
        state = self._loaded if self._engine is None else self.held()
        for name, plain in state.plan.items():
            block = BlockSpec.from_dict(plain)
            names = set(block.parameters)
            if not names <= groups.keys() or names & taken:
                continue
            if tuple(parameters[block.weight].shape) != block.weight_shape:
                continue
            frozen = not any(parameters[own].requires_grad for own in names)
            keeps_place = self._since < SETTLED and name not in state.parked
            if names <= unused or (frozen and keeps_place):
                found.append(block)
        return found

    def _generic_beside(
        self, parameters: Mapping[str, Tensor], groups: Mapping[str, Group]
    ) -> set[str]:
        """Generic parameters that were frozen a few steps ago."""
        if self._engine is None or self._since >= SETTLED:
            return set()
        known = {generic.name for generic in self._engine.spec.generic}
        return {name for name in known & groups.keys() if not parameters[name].requires_grad}

    def _built(
        self, spec: UpdateSpec, parameters: Mapping[str, Tensor], groups: Sequence[Group]
    ) -> Engine:
        """The engine of a spec, with the state that there is."""
        saved = self.held()
        own = momenta(spec, self._options, self.by_name(groups))
        ranks = self._ranks if self.divided else None
        engine = built_engine(spec, saved, parameters, self._options, own, ranks, self._owners)
        _refuse_lost([n for n in engine.anew if n in saved.plan and n not in saved.blocks])
        if isinstance(engine, DividedEngine):
            self._owners |= engine.owners
        if self._resumes:
            self._check_loaded(engine.anew)
        self._tell_of_lost_blocks(spec)
        in_place = {block.name for block in engine.blocks}
        self._parked = {
            name: {key: value.clone() for key, value in saved.blocks[name].items()}
            for name in saved.blocks
            if name not in in_place
        }
        self._parked_elsewhere = {
            name: own for name, own in saved.elsewhere.items() if name not in in_place
        }
        parked = {*self._parked, *self._parked_elsewhere}
        self._parked_plan = {n: b for n, b in saved.plan.items() if n in parked}
        self._loaded, self._resumes = SavedState.empty(), False
        return engine

    @property
    def current(self) -> Engine | None:
        """The engine of the last step, if there was one."""
        return self._engine

    def learning_rates(
        self, engine: Engine, groups: Sequence[Group], share: float
    ) -> LearningRates:
        """A share of the rates of a step, rebuilt only when one has changed."""
        key = (id(engine), self._changes, share, *(float(group["lr"]) for group in groups))
        if self._rates[0] != key:
            ratio = self._options.generic_ratio
            self._rates = (key, learning_rates(engine.spec, self.by_name(groups), ratio, share))
        return self._rates[1]

    def momenta(self, engine: Engine, groups: Sequence[Group]) -> Momenta:
        """The momenta of a step, rebuilt only when one has changed.

        Raises:
            OptionError: a group sets one, and the quadratic model chooses the momentum.
        """
        key = (id(engine), self._changes, tuple(group["betas"] for group in groups))
        if self._momenta[0] != key:
            self._check_betas(groups)
            found = momenta(engine.spec, self._options, self.by_name(groups))
            self._momenta = (key, found)
        return self._momenta[1]

    def _check_betas(self, groups: Sequence[Group]) -> None:
        for group in groups:
            check_second_beta(group, self._options.betas)
            first = group["betas"][0]
            if first != self._options.betas[0] and self._options.clipping == "model":
                raise OptionError(
                    f"a group has betas[0]={first}, and quadratic_model takes the momentum of "
                    "every step from the model: leave betas as they are (cycle_momentum=False)"
                )

    def held(self) -> SavedState:
        """State of the engine, and of blocks that are not in it now, such as those of layers that
        are frozen or not called, in the tensors that it is in; before there is an engine, the state
        that it will start from."""
        state = self._loaded if self._engine is None else self._engine.held()
        parked = frozenset({*self._parked, *self._parked_elsewhere})
        held = replace(
            state,
            blocks=ChainMap(self._parked, cast(Any, state.blocks)),
            elsewhere={**self._parked_elsewhere, **state.elsewhere},
            plan={**self._parked_plan, **state.plan},
            parked=parked if self._engine else state.parked,
            since=self._since if self._engine else state.since,
        )
        return self.consolidated.over(held)

    @property
    def has_state(self) -> bool:
        """Whether there is an engine, or a state that one will start from."""
        return self._engine is not None or bool(
            self._loaded.blocks or self._loaded.generic or self._loaded.average
        )

    def take_over(self, state: SavedState) -> None:
        """Start the next engine from ``state``, which need not be whole."""
        self._engine, self._loaded, self._key = None, state, None
        self._parked, self._parked_plan, self._parked_elsewhere = {}, {}, {}
        self.consolidated.forget()

    def load(self, state: SavedState) -> None:
        """Start the next engine from ``state``, which the user has loaded; with divided state all
        ranks do so together."""
        if self.divided and not is_sharded(self._held.values()):
            state = replace(state, generic=whole_where_foreign(state.generic, self._ranks))
        self.take_over(state)
        self._resumes = True

    def check_fits(self, state: SavedState) -> None:
        """Raise :class:`OptionError` where a state has something of another kind for a block that
        is known by now."""
        if self._engine is not None:
            spec = self._engine.spec
            known = [name for stack in spec.stacks for name in stack.spans if name in state.blocks]
            kept = fitting(spec, {name: state.blocks[name] for name in known})
            _refuse_other_kind([name for name in known if name not in kept])

    def _check_loaded(self, anew: Sequence[str]) -> None:
        """What the user might take for resumed.

        Args:
            anew: blocks that a loaded state, if there is one, has nothing for that fits.

        Raises:
            OptionError: what it has for one of them is of another kind.
        """
        if not (self._loaded.blocks and anew):
            return
        _refuse_other_kind([name for name in anew if name in self._loaded.blocks])
        warn(
            f"the loaded state has nothing for {counted(len(anew), 'block')} ({some_of(anew)}), "
            "begun anew"
        )

    def _tell_of_lost_blocks(self, spec: UpdateSpec) -> None:
        """Warn of blocks that have become generic while the model was trained."""
        if self._engine is None:
            return
        reasons = {own.name: own.reason for own in self._plan_and_revision[0].generic}
        kept = {block.weight for stack in spec.stacks for block in stack.blocks}
        lost = [block for block in self._engine.blocks if block.weight not in kept]
        lost = [block for block in lost if block.weight in reasons]
        if lost:
            first = lost[0]
            warn(
                f"updated as generic parameters from now on, without the block that there was: "
                f"{counted(len(lost), 'layer')} ({some_of([b.name for b in lost])}); "
                f"{first.weight}: {reasons[first.weight]}"
            )

    @property
    def average(self) -> Mapping[str, Tensor]:
        """Polyak-averaged parameters by name; empty where there are none."""
        return (self._loaded if self._engine is None else self._engine).average


def _refuse_other_kind(blocks: Sequence[str]) -> None:
    if blocks:
        raise OptionError(
            f"the loaded state does not fit {counted(len(blocks), 'block')} ({some_of(blocks)}): "
            "it is of another scaling, of factors in another form, or of another layer. "
            "Make KFC with the options that it was saved with, or load the model's state alone"
        )


def _refuse_lost(blocks: Sequence[str]) -> None:
    if blocks:
        raise OptionError(
            f"there is no state of {counted(len(blocks), 'block')} that this rank owns "
            f"({some_of(blocks)}). {PLACES}, on all ranks; or load what "
            "opt.consolidate_state_dict() has made whole"
        )
