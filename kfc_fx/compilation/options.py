"""How a model is compiled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kfc_fx.capture.dynamo import check_backend
from kfc_fx.errors import OptionError
from kfc_fx.plan.sharing import SharingOption, check_sharing
from kfc_fx.statistics.likelihoods.likelihood import Likelihood
from kfc_fx.statistics.likelihoods.named import LikelihoodOption, named_likelihood


@dataclass(frozen=True)
class CompileOptions:
    """The options of :func:`kfc_fx.compile`, checked. Equal options compile a model alike."""

    given_likelihood: LikelihoodOption
    """As the user named it; :attr:`likelihood` is what it means."""
    likelihood: Likelihood | None = field(compare=False)
    """None where it is found from the loss."""
    backend: str
    strict: bool
    norm_layers: bool
    weight_sharing: SharingOption
    batch_dim: int

    @classmethod
    def of(
        cls,
        *,
        likelihood: LikelihoodOption,
        backend: str,
        strict: bool,
        norm_layers: bool,
        weight_sharing: SharingOption,
        batch_dim: int,
    ) -> CompileOptions:
        """Check the options.

        Raises:
            OptionError: an unknown likelihood, backend or weight_sharing, or another batch_dim
                than 0.
        """
        check_backend(backend)
        check_sharing(weight_sharing)
        for name, value in (("strict", strict), ("norm_layers", norm_layers)):
            if not isinstance(value, bool):
                raise OptionError(f"{name} must be True or False, got {value!r}")
        if isinstance(batch_dim, bool) or batch_dim != 0:
            raise OptionError(
                f"batch_dim must be 0, got {batch_dim!r}: examples come first in the input and in "
                "the output; put the model into a module whose forward transposes both"
            )
        shared = weight_sharing if isinstance(weight_sharing, str) else dict(weight_sharing)
        resolved = named_likelihood(likelihood)
        return cls(likelihood, resolved, backend, strict, norm_layers, shared, batch_dim)

    def as_given(self) -> dict[str, Any]:
        """The arguments of :meth:`of`."""
        return {
            "likelihood": self.given_likelihood,
            "backend": self.backend,
            "strict": self.strict,
            "norm_layers": self.norm_layers,
            "weight_sharing": self.weight_sharing,
            "batch_dim": self.batch_dim,
        }
