"""Lightning: what KFC does, in any logger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import kfc_fx

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "kfc_fx.integrations.lightning needs lightning: pip install 'kfc_fx[trainers]'",
        name=error.name,
    ) from error


class CurvatureMonitor(Callback):
    """Logs the diagnostics of every KFC of a run, and saves its report.

    The numbers of :meth:`kfc_fx.optim.diagnostics.Diagnostics.as_dict` go to all loggers and to
    ``trainer.callback_metrics``, as ``kfc/steps`` and so on; of several KFCs as ``kfc/0/steps``.

    With ``distribute="update"`` the report has the blocks of the first rank.

    Args:
        every: steps between two entries, as ``trainer.global_step`` counts those of all optimizers;
            None for the trainer's ``log_every_n_steps``, of which zero is never.
        report: where :meth:`kfc_fx.KFC.save_report` writes, a JSON file that
            ``kfc-fx inspect MODEL --view run --report FILE`` shows; None for no report. Of several
            KFCs the n-th writes ``FILE-n.json``.

    Raises:
        OptionError: ``every`` is less than one; or, when training starts, no optimizer is a KFC.
    """

    def __init__(self, every: int | None = None, report: str | Path | None = None) -> None:
        if every is not None and every < 1:
            raise kfc_fx.OptionError(f"every must be at least 1, got {every}")
        self.every = every
        self.report = None if report is None else Path(report)
        self._last = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """That there is something to log."""
        self._last = trainer.global_step
        if not list(_optimizers(trainer)):
            names = ", ".join(type(own).__name__ for own in trainer.optimizers) or "none"
            raise kfc_fx.OptionError(
                f"CurvatureMonitor found no kfc_fx.KFC among the optimizers: {names}"
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log after every so many steps of the optimizer, each once."""
        step = trainer.global_step
        every: int = self.every or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or step // every == self._last // every:
            return
        self._last = step
        found = list(_optimizers(trainer))
        numbers: dict[str, float] = {}
        for place, own in enumerate(found):
            prefix = "kfc" if len(found) == 1 else f"kfc/{place}"
            numbers |= {f"{prefix}/{n}": value for n, value in own.diagnostics.as_dict().items()}
        trainer.callback_metrics.update({n: torch.tensor(value) for n, value in numbers.items()})
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        if self.report is not None and trainer.is_global_zero:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if loss is not None and pl_module.automatic_optimization:
                loss = loss * trainer.accumulate_grad_batches  # by which Lightning has divided it
            self._save(found, loss)

    def _save(self, found: list[kfc_fx.KFC], loss: Any) -> None:
        assert self.report is not None
        for place, own in enumerate(found):
            path = self.report
            if len(found) > 1:
                path = path.with_name(f"{path.stem}-{place}{path.suffix}")
            path.parent.mkdir(parents=True, exist_ok=True)
            own.save_report(path, loss=loss)


def _optimizers(trainer: Trainer) -> Iterator[kfc_fx.KFC]:
    for own in trainer.optimizers:
        inner = getattr(own, "optimizer", own)
        if isinstance(inner, kfc_fx.KFC):
            yield inner
