"""Ctrl-C at any moment of a step."""

from __future__ import annotations

import _thread
import itertools
import random
import signal
import statistics
import threading
import time

import pytest
import torch
from torch.nn import functional as F

import kfc_fx
from kfc_fx.optim.interrupts import deferred_interrupts
from tests.models import IMAGES, LABELS, conv_network, make, parameters, saved_state

POINTS = 60
"""Random moments for each scaling."""


@pytest.fixture(autouse=True)
def interrupts():
    """Python's own handler, which a process in the background of a shell does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def equal(found: object, expected: object) -> bool:
    """Bit for bit."""
    if isinstance(found, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(equal(found[k], expected[k]) for k in found)
    if isinstance(found, list | tuple):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return found == expected


def state_of(net: torch.nn.Module, opt: kfc_fx.KFC) -> tuple[object, object]:
    saved = saved_state(opt)
    saved["counters"] = {k: v for k, v in saved["counters"].items() if k in COUNTED}
    return parameters(net), saved


COUNTED = ("steps", "statistics_steps", "refreshes")


def start(scaling: str) -> tuple[torch.nn.Module, kfc_fx.KFC]:
    options = {"every": 1, "refresh_every": 1, "fisher": "empirical"}
    return make(conv_network().eval(), scaling=scaling, **options)


def backward(net: torch.nn.Module, opt: kfc_fx.KFC) -> None:
    opt.zero_grad()
    F.cross_entropy(net(IMAGES), LABELS).backward()


@pytest.mark.parametrize("scaling", ["adam", "spectral", "eigen", "inverse"])
def test_an_interrupted_step_was_taken_or_was_not(scaling):
    """And the next one is that of a run that nobody interrupted."""
    net, opt = start(scaling)
    states, seconds = [state_of(net, opt)], []
    for _ in range(POINTS):
        backward(net, opt)
        begun = time.perf_counter()
        opt.step()
        seconds.append(time.perf_counter() - begun)
        states.append(state_of(net, opt))
    net, opt = start(scaling)
    rng, interrupted = random.Random(0), 0
    for before, after in itertools.pairwise(states):
        backward(net, opt)
        delay = rng.uniform(0, 1.5 * statistics.median(seconds))
        timer = threading.Timer(delay, _thread.interrupt_main)
        try:
            timer.start()
            opt.step()
            timer.join()
            time.sleep(0)
        except KeyboardInterrupt:
            interrupted += 1
        found = state_of(net, opt)
        if not equal(found, after):
            assert equal(found[0], before[0])
            backward(net, opt)
            opt.step()
            assert equal(state_of(net, opt), after)
    assert interrupted > POINTS / 2


def test_an_interrupt_waits_and_then_acts():
    seen = []

    def body() -> None:
        with deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
            seen.append(1)

    with pytest.raises(KeyboardInterrupt):
        body()
    assert seen == [1]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # as before


def test_a_second_interrupt_acts_at_once():
    seen = []

    def body() -> None:
        with deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
            seen.append(1)
            signal.raise_signal(signal.SIGINT)
            seen.append(2)

    with pytest.raises(KeyboardInterrupt):
        body()
    assert seen == [1]


def test_handlers_of_the_program_are_its_own():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
            assert not seen
        assert seen == [1]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_step_in_another_thread_holds_nothing():
    net, opt = make(conv_network())
    F.cross_entropy(net(IMAGES), LABELS).backward()
    thread = threading.Thread(target=opt.step)
    thread.start()
    thread.join()
    assert opt.diagnostics.steps == 1
