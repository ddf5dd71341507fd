"""From the text that names a model to the model: ``module:attribute``, a file, a checkpoint."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from kfc_fx.errors import TargetError, did_you_mean, first_line
from kfc_fx.inspect.exported import load_exported

EXPORTED_SUFFIX = ".pt2"


@dataclass(frozen=True)
class Subject:
    """A model that was found, and where its conventions may be looked up."""

    target: str
    model: nn.Module
    example_inputs: tuple[torch.Tensor, ...] | None = None
    """Inputs that came with the model, of a saved program."""

    @property
    def module_name(self) -> str:
        """What stands before the colon."""
        return self.target.rpartition(":")[0]

    @property
    def attribute(self) -> str:
        """What stands after the colon."""
        return self.target.rpartition(":")[2]


def resolve_target(target: str, arguments: Mapping[str, Any] | None = None) -> Subject:
    """Find and, where it is a class or a function, call what ``target`` names.

    Args:
        target: ``package.module:attribute``, ``./file.py:attribute`` (the attribute may be
            dotted), or a program of ``torch.export`` in a ``.pt2`` file.
        arguments: keyword arguments of the call; ``None`` where there is no way to give any.

    Raises:
        TargetError: it does not exist, cannot be imported, built or read, or is no model.
    """
    given = dict(arguments or {})
    if target.endswith(EXPORTED_SUFFIX):
        if given:
            raise TargetError(f"{target} is a saved program: it takes no model arguments")
        model, inputs = load_exported(Path(target))
        return Subject(target, model, inputs)
    module_name, separator, attribute = target.rpartition(":")
    if not (separator and module_name and attribute):
        raise TargetError(
            f"{target!r} names no model: write module:attribute (torchvision.models:resnet18), "
            "./file.py:Name, or a file.pt2 of torch.export"
        )
    found = _attribute(_module(module_name), module_name, attribute)
    hint = "" if arguments is None else "; pass arguments by --model-arg name=value"
    return Subject(target, _model(target, found, given, hint))


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts to keyword arguments; a value is a Python literal, or else a string.

    Raises:
        TargetError: a text has no ``=``.
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not (separator and name.isidentifier()):
            raise TargetError(f"--model-arg {pair!r} must be name=value, as in num_classes=10")
        try:
            arguments[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[name] = text
    return arguments


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a ``state_dict`` into ``model``, with ``weights_only=True``.

    A dictionary that holds it under ``state_dict``, ``model_state_dict`` or ``model`` will do.

    Raises:
        TargetError: the file cannot be read, holds none, or does not fit the model.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TargetError(f"checkpoint {path}: {first_line(error)}") from error
    if not isinstance(saved, Mapping):
        raise TargetError(f"checkpoint {path} holds a {type(saved).__name__}, not a state_dict")
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(saved.get(key), Mapping):
            saved = saved[key]
    own = model.state_dict()
    unexpected = [str(name) for name in saved if name not in own]
    if unexpected:
        raise TargetError(
            f"checkpoint {path}: the model has no {unexpected[0]!r}"
            f"{did_you_mean(unexpected[0], own)}, nor {len(unexpected) - 1} more of its entries"
        )
    missing = [name for name in own if name not in saved]
    if missing:
        raise TargetError(f"checkpoint {path} lacks {len(missing)} entries, {missing[0]!r} first")
    try:
        model.load_state_dict(saved)
    except RuntimeError as error:
        raise TargetError(f"checkpoint {path}: {' '.join(str(error).split())}") from error


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        return _module_of_file(Path(name))
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing != name and not name.startswith(f"{missing}."):
            raise TargetError(f"importing {name!r} fails: {error}") from error
        raise TargetError(
            f"there is no module {missing!r}{did_you_mean(missing, _siblings(missing))}; "
            "is its package installed?"
        ) from error
    except Exception as error:
        raise _import_failure(name, error) from error


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        files = [str(p) for p in sorted(folder.glob("*.py"))] if folder.is_dir() else []
        raise TargetError(f"there is no file {str(path)!r}{did_you_mean(str(path), files)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise _import_failure(str(path), error) from error
    return module


def _siblings(name: str) -> list[str]:
    """Modules that could have been meant: those of the parent package, or the installed ones."""
    parent, separator, _ = name.rpartition(".")
    if not separator:
        return [*importlib.metadata.packages_distributions(), *sys.stdlib_module_names]
    try:
        paths = importlib.import_module(parent).__path__
    except (ImportError, AttributeError):
        return []
    return [f"{parent}.{found.name}" for found in pkgutil.iter_modules(paths)]


def _attribute(module: ModuleType, module_name: str, attribute: str) -> object:
    found: object = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [name for name in vars(found) if not name.startswith("_")]
            raise TargetError(f"{module_name} has no {part!r}{did_you_mean(part, known)}")
        found = getattr(found, part)
    return found


def _model(target: str, found: object, arguments: Mapping[str, Any], hint: str) -> nn.Module:
    if isinstance(found, nn.Module):
        if arguments:
            raise TargetError(f"{target} is a model already: it takes no model arguments")
        return found
    if not callable(found):
        raise TargetError(f"{target} is a {type(found).__name__}, neither a model nor callable")
    try:
        model = found(**arguments)
    except TypeError as error:
        raise TargetError(f"{target}: {error}{hint}") from error
    except Exception as error:
        raise TargetError(
            f"calling {target} fails: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise TargetError(f"{target} returned a {type(model).__name__}, not an nn.Module")
    return model


def _import_failure(name: str, error: Exception) -> TargetError:
    return TargetError(f"importing {name!r} fails: {type(error).__name__}: {first_line(error)}")
