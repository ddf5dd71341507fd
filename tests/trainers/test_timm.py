"""timm: ``kfc`` in its registry of optimizers, and what its training script puts around."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import kfc_fx
from tests.trainers.needed import assert_same, needed

timm = needed("timm")


def made(architecture: str = "test_resnet", **options: Any) -> tuple[Any, Any]:
    import kfc_fx.integrations.timm  # noqa: F401 - registers the optimizer

    torch.manual_seed(0)
    model = (
        timm.create_model(architecture, num_classes=5, img_size=32)
        if "vit" in architecture
        else timm.create_model(architecture, num_classes=5)
    )
    options = {"lr": 0.01, "weight_decay": 0.05, **options}
    return model, timm.optim.create_optimizer_v2(model, "kfc", **options)


def images() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return x, x[:, 0, 0, :5].argmax(1)


def train(model: Any, opt: Any, steps: int = 6, **around: Any) -> list[float]:
    found = []
    x, y = images()
    criterion = around.get("criterion", torch.nn.CrossEntropyLoss())
    for _ in range(steps):
        inputs, targets = around["mixup"](x, y) if "mixup" in around else (x, y)
        with torch.autocast("cpu", torch.bfloat16, enabled="scaler" in around):
            loss = criterion(model(inputs), targets)
        if "scaler" in around:
            around["scaler"](loss, opt, clip_grad=1.0, parameters=model.parameters())
        else:
            loss.backward()
            opt.step()
        opt.zero_grad()
        if "average" in around:
            around["average"].update(model)
        found.append(float(loss.detach()))
    return found


def test_it_is_listed_and_made_from_the_scripts_arguments():
    import kfc_fx.integrations.timm

    assert "kfc" in timm.optim.list_optimizers()
    model = timm.create_model("test_resnet", num_classes=5)
    given = argparse.Namespace(
        opt="kfc", lr=0.02, weight_decay=0.05, momentum=0.9, opt_eps=1e-8, opt_betas=(0.9, 0.99),
        layer_decay=None, opt_args={"scaling": "spectral", "average": 10.0},
    )  # fmt: skip
    opt = timm.optim.create_optimizer_v2(model, **timm.optim.optimizer_kwargs(given))
    assert isinstance(opt, kfc_fx.KFC)
    assert str(opt.options.scaling.name) == "spectral"
    assert {group["weight_decay"] for group in opt.param_groups} == {0.0, 0.05}
    assert all(group["lr"] == 0.02 for group in opt.param_groups)


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_models_train(architecture):
    model, opt = made(architecture)
    found = train(model, opt)
    assert found[-1] < found[0] - 0.2
    assert {type(block).__name__ for block in model.kfc.plan.blocks} == {"BlockSpec"}
    assert len(model.kfc.plan.blocks) >= 8


def test_layer_decay_reaches_the_blocks():
    model, opt = made("test_vit", layer_decay=0.5)
    scales = {group["lr_scale"] for group in opt.param_groups}
    assert len(scales) > 2
    for group in opt.param_groups:  # as timm's schedulers do
        group["lr"] = 0.01 * group["lr_scale"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, opt, steps=1)

    def moved(name: str) -> float:
        own = dict(model.named_parameters())[name]
        return float((own - before[name]).detach().norm() / before[name].norm())

    assert moved("blocks.0.attn.qkv.weight") < 0.7 * moved("blocks.5.attn.qkv.weight")


def test_mixup_amp_and_an_average():
    model, opt = made()
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    mixup = timm.data.Mixup(0.8, 1.0, num_classes=5)
    criterion = importlib.import_module("timm.loss").SoftTargetCrossEntropy()
    scaler = timm.utils.NativeScaler(device="cpu")
    found = train(model, opt, 8, average=average, mixup=mixup, criterion=criterion, scaler=scaler)
    assert min(found[4:]) < found[0]
    assert opt.diagnostics.steps == 8
    assert "Categorical" in str(model.kfc.plan)
    own, averaged = next(model.parameters()), next(average.module.parameters())
    assert 0 < (own - averaged).abs().max() < 1


def test_a_checkpoint_resumes_bit_for_bit(tmp_path):
    model, opt = made()
    train(model, opt, 4)
    saver = timm.utils.CheckpointSaver(model, opt, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    train(model, opt, 3)
    other, again = made()
    timm.models.resume_checkpoint(other, str(tmp_path / "last.pth.tar"), again, log_info=False)
    train(other, again, 3)
    assert_same(model.parameters(), other.parameters())


def test_torch_compile_says_what_to_do_and_a_backend_is_taken():
    model, opt = made()
    with pytest.raises(kfc_fx.KfcError, match="backend='inductor'"):
        train(torch.compile(model, backend="eager"), opt, 1)
    model, opt = made(backend="aot_eager")
    assert model.kfc.options.backend == "aot_eager"
    train(model, opt, 1)


def test_unknown_options_are_named():
    with pytest.raises(kfc_fx.OptionError, match="dampin"):
        made(dampin=0.1)
    parameters = torch.nn.Linear(2, 2).parameters()
    with pytest.raises(kfc_fx.OptionError, match=r"kfc_fx.compile\(model\)"):
        timm.optim.create_optimizer_v2(parameters, "kfc", lr=0.01)
    other = timm.optim.create_optimizer_v2(torch.nn.Linear(2, 2), "adamw", lr=0.01)
    assert isinstance(other, torch.optim.AdamW)
