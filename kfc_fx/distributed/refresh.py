"""A refresh that the ranks share: every block is refreshed by its owner, and all get the result."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.distributed.attempt import Attempt
from kfc_fx.distributed.owners import owners_of
from kfc_fx.distributed.packing import Slot, packed, size_of, unpacked
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.engine.engine import UpdateEngine
from kfc_fx.engine.state import dtype_of, refreshed_entries
from kfc_fx.engine.step_inputs import OptionNumbers


def refresh_layouts(spec: UpdateSpec, ranks: int) -> list[dict[str, Slot]]:
    """What each rank has to send of the blocks that it owns, by "block.entry"."""
    owners = owners_of(spec, ranks)
    layouts: list[dict[str, Slot]] = [{} for _ in range(ranks)]
    for stack in spec.stacks:
        entries = refreshed_entries(spec, stack)
        for block in stack.blocks:
            for name, entry in entries.items():
                shape = (entry.shape[0] // stack.depth * block.groups, *entry.shape[1:])
                layouts[owners[block.name]][f"{block.name}.{name}"] = Slot(shape)
    return layouts


def refreshed_by_owners(
    engine: UpdateEngine,
    spec: UpdateSpec,
    options: OptionNumbers,
    ranks: Ranks,
    attempt: Attempt,
) -> list[str]:
    """Refresh factors of an engine, each on its owner, by one collective; returns the blocks for
    which that failed. An engine on which something has failed need not be able to.

    Args:
        spec: of the stacks whose factors are refreshed.

    Raises:
        StepError: something has failed on another rank.
    """
    layouts = refresh_layouts(spec, ranks.count)
    names = [block.name for stack in spec.stacks for block in stack.blocks]
    owners = owners_of(spec, ranks.count)
    own = [name for name in names if owners[name] == ranks.rank]
    dtype = torch.float32
    for stack in spec.stacks:
        dtype = torch.promote_types(dtype, getattr(torch, stack.dtype))
    sizes = [size_of(layout.values()) + len(names) + 1 for layout in layouts]
    numbers = sizes[ranks.rank] - len(names) - 1
    buffer = torch.zeros(sizes[ranks.rank], dtype=dtype, device=spec.stacks[0].device)
    with attempt.local():
        attempt.raise_own()
        found, failed = engine.refreshed_blocks(own, options)
        packed(layouts[ranks.rank], _flat(found), buffer)
        flags = torch.tensor([name in failed for name in names] + [False])
        buffer[numbers:] = flags.to(buffer)
    buffer[-1] = float(attempt.failed)
    parts = ranks.gather_parts(buffer, sizes)
    flags = torch.stack([part[-len(names) - 1 :] for part in parts]).cpu().bool()
    attempt.settle(flags[:, -1].nonzero()[:, 0].tolist())
    blocks: dict[str, dict[str, Tensor]] = {}
    for layout, part in zip(layouts, parts, strict=True):
        for key, value in unpacked(layout, part).items():
            name, _, entry = key.rpartition(".")
            blocks.setdefault(name, {})[entry] = value
    entries = {s.key: refreshed_entries(spec, s) for s in spec.stacks}
    dtypes = {
        block.name: {n: dtype_of(spec, stack, own) for n, own in entries[stack.key].items()}
        for stack in spec.stacks
        for block in stack.blocks
    }
    devices = {b.name: s.device for s in spec.stacks for b in s.blocks}
    engine.take_refreshed(
        {
            name: {key: value.to(devices[name], dtypes[name][key]) for key, value in own.items()}
            for name, own in blocks.items()
        }
    )
    is_failed = flags[:, :-1].any(0).tolist()
    return [name for name, lost in zip(names, is_failed, strict=True) if lost]


def _flat(blocks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{block}.{name}": v for block, own in blocks.items() for name, v in own.items()}
