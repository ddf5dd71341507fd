"""``kfc_fx.compile``: puts what the compiler knows on a model, in place."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from kfc_fx.capture.wrappers import unwrapped
from kfc_fx.compilation import Compilation, CompileOptions
from kfc_fx.compilation.options import BatchDim
from kfc_fx.errors import OptionError, warn
from kfc_fx.plan.sharing import SharingOption
from kfc_fx.statistics.likelihoods.named import LikelihoodOption

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model,
    *,
    likelihood: LikelihoodOption = "auto",
    backend: str = "eager",
    strict: bool = False,
    norm_layers: bool = True,
    weight_sharing: SharingOption = "expand",
    batch_dim: BatchDim = 0,
) -> Model:
    """Prepare an existing model, in place, for training by KFC. By default it runs eagerly.

    The model stays the object that it was: its class, ``forward``, hooks, parameters and state are
    its own. Its calls are captured from the first one with gradients enabled on, and
    ``model.kfc`` is what the compiler knows of it, a :class:`Compilation`. Deep copies and
    unpickled models are compiled too; a shallow copy is not. Compiling anew with the same options
    changes nothing; with others it begins anew, and an optimizer that was made before no longer
    steps. :func:`uncompile` takes all of it away.

    Args:
        model: any module; of one in ``DistributedDataParallel`` the module inside is compiled.
        likelihood: predictive distribution of the output: ``"categorical"`` (class scores),
            ``"gaussian"`` (unit variance) or ``"bernoulli"`` (logits); or a function from the
            output to the cotangents, of its shape, of one sampled target per example; or one of
            :class:`Categorical`, :class:`Gaussian` and :class:`Bernoulli`, which say more. By
            default it is found from the gradient of the loss, and ``model.kfc.plan`` says what was
            found; one that was named is compared with it.
        backend: what runs the captured graphs: ``"eager"``, ``"aot_eager"`` or ``"inductor"``.
        strict: raise at capture if the weight of a conv or linear call gets no block.
        norm_layers: give the scale and shift of norm layers a block, the exact Fisher matrix of
            each channel's two numbers; without it they are generic.
        weight_sharing: how linear layers treat locations (tokens, pixels) that share their
            weight: ``"expand"`` sums over them as a convolution does, ``"reduce"`` averages the
            inputs and sums the gradients first; or a mapping from globs on block names.
        batch_dim: dimension of the examples in inputs and output: 1 for a model that leads with
            time, as recurrent layers do without ``batch_first``. Two dimensions where they differ,
            of the inputs and of the output: ``(0, 1)`` for the ``[T, N, C]`` of CTC. Where channels
            are not last, as in convolutions, examples come first.

    Returns:
        The model itself.

    Raises:
        OptionError: an option is unknown; or the model is what ``torch.compile`` returned, or has
            an attribute ``kfc`` of its own.
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"kfc_fx.compile takes an nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise OptionError(
            "kfc_fx.compile takes the model itself, not what torch.compile(model) returned, which "
            "traces past it: pass the model, with backend='inductor' for compiled graphs"
        )
    inner = unwrapped(model)
    options = CompileOptions.of(
        likelihood=likelihood,
        backend=backend,
        strict=strict,
        norm_layers=norm_layers,
        weight_sharing=weight_sharing,
        batch_dim=batch_dim,
    )
    known = compilation_of(inner)
    if known is not None and known.options == options and known.runs:
        if not known.installed:
            known.install()
        return model
    if known is not None:
        known.remove()
    elif hasattr(inner, "kfc") and not isinstance(inner.kfc, Compilation):
        raise OptionError(
            f"the model has an attribute 'kfc' of its own, of type {type(inner.kfc).__name__}, and "
            "kfc_fx keeps what it knows there: rename it"
        )
    if _compiled_by_torch(inner):
        warn(
            "model.compile() was called before kfc_fx.compile, which takes its place: the model "
            "runs by kfc_fx's backend now, and kfc_fx.uncompile puts torch's back"
        )
    Compilation(inner, options).install()
    return model


def uncompile(model: Model) -> Model:
    """Take away what :func:`compile` has put on a model, in place; others stay as they are.

    What ``model.compile()`` had put there before is back then. Optimizers that were made for the
    model no longer step.

    Returns:
        The model itself.
    """
    known = compilation_of(unwrapped(model))
    if known is not None:
        known.remove()
    return model


def compilation_of(model: nn.Module) -> Compilation | None:
    """What the compiler knows of a model; None for one that is not compiled."""
    found: Any = vars(model).get("kfc")
    return found if isinstance(found, Compilation) and found.model is model else None


def _compiled_by_torch(model: nn.Module) -> bool:
    return vars(model).get("_compiled_call_impl") is not None
