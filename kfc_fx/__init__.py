"""KFC for PyTorch: compile an existing model so that it trains by approximate natural gradient."""

from kfc_fx.compilation import Compilation
from kfc_fx.engine.factors import Factors
from kfc_fx.errors import (
    CaptureError,
    CoverageError,
    KfcError,
    KfcWarning,
    OptionError,
    OutputError,
    StatisticsError,
    StepError,
)
from kfc_fx.install import compile, uncompile
from kfc_fx.optim.generic import GenericAdamW, GenericSGD
from kfc_fx.optim.kfc import KFC
from kfc_fx.optim.scalings.adam import Adam
from kfc_fx.optim.scalings.eigen import Eigen
from kfc_fx.optim.scalings.inverse import Inverse
from kfc_fx.optim.scalings.spectral import Spectral
from kfc_fx.optim.statistics import Statistics
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan, GenericSpec
from kfc_fx.statistics.likelihoods.bernoulli import Bernoulli
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.likelihoods.gaussian import Gaussian

__version__ = "0.1.0"

__all__ = [
    "KFC",
    "Adam",
    "Bernoulli",
    "BlockSpec",
    "CaptureError",
    "Categorical",
    "Compilation",
    "CoverageError",
    "CurvaturePlan",
    "Eigen",
    "Factors",
    "Gaussian",
    "GenericAdamW",
    "GenericSGD",
    "GenericSpec",
    "Inverse",
    "KfcError",
    "KfcWarning",
    "OptionError",
    "OutputError",
    "Spectral",
    "Statistics",
    "StatisticsError",
    "StepError",
    "compile",
    "uncompile",
]
