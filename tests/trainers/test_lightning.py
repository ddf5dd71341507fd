"""Lightning: KFC made in ``configure_optimizers``, with what else people configure there."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.distributed.launch import torchrun
from tests.trainers.needed import assert_same, by_hand, loader, needed, network

lightning = needed("lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*num_workers.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.`.*"),
]


class Digits(lightning.LightningModule):
    """A network in a module whose own parameter shifts the output."""

    def __init__(self, make: str = "KFC(self)", schedule: str = "", own: bool = False) -> None:
        super().__init__()
        self.make, self.schedule, self.net = make, schedule, network()
        self.shift = nn.Parameter(torch.zeros(10)) if own else None
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.net(x)
        return output if self.shift is None else output + self.shift

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        # what KFC preconditions is called by another name than the module's own
        call = self.net if self.make == "KFC(self.net)" else self
        loss = F.cross_entropy(call(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if self.make == "compile, then KFC":
            kfc_fx.compile(self)
            opt = kfc_fx.KFC(self.parameters())
        else:
            opt = kfc_fx.KFC(self.net if self.make == "KFC(self.net)" else self)
        schedulers = torch.optim.lr_scheduler
        if self.schedule == "one cycle":
            every_step = schedulers.OneCycleLR(opt, 0.02, total_steps=16)
            return [opt], [{"scheduler": every_step, "interval": "step"}]
        if self.schedule == "cosine":
            return [opt], [schedulers.CosineAnnealingLR(opt, 4)]
        if self.schedule == "plateau":
            plateau = schedulers.ReduceLROnPlateau(opt)
            return {"optimizer": opt, "lr_scheduler": plateau, "monitor": "val_loss"}
        return opt


def fit(module: Digits, folder: Any, epochs: int = 2, **options: Any) -> Any:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {**dict.fromkeys(off, False), **options}
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=str(folder), **options
    )
    trainer.fit(module, loader(), loader(32))
    return trainer


@pytest.mark.parametrize("make", ["KFC(self)", "compile, then KFC", "KFC(self.net)"])
def test_a_module_ends_as_by_hand(make, tmp_path):
    module = Digits(make)
    fit(module, tmp_path)
    assert_same(module.net.parameters(), by_hand())


def test_accumulation_and_clipping(tmp_path):
    module = Digits()
    fit(module, tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.5)
    for own, other in zip(module.net.parameters(), by_hand(accumulate=2, clip=0.5), strict=True):
        torch.testing.assert_close(own, other)


def test_parameters_of_its_own(tmp_path):
    module = Digits(own=True)
    fit(module, tmp_path, epochs=4)
    assert module.losses[-1] < module.losses[0] - 0.5
    assert module.shift.abs().max() > 0
    names = [block.name for block in module.kfc.plan.blocks]
    assert names == ["net.0", "net.3"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision, tmp_path):
    module = Digits()
    fit(module, tmp_path, epochs=4, precision=precision)
    assert module.losses[-1] < module.losses[0] - 0.5
    assert len(module.kfc.plan.blocks) == 2


@pytest.mark.parametrize("schedule", ["one cycle", "cosine", "plateau"])
def test_schedules_by_their_defaults(schedule, tmp_path):
    module = Digits(schedule=schedule)
    fit(module, tmp_path, epochs=4)
    assert module.losses[-1] < module.losses[0] - 0.4


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averages_of_weights(name, tmp_path):
    callbacks = lightning.pytorch.callbacks
    options = {"swa_lrs": 1e-3, "swa_epoch_start": 2} if name.startswith("Sto") else {}
    module = Digits()
    fit(module, tmp_path, epochs=4, callbacks=[getattr(callbacks, name)(**options)])
    assert module.losses[-1] < module.losses[0] - 0.4


def test_a_checkpoint_resumes_bit_for_bit(tmp_path):
    whole = Digits()
    trainer = fit(whole, tmp_path, epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    longer = Digits()
    fit(longer, tmp_path, epochs=4)
    resumed = Digits()
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    again = lightning.Trainer(
        max_epochs=4, accelerator="cpu", devices=1, **dict.fromkeys(off, False)
    )  # fmt: skip
    again.fit(resumed, loader(), loader(32), ckpt_path=str(tmp_path / "half.ckpt"))
    assert_same(resumed.parameters(), longer.parameters())


def test_the_monitor_logs_diagnostics_and_saves_the_report(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    from kfc_fx.integrations.lightning import CurvatureMonitor

    monitor = CurvatureMonitor(every=4, report=tmp_path / "run" / "report.json")
    logger = CSVLogger(tmp_path)
    trainer = fit(Digits(), tmp_path, epochs=4, callbacks=[monitor], logger=logger)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    names, *logged = [row.split(",") for row in rows]
    steps = [row[names.index("kfc/steps")] for row in logged]
    assert [float(step) for step in steps if step] == [4, 8, 12, 16]
    assert {"kfc/largest_step", "kfc/statistics_steps", "kfc/seconds_update"} <= set(names)
    assert float(trainer.callback_metrics["kfc/steps"]) == 16
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [entry["step"] for entry in report["steps"]] == [4, 8, 12, 16]
    assert all(entry["loss"] > 0 for entry in report["steps"])


def test_the_monitor_reports_the_loss_of_the_batch_and_each_step_once(tmp_path):
    from kfc_fx.integrations.lightning import CurvatureMonitor

    module, report = Digits(), tmp_path / "report.json"
    monitor = CurvatureMonitor(every=2, report=report)
    fit(module, tmp_path, epochs=2, callbacks=[monitor], accumulate_grad_batches=2)
    entries = json.loads(report.read_text())["steps"]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert [entry["loss"] for entry in entries] == pytest.approx(
        [module.losses[3], module.losses[7]]
    )
    fit(module, tmp_path, epochs=1, callbacks=[CurvatureMonitor()], log_every_n_steps=0)


def test_the_monitor_wants_a_kfc(tmp_path):
    from kfc_fx.integrations.lightning import CurvatureMonitor

    module = Digits()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    with pytest.raises(kfc_fx.OptionError, match=r"no kfc_fx\.KFC among the optimizers: SGD"):
        fit(module, tmp_path, callbacks=[CurvatureMonitor()])
    with pytest.raises(kfc_fx.OptionError, match="every must be at least 1"):
        CurvatureMonitor(every=0)


def test_fabric():
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    net = kfc_fx.compile(network())
    model, opt = fabric.setup(net, kfc_fx.KFC(net))
    for _ in range(2):
        for x, y in fabric.setup_dataloaders(loader()):
            fabric.backward(F.cross_entropy(model(x), y))
            opt.step()
            opt.zero_grad()
    assert_same(net.parameters(), by_hand())


def test_two_ranks():
    printed = torchrun(2, "-m", "tests.trainers.lightning_ranks")
    assert "equal on both ranks after 4 steps" in printed
