"""Parameters that have moved in a model: how that is seen, and the state under their new names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from torch import nn

from kfc_fx.engine.state import SavedState
from kfc_fx.plan.spec import BlockSpec, block_name


def held_by(modules: Iterable[nn.Module]) -> list[object]:
    """Names and identities of all that modules hold: it is another one if any of it is."""
    found: list[object] = []
    for module in modules:
        for held in (module._parameters, module._modules):
            found += held
            found += map(id, held.values())
    return found


def renamed_state(saved: SavedState, names: Mapping[str, str], gone: Collection[str]) -> SavedState:
    """A state of a model whose parameters have other names now.

    Args:
        names: old name of a parameter to its new one.
        gone: names of parameters that are no more, which others have now.
    """
    blocks = {block_name(old): block_name(new) for old, new in names.items()}
    saved = saved.without(gone, {block_name(name) for name in gone})
    plan = {}
    for old, block in saved.plan.items():
        name = blocks.get(old, old)
        plan[name] = BlockSpec.from_dict(block).renamed(name, names).as_dict()
    return replace(saved.renamed(names, blocks), plan=plan)
