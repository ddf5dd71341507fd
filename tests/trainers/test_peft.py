"""PEFT: the matrices of LoRA are blocks, what they adapt stays as it is."""

from __future__ import annotations

import pytest
import torch

import kfc_fx
from tests.trainers.needed import needed

peft = needed("peft")
needed("transformers")

# peft asks transformers by a name that is deprecated there
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_lora_trains_and_is_merged():
    from tests.trainers.test_transformers import Words, gpt

    base = gpt()
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = kfc_fx.compile(peft.get_peft_model(base, config))
    opt = kfc_fx.KFC(model)
    words = torch.stack([Words()[n]["input_ids"] for n in range(16)])
    losses = []
    for _ in range(12):
        loss = model(input_ids=words, labels=words).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    names = [block.name for block in model.kfc.plan.blocks]
    assert len(names) == 6  # A and B of two layers of attention and one of the MLP
    assert all("lora_" in name for name in names)
    for name, p in model.base_model.model.named_parameters():
        name = name.replace("base_layer.", "")
        if "lora_" not in name:
            assert torch.equal(p, frozen[name]), name
    with torch.no_grad():
        adapted = model(input_ids=words).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=words).logits, adapted, rtol=1e-4, atol=1e-4)
