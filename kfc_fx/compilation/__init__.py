"""What the compiler knows of one model: capture, plan, and the graphs that emit."""

from kfc_fx.compilation.compilation import Compilation
from kfc_fx.compilation.options import CompileOptions

__all__ = ["Compilation", "CompileOptions"]
