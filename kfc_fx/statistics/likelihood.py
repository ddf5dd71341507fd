"""Likelihoods: the predictive distribution whose Fisher matrix is approximated.

A *cotangent* is the derivative of the negative log-likelihood of each example with respect to
the model's output, never of a batch mean. Its sign does not matter to Γ, its scale does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kfc_fx.errors import OptionError, OutputError

CotangentFunction = Callable[[Tensor], Tensor]


class Likelihood(Protocol):
    """What the Fisher pass and the exact ν need to know of a predictive distribution."""

    def examples(self, output: Tensor) -> int:
        """Number N of examples in an output; OutputError where it has no example dimension."""

    def sampled_cotangent(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """Cotangent of the output's shape for one target per example drawn from the model."""

    def empirical_cotangent(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Per-example cotangent of the true targets, from the loss's own cotangent."""

    def curvature(self, output: Tensor, tangents: Tensor) -> Tensor:
        """``T F_z Tᵀ`` summed over examples, F_z the Fisher matrix of the output.

        Args:
            tangents: T, k tangents of the output stacked along a leading dimension.

        Returns:
            ``[k, k]``.
        """


class _BatchFirst:
    """Examples along the first dimension of the output."""

    def examples(self, output: Tensor) -> int:
        """See :class:`Likelihood`."""
        if output.dim() == 0:
            raise OutputError(
                "the model's output is a scalar, perhaps a loss: a likelihood needs the prediction "
                "itself; return it, alone or as .logits beside the loss"
            )
        return output.shape[0]


class Categorical(_BatchFirst):
    """Softmax over class scores: ``softmax(z) − onehot(sample)``.

    Args:
        dim: class dimension. By default the last one for outputs of up to three dimensions
            (``[N, classes]``, ``[N, tokens, classes]``), else 1 (``[N, classes, H, W]``).
    """

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim

    def examples(self, output: Tensor) -> int:
        """One for unbatched class scores ``[classes]``, else the first dimension."""
        return 1 if output.dim() == 1 else super().examples(output)

    def sampled_cotangent(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """See :class:`Likelihood`."""
        dim = self._class_dim(output)
        probability = output.softmax(dim)
        # argmax(p / Exp(1)) is categorical in p; unlike multinomial it neither synchronises
        # with the device nor raises on NaN, which the recorder drops by layer.
        noise = torch.empty_like(probability).exponential_(generator=generator)
        target = (probability / noise).argmax(dim, keepdim=True)
        return probability.scatter_add(dim, target, -torch.ones_like(target, dtype=output.dtype))

    def empirical_cotangent(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """The target is the one class whose score the loss pushes up, at whatever scale.

        Holds for cross-entropy with hard targets, any reduction, weights and ignored targets
        (whose cotangent is zero and stays so).
        """
        dim = self._class_dim(output)
        target = cotangent.argmin(dim, keepdim=True)
        counted = (cotangent != 0).any(dim, keepdim=True)
        minus_one = -torch.ones_like(target, dtype=output.dtype)
        return output.softmax(dim).scatter_add(dim, target, minus_one) * counted

    def curvature(self, output: Tensor, tangents: Tensor) -> Tensor:
        """``Σ p s t − (Σ p s)(Σ p t)`` per prediction, of tangents s and t."""
        dim = self._class_dim(output) % output.dim()
        probability = output.softmax(dim)
        means = (probability * tangents).sum(dim + 1, keepdim=True)
        return _gram(probability.sqrt() * (tangents - means))

    def _class_dim(self, output: Tensor) -> int:
        if self.dim is not None:
            return self.dim
        return -1 if output.dim() <= 3 else 1

    def __repr__(self) -> str:
        return "Categorical()" if self.dim is None else f"Categorical(dim={self.dim})"


class Gaussian(_BatchFirst):
    """Unit-variance normal around the output: the cotangent of a sample is standard normal."""

    def sampled_cotangent(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """See :class:`Likelihood`."""
        return torch.empty_like(output).normal_(generator=generator)

    def empirical_cotangent(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Not defined: the loss's cotangent does not tell residuals from the loss's scale."""
        raise OptionError(
            "fisher='empirical' needs targets that can be read off the loss's gradient, which a "
            "gaussian likelihood does not allow; use fisher='sampled'"
        )

    def curvature(self, output: Tensor, tangents: Tensor) -> Tensor:
        """``sᵀt``, of tangents s and t."""
        return _gram(tangents)

    def __repr__(self) -> str:
        return "Gaussian()"


class Bernoulli(_BatchFirst):
    """Independent coins with the output as logits: ``sigmoid(z) − sample``."""

    def sampled_cotangent(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """See :class:`Likelihood`."""
        probability = output.sigmoid()
        uniform = torch.empty_like(output).uniform_(generator=generator)
        return probability - (uniform < probability).to(output.dtype)

    def empirical_cotangent(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """The target is one where the loss pushes the logit up, at whatever scale."""
        return (output.sigmoid() - (cotangent < 0).to(output.dtype)) * (cotangent != 0)

    def curvature(self, output: Tensor, tangents: Tensor) -> Tensor:
        """``Σ p(1−p) s t``, of tangents s and t."""
        probability = output.sigmoid()
        return _gram((probability * (1 - probability)).sqrt() * tangents)

    def __repr__(self) -> str:
        return "Bernoulli()"


class SampledCotangents(_BatchFirst):
    """A user's function from the output to the per-example cotangents of one sampled target."""

    def __init__(self, function: CotangentFunction) -> None:
        self.function = function

    def sampled_cotangent(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """The function's value, checked.

        Raises:
            OptionError: it is not a tensor of the output's shape.
        """
        cotangent = self.function(output)
        if not isinstance(cotangent, Tensor) or cotangent.shape != output.shape:
            found = tuple(cotangent.shape) if isinstance(cotangent, Tensor) else type(cotangent)
            raise OptionError(
                f"the likelihood function must return cotangents of the output's shape "
                f"{tuple(output.shape)}; it returned {found}"
            )
        return cotangent.detach()

    def empirical_cotangent(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Not defined for a function of the output alone."""
        raise OptionError(
            "fisher='empirical' is not defined for a likelihood function, which knows no targets; "
            "use fisher='sampled'"
        )

    def curvature(self, output: Tensor, tangents: Tensor) -> Tensor:
        """One-sample estimate ``Σ_n (cₙᵀsₙ)(cₙᵀtₙ)``, of tangents s and t."""
        cotangent = self.sampled_cotangent(output, None)
        return _gram((cotangent * tangents).flatten(2).sum(2))

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def _gram(rows: Tensor) -> Tensor:
    flat = rows.flatten(1)
    return flat @ flat.mT


NAMED: dict[str, type[Categorical] | type[Gaussian] | type[Bernoulli]] = {
    "auto": Categorical,
    "categorical": Categorical,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
}


def resolve_likelihood(option: str | Likelihood | CotangentFunction) -> Likelihood:
    """A likelihood from its name, from an object of this module, or from a function.

    Raises:
        OptionError: an unknown name, or something that is neither.
    """
    if isinstance(option, str):
        if option not in NAMED:
            raise OptionError(
                f"likelihood must be one of {', '.join(NAMED)}, or a function from the output to "
                f"per-example cotangents; got {option!r}"
            )
        return NAMED[option]()
    if hasattr(option, "sampled_cotangent"):
        return option  # type: ignore[return-value]
    if callable(option):
        return SampledCotangents(option)
    raise OptionError(
        f"likelihood must be one of {', '.join(NAMED)}, or a function; got {type(option).__name__}"
    )
