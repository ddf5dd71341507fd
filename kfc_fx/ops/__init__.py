"""Statistics as functional ``torch.library`` ops."""

from kfc_fx.ops import cuda_dispatch as cuda_dispatch  # registers the CUDA implementations
from kfc_fx.ops.grouped_row_gram import grouped_row_gram
from kfc_fx.ops.patch_gram import patch_gram
from kfc_fx.ops.row_gram import row_gram
from kfc_fx.ops.separable_gram import separable_gram

__all__ = [
    "grouped_row_gram",
    "patch_gram",
    "row_gram",
    "separable_gram",
]
