"""The generated update as highlighted Python, whole or by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from kfc_fx.errors import TargetError, did_you_mean
from kfc_fx.inspect.graph_view import highlighted
from kfc_fx.inspect.quantities import count_text
from kfc_fx.inspect.update_text import Proof


def whole_update(update: Mapping[str, str]) -> str:
    """The text of the module: what stands before the functions, and every function."""
    functions = [text for name, text in update.items() if name != "preamble" and text]
    return update["preamble"] + "\n\n".join(functions)


def update_view(document: Mapping[str, Any], part: str | None = None) -> Text:
    """The whole text, or one function.

    Raises:
        TargetError: there is no such part; the message has the nearest name.
    """
    update = document["update"]
    if part is None:
        if not whole_update(update):
            raise TargetError("no parameter of the model has a block, so there is no update")
        return highlighted(whole_update(update))
    known = [name for name, text in update.items() if name != "preamble" and text]
    if part not in known:
        raise TargetError(
            f"unknown part {part!r}{did_you_mean(part, known)}; there are: "
            f"{', '.join(known) or 'none'}"
        )
    return highlighted(update[part])


def proof_view(proof: Proof) -> Text:
    """What the proof found, in one line."""
    if proof.different:
        return Text.assemble(
            ("different: ", "bold red"),
            f"the printed source and the engine disagree on {', '.join(proof.different)}",
        )
    return Text.assemble(
        ("equal: ", "bold green"),
        f"one step of the printed source and one of the engine leave all {proof.parameters} "
        f"parameters ({count_text(proof.numbers)} numbers) the same, bit for bit; "
        f"{proof.changed} of them moved",
    )
