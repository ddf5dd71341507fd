"""KFC for PyTorch: compile an existing model so that it trains by approximate natural gradient."""

from kfc_fx.compile import CompiledModel, compile

__version__ = "0.1.0"

__all__ = ["CompiledModel", "compile"]
