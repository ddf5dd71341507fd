"""An optimizer in a few lines, for ``repr``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kfc_fx.errors import counted
from kfc_fx.optim.engines import Engine
from kfc_fx.optim.groups import Group
from kfc_fx.optim.options import KFCOptions


def shown(
    options: KFCOptions,
    groups: Sequence[Group],
    engines: Sequence[Engine | None],
    likelihoods: Sequence[str],
) -> str:
    """Scaling, blocks, generic parameters, intervals and rates.

    Args:
        engines: of the last step of each model; None before the first, where blocks are not known.
        likelihoods: of each model's output, and what Γ is estimated from.
    """
    statistics, known = options.statistics, [engine for engine in engines if engine is not None]
    lines = [
        f"scaling: {options.scaling!r}",
        *(f"  {pattern!r}: {_patterns_line(chosen)}" for pattern, chosen in options.blocks.items()),
        f"blocks: {_blocks_line(known)}",
        f"generic: {_generic_line(known)}{options.generic!r}, lr ratio {options.generic_ratio:g}",
        f"statistics: every {statistics.every} steps, refreshed every {statistics.refresh_every}",
        *(f"likelihood: {line}" for line in likelihoods),
        *_switches(options),
        *(_group_line(index, group) for index, group in enumerate(groups)),
    ]
    return "KFC(\n" + "".join(f"  {line}\n" for line in lines) + ")"


def _patterns_line(chosen: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in chosen.items())


def _blocks_line(engines: Sequence[Engine]) -> str:
    if not engines:
        return "known after the first step"
    counts: dict[str, int] = {}
    for stack in (stack for engine in engines for stack in engine.spec.stacks):
        counts[stack.scaling.name] = counts.get(stack.scaling.name, 0) + len(stack.blocks)
    return ", ".join(f"{count} by {name}" for name, count in counts.items())


def _generic_line(engines: Sequence[Engine]) -> str:
    if not engines:
        return ""
    count = sum(len(engine.spec.generic) for engine in engines)
    return f"{counted(count, 'parameter')} by "


def _switches(options: KFCOptions) -> Iterator[str]:
    if options.warmup is not None:
        yield f"warmup: over {options.warmup} steps"
    if options.state_dtype is not None:
        yield f"state_dtype: {str(options.state_dtype).removeprefix('torch.')}"
    if options.average is not None:
        yield f"average: over {options.average:g} steps"
    if options.max_block_norm is not None:
        yield f"max_block_norm: {options.max_block_norm:g}"
    for name in ("cautious_decay", "master_weights", "compile_update", "maximize"):
        if getattr(options, name):
            yield f"{name}: True"


def _group_line(index: int, group: Group) -> str:
    count = sum(p.numel() for p in group["params"])
    return (
        f"group {index}: lr {float(group['lr']):g}, betas {tuple(group['betas'])}, "
        f"weight_decay {float(group['weight_decay']):g}, {count:,} numbers"
    )
