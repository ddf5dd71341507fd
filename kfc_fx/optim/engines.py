"""Which engine runs an update: of this process, or of the blocks that this rank owns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.distributed.divided_engine import DividedEngine
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.engine.engine import UpdateEngine
from kfc_fx.engine.state import SavedState
from kfc_fx.engine.step_inputs import Momenta
from kfc_fx.errors import OptionError
from kfc_fx.optim.options import KFCOptions

Engine = UpdateEngine | DividedEngine


def built_engine(
    spec: UpdateSpec,
    saved: SavedState,
    parameters: Mapping[str, Tensor],
    options: KFCOptions,
    momenta: Momenta,
    ranks: Ranks | None,
    owners: Mapping[str, int],
) -> Engine:
    """The engine of a spec.

    Args:
        saved: what it starts from.
        momenta: those of the groups now.
        ranks: that blocks are divided among; None where this process has all of them.
        owners: ranks of blocks that have owners already.

    Raises:
        OptionError: options do not go with where the parameters are, or with divided blocks.
    """
    compiled, graph = options.compile_update, options.cuda_graph
    check_one_device(spec, parameters, compiled=compiled)
    if ranks is not None:
        _refuse_graph(graph)
        return DividedEngine(
            spec, saved, parameters, ranks, owners, compiled=compiled, momenta=momenta
        )
    captured = captures(spec, parameters, graph)
    return UpdateEngine(
        spec, saved, parameters, compiled=compiled, captured=captured, momenta=momenta
    )


def check_one_device(spec: UpdateSpec, parameters: Mapping[str, Tensor], *, compiled: bool) -> None:
    """That a step to be compiled is on one device.

    Raises:
        OptionError: it is not.
    """
    devices = {str(parameters[name].device) for name in spec.parameters}
    if compiled and len(devices) > 1:
        raise OptionError(
            "compile_update needs all parameters on one device, and these are on "
            f"{', '.join(sorted(devices))}; leave it out, or make a KFC for each device"
        )


def _refuse_graph(wanted: bool | None) -> None:
    if wanted:
        raise OptionError(
            "cuda_graph=True: a step that is divided among ranks has a collective in its middle; "
            "use distribute='refresh', or leave it out"
        )


def captures(spec: UpdateSpec, parameters: Mapping[str, Tensor], wanted: bool | None) -> bool:
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
