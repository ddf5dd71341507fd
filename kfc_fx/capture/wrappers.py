"""Wrappers of ``torch.distributed`` around a model."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from kfc_fx.errors import OptionError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``DistributedDataParallel``, or the model itself.

    Raises:
        OptionError: a module is wrapped in ``FullyShardedDataParallel``, whose parameters are flat
            pieces of several layers.
    """
    sharded = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    if sharded is not None and any(isinstance(module, sharded) for module in model.modules()):
        raise OptionError(
            "FullyShardedDataParallel makes flat parameters of several layers, which have no "
            "Kronecker factors: use fully_shard on the same modules, or DistributedDataParallel"
        )
    replicated = _loaded("torch.nn.parallel", "DistributedDataParallel")
    if replicated is not None and isinstance(model, replicated):
        inner: nn.Module = model.module
        return inner
    return model


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Raise :class:`OptionError` for parameters that are distributed by something else than
    ``fully_shard``, as by ``parallelize_module``: their modules compute with their parts."""
    distributed = _loaded("torch.distributed.tensor", "DTensor")
    if distributed is None:
        return
    fully_sharded = _loaded("torch.distributed.fsdp", "FSDPModule")
    kinds = () if fully_sharded is None else (fully_sharded,)
    roots = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    for name, parameter in model.named_parameters():
        covered = any(not path or name.startswith(f"{path}.") for path in roots)
        if isinstance(parameter, distributed) and not covered:
            raise OptionError(
                f"{name} is a DTensor that fully_shard has not made, as parallelize_module makes "
                "them for tensor parallelism, which KFC does not train: use fully_shard or "
                "DistributedDataParallel"
            )


def reshard(model: nn.Module) -> None:
    """Let every module that ``fully_shard`` has sharded hold its shards: after a forward pass
    without a backward pass the root still holds whole parameters. No rank waits for another."""
    fully_sharded = _loaded("torch.distributed.fsdp", "FSDPModule")
    if fully_sharded is not None:
        for module in model.modules():
            if isinstance(module, fully_sharded):
                module.reshard()


def refuse_join() -> None:
    """Raise :class:`OptionError` within ``DistributedDataParallel.join``, in which ranks that have
    no batch left are to go on as if they had one."""
    replicated = _loaded("torch.nn.parallel", "DistributedDataParallel")
    active = None if replicated is None else replicated._get_active_ddp_module()
    config = getattr(active, "_join_config", None)
    if config is not None and config.enable:
        raise OptionError(
            "KFC cannot train within the join() of DistributedDataParallel: a rank without a batch "
            "takes no step, and the others wait for its statistics. Give all ranks as many batches "
            "(of any sizes), as DistributedSampler does"
        )


def _loaded(module: str, name: str) -> Any:
    """A class of torch, if anybody has imported its module."""
    return getattr(sys.modules.get(module), name, None)
