"""What the compiler knows of one model: capture, plan, and the graphs that emit."""

from kfc_fx.compilation.compilation import Compilation, CompileOptions, FormsOf

__all__ = ["Compilation", "CompileOptions", "FormsOf"]
