"""Messages that a model gives: in its graph, and as an uncompiled model gives them."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kfc_fx

plain = logging.getLogger("tests.messages.plain")


class OwnLogger(logging.Logger):
    """A logger that adds to its messages, which none but its own method knows."""

    def _log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        super()._log(level, f"own: {msg}", *args, **kwargs)


@functools.cache
def warning_once(self: logging.Logger, *args: Any) -> None:
    self.warning(*args)


def own_logger() -> logging.Logger:
    logging.setLoggerClass(OwnLogger)
    try:
        return logging.getLogger("tests.messages.own")
    finally:
        logging.setLoggerClass(logging.Logger)


own = own_logger()
unknown = logging.Logger("tests.messages.unknown")
unknown.parent = logging.root


def deep_warning() -> None:
    warnings.warn("deep", DeprecationWarning, stacklevel=2)


def say_once(x: torch.Tensor) -> None:
    plain.warning_once("but once")  # type: ignore[attr-defined]


def says_levels(x: torch.Tensor) -> None:
    plain.debug("not heard")
    plain.info("values %d of %s", 3, "many")
    plain.error("bad")


IN_GRAPH: dict[str, Callable[[torch.Tensor], None]] = {
    "levels": says_levels,
    "once": say_once,
    "once with values": lambda x: plain.warning_once("but %s", "once"),  # type: ignore[attr-defined]
    "warning": lambda x: warnings.warn("plain warning", stacklevel=1),
    "warning of a kind": lambda x: warnings.warn("of a kind", FutureWarning, stacklevel=1),
    "caller's warning": lambda x: deep_warning(),
}
OUTSIDE: dict[str, Callable[[torch.Tensor], None]] = {
    "of a size": lambda x: plain.warning("batch of %d", x.shape[0]),
    "formatted": lambda x: plain.warning(f"batch of {x.shape[0]}"),
    "of a value": lambda x: plain.warning("zero %s", x.detach().sum() * 0),
    "with keywords": lambda x: plain.warning("here", stacklevel=2),
    "own logger": lambda x: own.warning("as it says"),
    "unknown logger": lambda x: unknown.warning("kept apart"),
    "instance": lambda x: warnings.warn(UserWarning("as an object"), stacklevel=1),
    "kind by its name": lambda x: warnings.warn("named", category=FutureWarning, stacklevel=1),
    "own kind": lambda x: warnings.warn("of a kind", ResourceWarning, stacklevel=1),
}


class Speaker(nn.Module):
    def __init__(self, say: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.first, self.second, self.say = nn.Linear(3, 4), nn.Linear(4, 2), say

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        self.say(hidden)
        return self.second(hidden)


class Around(nn.Module):
    """A frame around a model, in which the message comes at the end of the call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 1


@pytest.fixture(autouse=True)
def loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.Logger, "warning_once", warning_once, raising=False)
    warning_once.cache_clear()
    plain.setLevel(logging.INFO)


def said(
    train: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> tuple[list[Any], list[Any]]:
    """What is logged and warned meanwhile, with its place and the values it is formatted with."""
    caplog.clear()
    globals().pop("__warningregistry__", None)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        train()
    logged = [
        (r.name, r.levelno, r.getMessage(), r.pathname, r.lineno, r.funcName)
        for r in caplog.records
        if "messages" in r.name
    ]
    ours = [w for w in warned if w.filename == __file__]
    return logged, [(str(w.message), w.category, w.filename, w.lineno) for w in ours]


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for size in (5, 7, 5):
        optimizer.zero_grad()
        model(torch.ones(size, 3)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("backend", "name"),
    [*(("eager", name) for name in (*IN_GRAPH, *OUTSIDE)),
     *(("aot_eager", name) for name in ("levels", "once", "warning", "of a size"))],
)  # fmt: skip
def test_a_compiled_model_says_what_the_model_says(
    backend: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Around(Speaker((IN_GRAPH | OUTSIDE)[name]))
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    logged, warned = said(lambda: train(model, sgd), caplog)
    assert logged or warned
    warning_once.cache_clear()
    compiled = kfc_fx.compile(model, backend=backend)
    kfc = kfc_fx.KFC(compiled, statistics=kfc_fx.Statistics(every=2))
    found = said(lambda: train(compiled, kfc), caplog)
    if backend == "eager":
        assert found == (logged, warned)
    else:  # the places are those of dynamo's functions behind a break
        assert [m[:3] for m in found[0]] == [m[:3] for m in logged]
        assert set(found[1]) == set(warned)


@pytest.mark.parametrize("name", IN_GRAPH)
def test_a_message_of_constants_breaks_no_graph(name: str) -> None:
    compiled = kfc_fx.compile(Around(Around(Speaker(IN_GRAPH[name]))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(torch.ones(5, 3)).sum().backward()
    assert len(compiled.kfc.graphs) == 1
    assert len(compiled.kfc.plan.blocks) == 2


def test_a_message_that_names_a_size_makes_no_graph_of_that_size_alone() -> None:
    compiled = kfc_fx.compile(Speaker(lambda x: plain.warning(f"a batch of {x.shape[0]}")))
    for size in range(3, 12):
        compiled(torch.ones(size, 3)).sum().backward()
    assert len([g for g in compiled.kfc.graphs if g.parameter_positions]) <= 4


class Breaking(nn.Module):
    """Frames in which a message stands alone, on both sides of a break."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain.info("before")
        print(end="")
        x = self.linear(x)
        print(end="")
        plain.info("behind")
        return x


class Looped(nn.Module):
    """A layer that speaks, called several times, or once more in a backward pass."""

    def __init__(self, times: int = 1, *, again: bool = False, loud: bool = True) -> None:
        super().__init__()
        self.linear, self.times, self.again, self.loud = nn.Linear(3, 3), times, again, loud

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        if self.loud:
            plain.info("layer")
        return self.linear(x).tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.loud = not self.loud or self.times > 1 or self.again
        for _ in range(self.times):
            x = checkpoint(self.layer, x, use_reentrant=False) if self.again else self.layer(x)
        return x


@pytest.mark.parametrize(
    "make",
    [Breaking, lambda: Looped(3), lambda: Looped(again=True), lambda: Looped(loud=False)],
    ids=["alone", "in a loop", "checkpointed", "by turns"],
)
def test_each_call_of_each_place_is_heard(make, caplog: pytest.LogCaptureFixture) -> None:
    def calls(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
        def all_calls() -> None:
            train(model, optimizer)
            with torch.no_grad():
                model(torch.ones(5, 3))
            plain.setLevel(logging.ERROR)
            model(torch.ones(5, 3))
            plain.setLevel(logging.INFO)

        return said(all_calls, caplog)[0]

    model = make()
    expected = calls(model, torch.optim.SGD(model.parameters(), 0.01))
    assert expected
    compiled = kfc_fx.compile(make())
    # Sampled targets have a backward pass of their own, in which a checkpoint runs once more.
    statistics = kfc_fx.Statistics(every=2, fisher="empirical")
    assert calls(compiled, kfc_fx.KFC(compiled, statistics=statistics)) == expected


def test_messages_stand_between_the_operations_that_they_stand_between(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A message before an operation that fails is given, the one behind it is not."""

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            plain.warning("before")
            x = self.linear(x)[index]
            plain.warning("behind")
            return x

    compiled = kfc_fx.compile(Fails())
    compiled(torch.ones(5, 3), torch.tensor([0, 4])).sum().backward()
    caplog.clear()
    with pytest.raises(IndexError):
        compiled(torch.ones(5, 3), torch.tensor([0, 5]))
    assert [r.getMessage() for r in caplog.records if r.name == plain.name] == ["before"]


def test_models_that_end_in_another_order_leave_no_permission() -> None:
    """Messages are nodes while the innermost model lets them, and dynamo's own code stays."""
    from kfc_fx.capture.dynamo import dynamo_settings
    from kfc_fx.capture.messages import messages_captured

    assert not messages_captured
    first, second, third = (dynamo_settings(b) for b in ("eager", "aot_eager", "eager"))
    first.__enter__()
    assert messages_captured
    second.__enter__()
    assert not messages_captured
    third.__enter__()
    first.__exit__(None, None, None)
    assert messages_captured
    third.__exit__(None, None, None)
    assert not messages_captured
    second.__exit__(None, None, None)
    assert not messages_captured
