"""What a row of the zoo's transformers is made of, and the sizes that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A model class, its configuration, and the kind of call that it takes."""

    family: str
    model: str
    config: str
    call: str
    options: dict[str, Any] = field(default_factory=dict)
    image: int = 32
    likelihood: str = "categorical"


WIDTHS = {"hidden_size": 32, "intermediate_size": 37}
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0}
