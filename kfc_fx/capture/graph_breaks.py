"""Where Python runs between the graphs, and why: what dynamo said when it captured the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

NESTED = "*** While handling this graph break"
"""What dynamo writes between the first cause of a break and what came of it."""

ADDRESS = re.compile(r" ?(at |id=)?0x[0-9a-f]+")
"""What differs from one run of a program to the next."""

RESUMED = "torch_dynamo_resume_in_"
"""How dynamo names what is left of a frame after a break."""


Frame = tuple[str, str, int]
"""A Python function by its code: file, name, first line."""


@dataclass(frozen=True)
class GraphBreak:
    """One place where dynamo ended a graph, or gave up a whole frame.

    ``skipped`` says which: the frame of a function that is skipped runs as plain Python, and what
    it calls is captured for itself; after an ordinary break the rest of the frame is a graph again.
    """

    reason: str
    file: str
    line: int
    """Of the source line that dynamo could not follow."""
    frame: Frame
    skipped: bool

    @property
    def place(self) -> str:
        """``net.py:12``."""
        return f"{self.file}:{self.line}"

    @property
    def function(self) -> str:
        """``forward``; where it is skipped, with the line that it begins at."""
        file, function, first_line = self.frame
        return f"{function} ({file}:{first_line})" if self.skipped else function

    def __str__(self) -> str:
        what = "runs as plain Python" if self.skipped else "goes on in a graph of its own"
        return f"{self.function} {what} since {self.place}: {self.reason}"


_given_up: dict[Frame, GraphBreak] = {}
"""Frames that dynamo skips in this process, with its reason: it says that once, and skips the frame
for every model from then on."""


class BreakLog:
    """Collects the breaks of one model while its frames are compiled."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], GraphBreak] = {}
        self._seen: object = None
        # Dynamo calls back while it may look at every frame, and would compile this one.
        self._callback = torch._dynamo.disable(self._note_failures)
        self._frames: dict[str, tuple[Frame, bool]] = {}
        self._stand_ins: dict[str, Frame] = {}

    @property
    def breaks(self) -> tuple[GraphBreak, ...]:
        """In the order in which dynamo met them, each place once."""
        return tuple(self._found.values())

    def forget_all_but(self, kept: tuple[GraphBreak, ...]) -> None:
        """Leave only those that were there before."""
        for found in self._found.values():
            if found not in kept:
                _given_up.pop(found.frame, None)
        self._found = {place: found for place, found in self._found.items() if found in kept}

    def recall(self, frames: Iterable[Frame]) -> None:
        """Add those of the frames that dynamo skips because of what another model met in them."""
        known = {found.frame for found in self._found.values() if found.skipped}
        for frame in frames:
            if frame in _given_up and frame not in known:
                self._add(_given_up[frame])

    def stands_for(self, name: str, forward: Callable[..., Any]) -> None:
        """Speak of a forward method where dynamo gives up the function that calls it.

        Args:
            name: of the function.
        """
        if (frame := frame_of(forward)) is not None:
            self._stand_ins[name] = frame

    def note_graph(self, module: fx.GraphModule) -> None:
        """Keep why a captured graph ends where it does."""
        ended = getattr(module, "compile_subgraph_reason", None)
        if ended is None or not getattr(ended, "graph_break", False) or not ended.user_stack:
            return
        at = ended.user_stack[-1]
        frame = (at.filename, _function(at.name), 0)
        self._add(GraphBreak(_in_short(ended.reason), at.filename, at.lineno, frame, False))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, frames that dynamo gives up are noted."""
        handler = torch._dynamo.callback.callback_handler
        if self._callback in handler.end_callbacks:
            yield  # a call of the model within a call of the model
            return
        self._seen = _last_compilation()
        handler.register_end_callback(self._callback)
        try:
            yield
        finally:
            handler.remove_end_callback(self._callback)
            self._callback()

    def _note_failures(self, *_: object) -> None:
        """Those among the compilations since the last look."""
        if _last_compilation() is self._seen:
            return
        new: list[Any] = []
        for compilation in reversed(torch._dynamo.utils.get_compilation_metrics()):
            if compilation is self._seen:
                break
            new.append(compilation)
        for compilation in reversed(new):
            frame, shared = self._frame_of(compilation)
            if compilation.fail_reason and frame is not None:
                found = _skipped_frame(compilation, frame)
                self._add(found)
                if shared:
                    _given_up[frame] = found
        self._seen = new[0] if new else self._seen

    def _frame_of(self, compilation: Any) -> tuple[Frame | None, bool]:
        """The frame of a compilation, and whether other models have it too.

        One that was compiled too often is named by those before.
        """
        number = str(compilation.compile_id or "").partition("/")[0]
        if compilation.co_filename:
            name = compilation.co_name or "?"
            own = (compilation.co_filename, _function(name), compilation.co_firstlineno or 0)
            self._frames[number] = (self._stand_ins.get(name, own), name not in self._stand_ins)
        return self._frames.get(number, (None, False))

    def _add(self, found: GraphBreak) -> None:
        place = (found.frame, found.skipped) if found.skipped else (found.file, found.line)
        self._found[place] = found


def frame_of(forward: Callable[..., Any]) -> Frame | None:
    """The frame of a forward method, or of a module's; None for what is no Python function."""
    method = forward if hasattr(forward, "__code__") else getattr(forward, "forward", None)
    code = getattr(method, "__code__", None)
    return None if code is None else (code.co_filename, code.co_name, code.co_firstlineno)


def _function(name: str) -> str:
    """The name of a function, also where it is that of what is left of it."""
    return name.removeprefix(RESUMED).partition("_at_")[0] if name.startswith(RESUMED) else name


def _last_compilation() -> object:
    kept = torch._dynamo.utils._compilation_metrics
    return kept[-1] if kept else None


def _skipped_frame(compilation: Any, frame: Frame) -> GraphBreak:
    reason = _in_short(compilation.fail_reason)
    if compilation.recompile_reason:
        changed = compilation.recompile_reason.partition(": ")[2].partition("  # ")[0].strip()
        reason += f"; what has changed last: {changed}"
    return GraphBreak(
        reason=reason,
        file=compilation.fail_user_frame_filename or frame[0],
        line=compilation.fail_user_frame_lineno or frame[2],
        frame=frame,
        skipped=True,
    )


def _in_short(reason: str) -> str:
    """Each cause with its explanation, in one line."""
    causes = filter(None, map(_cause, reason.split(NESTED)))
    return ADDRESS.sub("", "; ".join(causes))


def _cause(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()]
    lines = [line for line in lines if line and not line.endswith("occurred: ***")]
    if not lines:
        return ""
    explained = [line for line in lines if line.startswith("Explanation: ")]
    sentence = explained[0].removeprefix("Explanation: ") if explained else ""
    detail = sentence.partition(". ")[0].rstrip(".")
    return f"{lines[0].rstrip('.')}: {detail}" if detail else lines[0].rstrip(".")
