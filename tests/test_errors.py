"""Warnings stand at the line that called into kfc_fx, and errors are told in one line."""

from __future__ import annotations

import _thread
import functools
import linecache
import time
import warnings

import pytest
import torch
from torch import nn

import kfc_fx
from kfc_fx.errors import KfcWarning, did_you_mean, first_line, warn


def one_step_back() -> tuple[kfc_fx.KFC, nn.Linear]:
    """An optimizer that has taken one step, before one with a gradient that is not finite."""
    model = nn.Linear(3, 2)
    compiled = kfc_fx.compile(model)
    opt = kfc_fx.KFC(compiled, lr=0.1)
    compiled(torch.randn(8, 3)).logsumexp(1).sum().backward()
    opt.step()
    model.weight.grad.fill_(torch.nan)
    return opt, model


def warned_line(seen: pytest.WarningsRecorder) -> str:
    """The one line of this file that was warned at."""
    (warning,) = [entry for entry in seen if entry.category is KfcWarning]
    assert warning.filename == __file__
    return linecache.getline(warning.filename, warning.lineno).strip()


def test_a_warning_is_at_the_line_that_called_step():
    opt, _ = one_step_back()
    with pytest.warns(KfcWarning, match="not finite") as seen:
        opt.step()  # here
    assert warned_line(seen) == "opt.step()  # here"


def test_through_a_scheduler_and_hooks():
    """A scheduler wraps ``step``, and torch wraps it in a profiler's record and hooks."""
    opt, _ = one_step_back()
    torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 1.0)
    opt.register_step_pre_hook(lambda *_: None)
    with pytest.warns(KfcWarning, match="not finite") as seen:
        opt.step()  # scheduled
    assert warned_line(seen) == "opt.step()  # scheduled"


def test_a_wrapper_of_the_users_own_is_the_caller():
    opt, _ = one_step_back()

    def wrapped(function):
        @functools.wraps(function)
        def inner():
            with torch.profiler.record_function("step"):
                return function()  # wrapper

        return inner

    with pytest.warns(KfcWarning, match="not finite") as seen:
        torch.no_grad()(wrapped(opt.step))()
    assert warned_line(seen) == "return function()  # wrapper"


def test_generated_functions_are_no_callers():
    """A function that was made by ``exec`` has no module."""
    generated = {"warn": warn}
    exec("def run(): warn('text')", generated)
    with pytest.warns(KfcWarning) as seen:
        generated["run"]()  # generated
    assert warned_line(seen) == 'generated["run"]()  # generated'


@pytest.mark.filterwarnings("default")
def test_where_all_is_internal_it_is_the_outermost_frame():
    """A thread of torch's own may have nothing else on its stack."""
    namespace = {"warn": warn, "__name__": "torch.somewhere"}
    exec(compile("def run(): warn('text')", "<outermost>", "exec"), namespace)
    with warnings.catch_warnings(record=True) as seen:
        _thread.start_new_thread(namespace["run"], ())
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [entry.filename for entry in seen] == ["<outermost>"]


@pytest.mark.filterwarnings("default")
def test_a_line_warns_of_one_thing_once():
    shown = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("warnings._showwarnmsg", lambda entry: shown.append(str(entry.message)))
        for text in ("first", "first", "second"):
            warn(text)
    assert shown == ["first", "second"]


def test_first_line():
    assert first_line(ValueError("\n  what it is  \nand more")) == "what it is"
    assert first_line(ValueError()) == ""


def test_did_you_mean():
    assert did_you_mean("Adan", ["spectral", "adam"]) == " (did you mean 'adam'?)"
    assert did_you_mean("xyz", ["adam"]) == ""
