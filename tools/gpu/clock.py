"""Two clocks for one call: as the host drives it, and what the device alone needs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from kfc_fx.errors import first_line

REPEATS = 15
WARM_UP = 3
REPLAYS = 20
ROUNDS = 5
MOST_COPIES = 8

Call = Callable[[], object]


class NotCapturedError(RuntimeError):
    """The calls cannot be made a CUDA graph; the message says why."""


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of one call, in milliseconds."""

    median: float
    low: float
    high: float


def host_time(calls: Sequence[Call], device: torch.device) -> Timing:
    """Time of one call in turn, launched from the host, by events of the device.

    Args:
        calls: the same work on different inputs, so that none is still in the cache.
        device: a CUDA device.
    """
    for call, _ in zip(cycle(calls), range(WARM_UP), strict=False):
        call()
    times = []
    for call, _ in zip(cycle(calls), range(REPEATS), strict=False):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end))
    return _timing(times)


def device_time(calls: Sequence[Call], device: torch.device) -> Timing:
    """Time of one call within a CUDA graph of them all, in which the host has no part.

    Args:
        calls, device: as for :func:`host_time`.

    Raises:
        NotCapturedError: a call waits for the device, or cannot be captured for another reason.
    """
    try:
        graph = _captured(calls, device)
    except RuntimeError as error:
        raise NotCapturedError(first_line(error)) from error
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end) / (REPLAYS * len(calls)))
    return _timing(times)


def copies(size: int, device: torch.device) -> int:
    """How many inputs of ``size`` bytes to take in turn, so that the cache holds none of them."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 if size > cache else min(MOST_COPIES, max(2, -(-2 * cache // max(1, size))))


def _captured(calls: Sequence[Call], device: torch.device) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        # A capture that fails leaves the allocator in a state that later measurements would feel.
        refuse_synchronising(calls[0])
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def refuse_synchronising(call: Call) -> None:
    """Make a call in which it is an error that the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _timing(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, low, high)
