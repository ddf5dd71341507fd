from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfc_fx.tools.data.sets import DataSet
from kfc_fx.tools.train import training_run
from kfc_fx.tools.train.optimizers import OptimizerSpec
from kfc_fx.tools.train.training_run import RunSpec, TrainingRun, learning_rate_scale

SPEC = RunSpec(epochs=3, batch_size=16, seed=5)


def linear(data: DataSet) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, data.classes))


class Recorder(nn.Module):
    """Keeps the training batches that it is called with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(x)
        return self.network(x)


def test_learning_rate_warms_up_stays_and_decays() -> None:
    scales = [learning_rate_scale(step, 100) for step in range(100)]
    assert scales[:3] == [0.1, 0.2, 0.3]
    assert scales[9:51] == [1.0] * 42
    assert scales[75] == 0.5
    assert scales[99] == pytest.approx(0.02)


@pytest.mark.parametrize("total", [1, 2, 5, 19])
def test_learning_rate_of_a_short_run_is_positive(total: int) -> None:
    assert all(0 < learning_rate_scale(step, total) <= 1 for step in range(total))


def test_record_of_a_whole_run(two_class_data: DataSet) -> None:
    run = TrainingRun(OptimizerSpec("sgd", 0.05), linear(two_class_data), two_class_data, SPEC)
    assert run.record().losses == ()
    yielded = list(run.steps())
    record = run.record()
    assert list(record.losses) == yielded
    assert record.steps == record.planned_steps == 3 * (40 // 16)
    assert record.finished
    assert not record.diverged
    assert sorted(record.seconds) == list(record.seconds)
    assert len(record.tested) == 3
    assert record.tested[-1] == 1.0
    assert record.losses[-1] < record.losses[0]


def test_losses_are_those_of_the_loop_written_out(two_class_data: DataSet) -> None:
    network = linear(two_class_data)
    plain = copy.deepcopy(network)
    run = TrainingRun(OptimizerSpec("adamw", 0.01), network, two_class_data, SPEC)
    losses = list(run.steps())

    x = two_class_data.train.images.float()
    x = (x - x.mean()) / x.std(correction=0)
    optimizer = torch.optim.AdamW(plain.parameters(), 0.01)
    order, step, expected = torch.Generator().manual_seed(5), 0, []
    for _ in range(3):
        permutation = torch.randperm(40, generator=order)
        for rows in (permutation[:16], permutation[16:32]):
            optimizer.param_groups[0]["lr"] = 0.01 * learning_rate_scale(step, 6)
            loss = F.cross_entropy(plain(x[rows]), two_class_data.train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
            step += 1
    assert losses == pytest.approx(expected, rel=1e-5)


def test_optimizers_see_the_same_batches(two_class_data: DataSet) -> None:
    recorders = []
    for name in ("sgd", "adamw"):
        recorder = Recorder(linear(two_class_data))
        list(TrainingRun(OptimizerSpec(name, 0.01), recorder, two_class_data, SPEC).steps())
        recorders.append(recorder)
    first, second = (torch.stack(recorder.seen) for recorder in recorders)
    assert torch.equal(first, second)
    assert not torch.equal(first[:2], first[2:4])  # every epoch has an order of its own


def test_evaluation_is_not_on_the_clock(
    two_class_data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    class Slow(nn.Module):
        """Takes a second to train on a batch and an hour to evaluate one."""

        def __init__(self) -> None:
            super().__init__()
            self.network = linear(two_class_data)

        def forward(self, x: Tensor) -> Tensor:
            nonlocal now
            now += 1 if self.training else 3600
            return self.network(x)

    monkeypatch.setattr(training_run.time, "perf_counter", lambda: now)
    run = TrainingRun(OptimizerSpec("sgd", 0.01), Slow(), two_class_data, SPEC)
    list(run.steps())
    assert run.record().seconds == (1, 2, 3, 4, 5, 6)


def test_a_run_that_diverges_ends_there(two_class_data: DataSet) -> None:
    run = TrainingRun(OptimizerSpec("sgd", 1e38), linear(two_class_data), two_class_data, SPEC)
    losses = list(run.steps())
    record = run.record()
    assert not math.isfinite(losses[-1])
    assert record.diverged
    assert record.finished
    assert record.steps < record.planned_steps


def test_a_batch_larger_than_the_data_is_the_data(two_class_data: DataSet) -> None:
    spec = RunSpec(epochs=2, batch_size=1000, seed=0)
    recorder = Recorder(linear(two_class_data))
    run = TrainingRun(OptimizerSpec("sgd", 0.01), recorder, two_class_data, spec)
    list(run.steps())
    assert [len(batch) for batch in recorder.seen] == [40, 40]


def test_inputs_are_standardised_by_channel(two_class_data: DataSet) -> None:
    recorder = Recorder(linear(two_class_data))
    spec = RunSpec(epochs=1, batch_size=40, seed=0)
    list(TrainingRun(OptimizerSpec("sgd", 0.01), recorder, two_class_data, spec).steps())
    assert recorder.seen[0].mean().item() == pytest.approx(0, abs=1e-5)
    assert recorder.seen[0].std(correction=0).item() == pytest.approx(1, abs=1e-5)
