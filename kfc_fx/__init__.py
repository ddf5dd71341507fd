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
from kfc_fx.optim.kfc import KFC
from kfc_fx.plan.spec import BlockSpec, CurvaturePlan, GenericSpec
from kfc_fx.statistics.likelihood import Bernoulli, Categorical, Gaussian

__version__ = "0.1.0"

__all__ = [
    "KFC",
    "Bernoulli",
    "BlockSpec",
    "CaptureError",
    "Categorical",
    "Compilation",
    "CoverageError",
    "CurvaturePlan",
    "Factors",
    "Gaussian",
    "GenericSpec",
    "KfcError",
    "KfcWarning",
    "OptionError",
    "OutputError",
    "StatisticsError",
    "StepError",
    "compile",
    "uncompile",
]
