"""How a model is compiled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kfc_fx.capture.dynamo import check_backend
from kfc_fx.errors import OptionError
from kfc_fx.plan.sharing import SharingOption, check_sharing
from kfc_fx.statistics.likelihoods.likelihood import Likelihood
from kfc_fx.statistics.likelihoods.named import LikelihoodOption, named_likelihood

BatchDim = int | tuple[int, int]


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
    batch_dim: BatchDim
    """Dimension of the examples in inputs and output, or one of inputs and one of the output."""

    @classmethod
    def of(
        cls,
        *,
        likelihood: LikelihoodOption,
        backend: str,
        strict: bool,
        norm_layers: bool,
        weight_sharing: SharingOption,
        batch_dim: BatchDim,
    ) -> CompileOptions:
        """Check the options.

        Raises:
            OptionError: an unknown likelihood, backend or weight_sharing, or a batch_dim that is
                no dimension.
        """
        check_backend(backend)
        check_sharing(weight_sharing)
        for name, value in (("strict", strict), ("norm_layers", norm_layers)):
            if not isinstance(value, bool):
                raise OptionError(f"{name} must be True or False, got {value!r}")
        dims = (batch_dim, batch_dim) if isinstance(batch_dim, int) else batch_dim
        if not (
            isinstance(dims, tuple)
            and len(dims) == 2
            and all(isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0 for dim in dims)
        ):
            raise OptionError(
                "batch_dim must be the dimension of the examples, counted from 0, or two of them, "
                f"of the inputs and of the output; got {batch_dim!r}"
            )
        shared = weight_sharing if isinstance(weight_sharing, str) else dict(weight_sharing)
        resolved = named_likelihood(likelihood)
        return cls(likelihood, resolved, backend, strict, norm_layers, shared, batch_dim)

    @property
    def batch_dims(self) -> tuple[int, int]:
        """Dimension of the examples in the inputs and in the output."""
        given = self.batch_dim
        return (given, given) if isinstance(given, int) else given

    @property
    def input_batch_dim(self) -> int:
        """Dimension of the examples in the inputs."""
        return self.batch_dims[0]

    @property
    def output_batch_dim(self) -> int:
        """Dimension of the examples in the output."""
        return self.batch_dims[1]

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
