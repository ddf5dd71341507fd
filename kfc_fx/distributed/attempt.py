"""What fails on one rank is raised on all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from kfc_fx.distributed.ranks import Ranks
from kfc_fx.errors import StepError


class Attempt:
    """A part of a step that all ranks take, or none: what fails on one is raised on all.

    A rank on which something has failed goes on to the collective that the others are waiting in,
    and says there that it has.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.error: Exception | None = None
        """What has failed here."""
        self.told: bool = False
        """Whether all ranks know that something has failed."""

    @contextmanager
    def local(self) -> Iterator[None]:
        """Keep what the body raises, until :meth:`settle`."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    @property
    def failed(self) -> bool:
        """Whether something has failed here."""
        return self.error is not None

    def raise_own(self) -> None:
        """Raise what has failed here, at the start of a part that cannot go on after it."""
        if self.error is not None:
            raise self.error

    def vote(self) -> None:
        """Learn by a collective whether something has failed on some rank, and :meth:`settle`."""
        flags = self._ranks.gather(torch.tensor([int(self.failed)]))
        self.settle(flags[:, 0].nonzero()[:, 0].tolist())

    def settle(self, failed: Sequence[int]) -> None:
        """Raise on every rank where something has failed on one.

        Args:
            failed: ranks on which it has, as all have learned together.

        Raises:
            StepError: it has on another rank. Where it has on this one, its own error is raised.
        """
        if not failed:
            return
        self.told = True
        texts = self._ranks.gather_objects(_text(self.error))
        if self.error is not None:
            raise self.error
        told = "; ".join(f"rank {rank}: {texts[rank]}" for rank in failed)
        raise StepError(f"the step failed on another rank, and is taken back on all: {told}")


def _text(error: Exception | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"
