"""A likelihood that the user writes as one function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfc_fx.errors import OptionError
from kfc_fx.statistics.likelihoods.likelihood import BatchOfPredictions, gram

CotangentFunction = Callable[[Tensor], Tensor]


class SampledCotangents(BatchOfPredictions):
    """A user's function from the output to the per-example cotangents of one sampled target."""

    def __init__(self, function: CotangentFunction) -> None:
        super().__init__()
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

    def scale(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """Not defined for a function of the output alone."""
        raise OptionError(
            "fisher='empirical' is not defined for a likelihood function, which knows no targets; "
            "use fisher='sampled'"
        )

    def curvature(self, output: Tensor, tangents: Tensor) -> Tensor:
        """One-sample estimate ``Σ_n (cₙᵀsₙ)(cₙᵀtₙ)``, of tangents s and t."""
        cotangent = self.sampled_cotangent(output, None)
        inner = cotangent * tangents
        return gram(inner.flatten(2).sum(2) if inner.dim() > 2 else inner)

    def as_dict(self) -> dict[str, object]:
        """A function is the program's, and no state stands for it."""
        return {}

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))
