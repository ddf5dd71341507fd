"""Likelihoods by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfc_fx.errors import OptionError
from kfc_fx.statistics.likelihoods.bernoulli import Bernoulli
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.likelihoods.function import CotangentFunction, SampledCotangents
from kfc_fx.statistics.likelihoods.gaussian import Gaussian
from kfc_fx.statistics.likelihoods.likelihood import Likelihood

LikelihoodOption = str | Likelihood | CotangentFunction

NAMED: dict[str, type[Categorical] | type[Gaussian] | type[Bernoulli]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
}
NAMES = ("auto", *NAMED)


def named_likelihood(option: LikelihoodOption) -> Likelihood | None:
    """A likelihood from its name, from an object that is one, or from a function; None for "auto".

    Raises:
        OptionError: an unknown name, or something that is neither.
    """
    if isinstance(option, str):
        if option not in NAMES:
            raise OptionError(
                f"likelihood must be one of {', '.join(NAMES)}, or a function from the output to "
                f"per-example cotangents; got {option!r}"
            )
        return NAMED[option]() if option in NAMED else None
    if hasattr(option, "sampled_cotangent"):
        return option  # type: ignore[return-value]
    if callable(option) and not isinstance(option, type):
        return SampledCotangents(option)
    raise OptionError(
        f"likelihood must be one of {', '.join(NAMES)}, or a function; got {type(option).__name__}"
    )


def likelihood_from(state: Mapping[str, Any]) -> Likelihood:
    """The likelihood that :meth:`Likelihood.as_dict` stands for."""
    options = dict(state)
    return NAMED[options.pop("name")](**options)
