"""Messages of a model in captured graphs, where dynamo would break the graph.

A break is dear: dynamo traces every frame around the call up to it once more. A message of
constants depends on no tensor, so it is a node of the graph, given each time where the model gives
it.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX as RESUMED
from torch._dynamo.variables import ConstantVariable, functions, misc

from kfc_fx.capture.permission import Permission

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
ONCE = tuple(f"{level}_once" for level in LEVELS)
"""Methods that libraries add to loggers; what they keep of earlier messages is theirs."""

Place = tuple[str, int, str]
"""The file, line and function that a message comes from."""


messages_captured = Permission()
"""Whether dynamo takes messages of constants to loggers and to ``warnings.warn`` into its graphs.
All others break the graph."""


@fx.has_side_effect
def log(logger: str, level: int, place: Place, message: str, *values: Any) -> None:
    """Give a logger a message from a place in the model.

    Args:
        logger: its name.
        level: one of ``logging``'s.
        place: where the model gives it.
        values: what ``message`` is formatted with.
    """
    to = logging.getLogger(logger)
    if to.isEnabledFor(level):
        file, line, function = place
        to.handle(to.makeRecord(logger, level, file, line, message, values, None, function))


@fx.has_side_effect
def log_once(logger: str, method: str, message: str, *values: Any) -> None:
    """Give a message by a method of a logger that gives each but once."""
    getattr(logging.getLogger(logger), method)(message, *values)


@fx.has_side_effect
def warn(module: str, place: Place, category: str, message: str) -> None:
    """Warn from a place in a module, as often as the filters of ``warnings`` have it.

    Args:
        module: the name of the module, which holds the register of warnings given.
        category: the name of a built-in kind of warning.
    """
    names = vars(sys.modules[module])
    file, line, _ = place
    registry = names.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, KINDS[category], file, line, module, registry)


KINDS = {
    kind.__name__: kind
    for kind in (
        UserWarning,
        DeprecationWarning,
        FutureWarning,
        PendingDeprecationWarning,
        RuntimeWarning,
    )
}


def _logging(own: Any) -> Any:
    """A logger's methods for dynamo, that take messages of constants into the graph."""

    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        texts = _constants(args) if messages_captured else None
        if texts and not kwargs and _general(tx) and _is_plain(self.value, name):
            logger = self.value.name
            if name in ONCE:
                return _record(tx, log_once, logger, name, *texts)
            return _record(tx, log, logger, LEVELS[name], _place(tx), *texts)
        return own(self, tx, name, args, kwargs)

    return call_method


def _warning(own: Any) -> Any:
    """Functions that dynamo does not look into, but ``warnings.warn`` of constants."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if messages_captured and self.value is warnings.warn:
            texts = _constants(args[:1])
            category, caller = _category(args[1:]), _caller(tx, kwargs)
            if texts and category and caller and _general(tx):
                module = caller.f_globals["__name__"]
                return _record(tx, warn, module, _place(caller), category, *texts)
        return own(self, tx, args, kwargs)

    return call_function


def _record(tx: Any, function: Any, *constants: Any) -> ConstantVariable:
    """A node that calls a function with constants; the caller is given None, as by the call."""
    tx.output.create_proxy("call_function", function, constants, {})
    return ConstantVariable.create(None)


def _constants(args: Sequence[Any]) -> tuple[Any, ...] | None:
    """What arguments hold, if the first is a text and the others are texts and numbers."""
    values = []
    for arg in args:
        arg = arg.realize() if hasattr(arg, "realize") else arg
        if not isinstance(arg, ConstantVariable):
            return None
        values.append(arg.as_python_constant())
    plain = all(value is None or type(value) in (str, int, float, bool) for value in values)
    return tuple(values) if plain and values and type(values[0]) is str else None


def _general(tx: Any) -> bool:
    """Whether what is traced so far holds for all sizes that may change. A text that names such a
    size is a constant to dynamo, by which the whole graph would be of that size alone."""
    known = tx.output.shape_env.replacements.values()
    return not tx.export and not any(size.is_Integer for size in known)


def _is_plain(logger: logging.Logger, method: str) -> bool:
    """Whether a logger is found by its name, and this method is the standard one, or says once."""
    known = logging.Logger.manager.loggerDict
    if (logging.root if logger.name == "root" else known.get(logger.name)) is not logger:
        return False
    if method in ONCE:
        return hasattr(logger, method)
    steps = (method, "_log", "handle", "makeRecord", "isEnabledFor")
    return method in LEVELS and all(
        getattr(getattr(logger, step), "__func__", None) is getattr(logging.Logger, step)
        for step in steps
    )


def _place(tx: Any) -> Place:
    """Where a frame that dynamo traces stands, one that goes on behind a break by its own name."""
    behind = re.fullmatch(rf"{RESUMED}_(.+)_at_\d+", tx.f_code.co_name)
    function = behind[1] if behind else tx.f_code.co_name
    return tx.f_code.co_filename, tx.lineno, function


def _category(args: Sequence[Any]) -> str | None:
    """The name of the kind of warning that is asked for behind the text, if it is a known one."""
    if not args:
        return UserWarning.__name__
    kind = args[0].as_python_constant() if args[0].is_python_constant() else None
    return next((name for name, own in KINDS.items() if own is kind and len(args) == 1), None)


def _caller(tx: Any, kwargs: dict[str, Any]) -> Any:
    """The frame that ``warnings.warn`` of a frame speaks of, if its module is known, else None."""
    if set(kwargs) - {"stacklevel"}:
        return None
    given = kwargs.get("stacklevel")
    if given is not None and not given.is_python_constant():
        return None
    level = 1 if given is None else given.as_python_constant()
    for _ in range(level - 1):
        tx = getattr(tx, "parent", None)
    if tx is None:
        return None
    module = sys.modules.get(tx.f_globals.get("__name__", ""))
    return tx if module is not None and vars(module) is tx.f_globals else None


for _kind, _name, _wrap in (
    (misc.LoggingLoggerVariable, "call_method", _logging),
    (functions.SkipFunctionVariable, "call_function", _warning),
):
    setattr(_kind, _name, _wrap(getattr(_kind, _name)))
