"""Runs, optimizers and step costs of ``kfc-fx bench train``, on small stand-ins for the data."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kfc_fx.tools.data.sets import DataSet, ImageSet
from kfc_fx.tools.failures import CommandError
from kfc_fx.tools.race import costs as race_costs
from kfc_fx.tools.race import run as race_run
from kfc_fx.tools.race import tasks as race_tasks
from kfc_fx.tools.race.costs import measure_costs
from kfc_fx.tools.race.networks import CharacterGPT, VisionTransformer, autoencoder, resnet20
from kfc_fx.tools.race.optimizers import (
    CENTRES,
    ENTRANTS,
    MatrixMuon,
    check_entrants,
    check_installed,
    muon_weights,
)
from kfc_fx.tools.race.results import RunResult, RunSpec
from kfc_fx.tools.race.run import batches, train
from kfc_fx.tools.race.tasks import TASKS, CellSpec, Examples, RaceData, TaskSpec

STEPS = 14


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> TaskSpec:
    """A small convolutional network that tells bright images from dark ones."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 2))

    made = TaskSpec(
        "bright", "bright or dark", "mnist", build, "categorical", "accuracy", "3",
        (CellSpec(8, STEPS),),
    )  # fmt: skip
    monkeypatch.setitem(race_tasks.TASKS, "bright", made)
    return made


@pytest.fixture
def data() -> RaceData:
    def examples(size: int, seed: int) -> Examples:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(size) % 2
        noise = 0.3 * torch.randn(size, 1, 6, 6, generator=generator)
        return Examples(noise + labels[:, None, None, None] - 0.5, labels)

    return RaceData("bright", examples(40, 1), examples(24, 2))


def spec(optimizer: str, lr: float, seed: int = 0) -> RunSpec:
    return RunSpec("bright", 8, STEPS, optimizer, lr, seed)


def unclocked(result: RunResult) -> RunResult:
    return replace(result, seconds=0.0, capture_seconds=0.0, peak_memory=None)


@pytest.mark.parametrize("optimizer", [n for n in ENTRANTS if n not in ("soap", "psgd")])
def test_an_optimizer_learns_and_its_run_can_be_repeated(
    optimizer: str, task: TaskSpec, data: RaceData
) -> None:
    result = train(spec(optimizer, CENTRES[optimizer]), data, workers=2)
    assert not result.diverged
    assert len(result.losses) == STEPS
    assert result.seconds > 0
    assert result.final_loss < 0.9 * result.curve[0]
    assert result.test_accuracy is not None
    assert result.test_accuracy > 0.7
    assert (result.train_size, result.workers) == (40, 2)
    assert result.versions["torch"] == torch.__version__
    again = train(spec(optimizer, CENTRES[optimizer]), data, workers=2)
    assert unclocked(again) == unclocked(result)


@pytest.mark.filterwarnings("ignore:Learning rate changed between steps:UserWarning")
@pytest.mark.parametrize("optimizer", ["soap", "psgd"])
def test_the_rivals_of_heavyball_learn(optimizer: str, task: TaskSpec, data: RaceData) -> None:
    pytest.importorskip("heavyball", reason="the extra 'bench' is not installed")
    result = train(spec(optimizer, CENTRES[optimizer]), data)
    assert result.final_loss < result.curve[0]


def test_the_end_loss_is_of_the_parameters_after_the_last_update(
    task: TaskSpec, data: RaceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, seen = race_run.training_loss, []

    def keep(network: nn.Module, task: TaskSpec, examples: Examples) -> float:
        seen.append((network, examples))
        return own(network, task, examples)

    monkeypatch.setattr(race_run, "training_loss", keep)
    result = train(spec("sgd", 0.1), data)
    ((network, examples),) = seen
    assert examples is data.train
    inputs, targets = data.train.batch(slice(None))
    assert result.end_loss == pytest.approx(task.loss(network(inputs), targets).item())
    assert result.final_loss == result.end_loss
    assert train(spec("sgd", 1e6), data).end_loss is None


def test_a_training_loss_is_of_examples_from_all_of_the_set(
    task: TaskSpec, data: RaceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race_run, "END_EXAMPLES", 8)
    monkeypatch.setattr(race_run, "EVALUATION_BATCH", 3)
    torch.manual_seed(0)
    network = task.build().eval()
    found = race_run.training_loss(network, task, data.train)
    inputs, targets = data.train.batch(torch.arange(8) * 5)
    assert found == pytest.approx(task.loss(network(inputs), targets).item())
    assert network.training


def test_all_start_alike_and_see_the_same_batches(task: TaskSpec, data: RaceData) -> None:
    first = {train(spec(name, 1e-9), data).losses for name in ("sgd", "muon", "adamw")}
    # At a rate of almost zero Muon's AdamW still moves the biases and the head.
    starts = {losses[0] for losses in first}
    assert len(starts) == 1
    other = train(spec("sgd", 1e-9, seed=1), data)
    assert other.losses[0] not in starts


def test_a_run_that_diverges_is_stopped_and_recorded(task: TaskSpec, data: RaceData) -> None:
    result = train(spec("sgd", 1e6), data)
    assert result.diverged
    assert len(result.losses) < STEPS
    assert result.final_loss == float("inf")
    assert (result.test_loss, result.test_accuracy) == (None, None)
    assert len(result.curve) == STEPS
    assert result.curve[-1] == float("inf")


def test_a_loss_above_three_times_its_start_counts_only_after_the_warm_up() -> None:
    assert not race_run._has_diverged([1.0, 3.1], 2)
    assert race_run._has_diverged([1.0, 2.0, 3.1], 2)
    assert not race_run._has_diverged([1.0, 2.0, 2.9], 2)
    assert race_run._has_diverged([1.0, None], 2)


def test_batches_are_whole_and_drawn_anew_every_epoch() -> None:
    examples = Examples(torch.arange(10.0), torch.arange(10))
    source = batches(examples, 4, seed=3)
    drawn = [next(source)[1].tolist() for _ in range(4)]
    assert all(len(batch) == 4 for batch in drawn)
    for epoch in (drawn[:2], drawn[2:]):
        assert len({row for batch in epoch for row in batch}) == 8
    assert drawn[:2] != drawn[2:]
    with pytest.raises(ValueError, match="fewer than a batch of 11"):
        next(batches(examples, 11, seed=0))


def test_muon_takes_conv_weights_as_matrices() -> None:
    torch.manual_seed(0)
    conv, linear = nn.Parameter(torch.randn(6, 2, 3, 3)), nn.Parameter(torch.randn(6, 18))
    with torch.no_grad():
        linear.copy_(conv.flatten(1))
    ours, torch_s = MatrixMuon([conv], 0.1), torch.optim.Muon([linear], 0.1, weight_decay=0.0)
    before = conv.detach().clone()
    for _ in range(3):
        gradient = torch.randn(6, 2, 3, 3)
        conv.grad, linear.grad = gradient, gradient.flatten(1)
        ours.step()
        torch_s.step()
    assert torch.equal(conv.flatten(1), linear)
    assert not torch.equal(conv, before)
    conv.grad = None
    kept = conv.detach().clone()
    ours.step()
    assert torch.equal(conv, kept)


def test_muon_leaves_head_and_embeddings_to_adamw() -> None:
    gpt, text = TASKS["gpt"].build(), TASKS["gpt"]
    chosen = {id(weight) for weight in muon_weights(gpt, text.head)}
    names = {name for name, parameter in gpt.named_parameters() if id(parameter) in chosen}
    layers = ("qkv", "projection", "widen", "narrow")
    assert names == {f"blocks.{b}.{layer}.weight" for b in range(2) for layer in layers}
    cifar = TASKS["kfc-cifar"]
    assert [w.ndim for w in muon_weights(cifar.build(), cifar.head)] == [4, 4, 4]


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.head])
def test_a_head_is_the_layer_that_makes_the_logits(name: str) -> None:
    network = TASKS[name].build()
    head = dict(network.named_modules())[TASKS[name].head or ""]
    assert isinstance(head, nn.Linear)
    assert head.out_features in (10, 65)


def test_the_networks_have_the_shapes_that_they_say() -> None:
    images = torch.randn(2, 3, 32, 32)
    for network in (resnet20(), VisionTransformer()):
        assert network(images).shape == (2, 10)
    assert sum(p.numel() for p in resnet20().parameters()) == 269_722  # the paper's 0.27 M
    assert autoencoder()(torch.rand(2, 784)).shape == (2, 784)
    widths = [m.out_features for m in autoencoder().modules() if isinstance(m, nn.Linear)]
    assert widths == [1000, 500, 250, 30, 250, 500, 1000, 784]
    kinds = [type(layer) for layer in autoencoder().children()]
    assert kinds[6:8] == [nn.Linear, nn.Linear]  # a linear code
    assert kinds[-1] is nn.Linear


def test_a_gpt_sees_no_later_character() -> None:
    gpt = CharacterGPT(65)
    tokens = torch.randint(65, (1, 64))
    changed = tokens.clone()
    changed[0, 40:] = (tokens[0, 40:] + 1) % 65
    torch.testing.assert_close(gpt(tokens)[:, :40], gpt(changed)[:, :40])
    assert not torch.allclose(gpt(tokens)[:, 40:], gpt(changed)[:, 40:])


def test_pixels_cost_their_sum_per_image() -> None:
    loss = TASKS["autoencoder"].loss(torch.zeros(4, 784), torch.rand(4, 784))
    assert loss.item() == pytest.approx(784 * 0.693147, rel=1e-5)


def test_costs_cover_whole_intervals_in_turns(
    task: TaskSpec, data: RaceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[str, int]] = []
    due: list[bool] = []
    seconds = {"sgd": 1.0, "kfc-adam": 3.0}

    def turn(racer: race_costs.Racer, steps: int) -> float:
        turns.append((racer.name, steps))
        for _ in range(steps):
            if racer.kfc is not None and len(turns) > 3 and racer.kfc._models[0].collector.armed:
                due.append(steps == 1)
            racer.step()
        return seconds[racer.name] * (5 if steps == 1 else 1)

    monkeypatch.setattr(race_costs.Racer, "turn", turn)
    sgd, kfc = measure_costs(task, 8, ["kfc-adam"], data, rounds=2)
    assert turns[:3] == [("sgd", 1), ("kfc-adam", 1), ("kfc-adam", 1)]
    assert turns[3:] == [("sgd", 10), ("kfc-adam", 1), ("kfc-adam", 9)] * 2
    assert due == [True, True]  # the first step of each interval, no other
    assert (kfc.interval, kfc.rounds, kfc.early_steps) == (20, 2, 100)
    assert (sgd.mean, sgd.early, kfc.due, kfc.plain) == (1.0, 1.0, 15.0, 3.0)
    assert kfc.mean == (15 + 19 * 3) / 20
    # some stacks of so small a network are due at fewer steps: what the others cost is their share
    assert kfc.early_due[:3] == (0, 1, 2)
    assert kfc.early_shares[0] == 1
    assert min(kfc.early_shares) < 1
    due = sum(kfc.early_shares)
    assert kfc.early == pytest.approx((due * 15 + (100 - due) * 3) / 100)
    assert kfc.relative_seconds(1) == 15
    assert kfc.relative_seconds(120) == pytest.approx(100 * kfc.early + 20 * kfc.mean)
    assert kfc.sgd_seconds == 1.0


def test_an_interval_holds_both_of_kfc_s(task: TaskSpec, data: RaceData) -> None:
    entered = race_run.make(task, "kfc-adam", 0.01, 0, data, 8)
    (kfc,) = entered.optimizers
    assert hasattr(kfc, "schedule")
    dues = kfc._models[0]._dues
    dues.schedule = replace(kfc.schedule, every=4, refresh_every=6)
    racer = race_costs.Racer("kfc-adam", entered, lambda: None)
    assert race_costs.whole_interval([racer]) == race_costs.turn_steps([racer]) == 60
    dues.schedule = replace(kfc.schedule, every=6)
    assert (race_costs.whole_interval([racer]), race_costs.turn_steps([racer])) == (30, 10)


def test_every_scaling_has_a_centre() -> None:
    assert set(ENTRANTS) <= set(CENTRES)


def test_unknown_and_missing_optimizers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError, match=r"unknown optimizer 'soup'.*'soap'"):
        check_entrants(("sgd", "soup"))
    known = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("heavyball"):
            raise ModuleNotFoundError(name="heavyball")
        return known(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    check_installed(("sgd", "muon"))
    with pytest.raises(CommandError, match=r"pip install 'kfc_fx\[bench\]'"):
        check_installed(("psgd",))


@pytest.mark.parametrize("optimizer", [n for n in ENTRANTS if n not in ("soap", "psgd")])
def test_no_gradient_outlives_its_step(
    optimizer: str, task: TaskSpec, data: RaceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an optimizer would step by the sum of all gradients so far, and look bad for it."""
    entered = race_run.make(task, optimizer, 0.01, 0, data, 8)
    inputs, targets = data.train.batch(slice(8))
    race_run.take_step(entered, task, inputs, targets)
    assert all(p.grad is None for p in entered.network.parameters())


def test_whole_data_keeps_every_training_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def images(size: int) -> ImageSet:
        return ImageSet(torch.randint(256, (size, 1, 6, 6), dtype=torch.uint8), torch.arange(size))

    made = DataSet("mnist", "random", images(50), images(20))
    monkeypatch.setattr(race_tasks.data_sets, "load", lambda name, folder: made)
    monkeypatch.setitem(race_tasks.TRAIN_SIZES, "mnist", 30)
    cut = race_tasks.load("mnist", tmp_path)
    whole = race_tasks.load("mnist", tmp_path, whole=True)
    assert (len(cut.train), len(whole.train)) == (30, 50)
    assert torch.equal(whole.train.inputs[:30], cut.train.inputs)
    assert torch.equal(whole.test.inputs, cut.test.inputs)
