"""Counts, bytes and operations as a person reads them."""

from __future__ import annotations


def count_text(number: float) -> str:
    """``11.7 M`` from 11689512; below a thousand the number itself."""
    return _scaled(number, 1000, ("", " k", " M", " G", " T", " P"))


def bytes_text(number: float) -> str:
    """``45.1 MiB``."""
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def share_text(part: float, whole: float) -> str:
    """``12.5%``, or a dash where there is no whole."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def ratio_text(part: float, whole: float) -> str:
    """``1.7x``, or a dash where there is nothing to compare with."""
    return f"{part / whole:.3g}x" if whole else "-"


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(number) < step:
            return f"{number:.0f}{unit}" if unit == units[0] else f"{number:.3g}{unit}"
        number /= step
    return f"{number:.3g}{units[-1]}"
