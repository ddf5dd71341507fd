"""What the compiler made, as artefacts of torch's structured trace.

``TORCH_TRACE=folder`` records them and ``tlparse`` shows them beside dynamo's own.
"""

from __future__ import annotations

from collections.abc import Callable

from torch._logging._internal import trace_structured


def record_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to the trace; ``text`` is called only where a trace is recorded."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"kfc_fx_{name}", "encoding": "string"},
        payload_fn=text,
    )
