"""Hugging Face's Trainer: KFC for its optimizer, by the two ways that it takes one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import kfc_fx
from tests.distributed.launch import torchrun
from tests.trainers.needed import assert_same, needed

transformers = needed("transformers")
accelerate = needed("accelerate")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use_reentrant parameter.*"),
    pytest.mark.filterwarnings(
        "ignore:`gradient_checkpointing`:FutureWarning"
    ),  # as scripts have it
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


class Words(Dataset):  # type: ignore[type-arg]
    """Texts in which every second word repeats the one before it; or their class."""

    def __init__(self, count: int = 64, *, classes: bool = False) -> None:
        self.count, self.classes = count, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.count:
            raise IndexError(index)
        words = torch.randint(4, 60, (12,), generator=torch.Generator().manual_seed(index))
        words[1::2] = words[::2]
        if self.classes:
            seen = torch.ones(12, dtype=torch.long)
            return {"input_ids": words, "attention_mask": seen, "labels": int(words[0] > 30)}
        return {"input_ids": words, "labels": words.clone()}


def gpt() -> Any:
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=1,
        eos_token_id=2, **off,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def trainer(folder: Any, model: Any = None, *, line: str = "class", **arguments: Any) -> Any:
    """A trainer of a compiled model, with defaults but for what a test is about."""
    model = gpt() if model is None else model
    kfc_fx.compile(model)
    known = {
        "max_steps": 8, "per_device_train_batch_size": 8, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    given = transformers.TrainingArguments(output_dir=str(folder), **{**known, **arguments})
    if line == "class":
        ours: dict[str, Any] = {"optimizer_cls_and_kwargs": (kfc_fx.KFC, {"lr": 0.01})}
    else:
        ours = {"optimizers": (kfc_fx.KFC(model), None)}
    classes = not hasattr(model, "lm_head")
    return transformers.Trainer(
        model=model, args=given, train_dataset=Words(classes=classes),
        eval_dataset=Words(16, classes=classes), **ours,
    )  # fmt: skip


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def optimizer(trained: Any) -> kfc_fx.KFC:
    return getattr(trained.optimizer, "optimizer", trained.optimizer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training by defaults, with a checkpoint in its middle."""
    folder = tmp_path_factory.mktemp("whole")
    own = trainer(folder, save_strategy="steps", save_steps=4)
    own.train()
    return own


def test_both_lines_train_alike(whole, tmp_path):
    by_value = trainer(tmp_path, line="value")
    by_value.train()
    for own in (whole, by_value):
        assert isinstance(optimizer(own), kfc_fx.KFC)
        assert losses(own)[-1] < losses(own)[0] - 0.3
        rates = [e["learning_rate"] for e in own.state.log_history if "learning_rate" in e]
        assert rates[0] == 0.01  # and not that of the arguments
    # the trainer's groups, by which it decays some parameters and not others, are the difference
    assert len(whole.optimizer.param_groups) == 2
    assert len(by_value.optimizer.param_groups) == 1
    assert_same(whole.model.parameters(), by_value.model.parameters())


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True, "label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_else_is_configured(arguments, tmp_path):
    own = trainer(tmp_path, **arguments)
    own.train()
    assert losses(own)[-1] < losses(own)[0] - 0.3
    blocks = own.model.kfc.plan.blocks
    assert sum(block.kind == "linear" for block in blocks) == 4
    assert optimizer(own).diagnostics.steps == 8


def test_gradient_checkpoints_change_nothing(whole, tmp_path):
    checkpointed = trainer(tmp_path, gradient_checkpointing=True)
    checkpointed.train()
    assert losses(checkpointed) == pytest.approx(losses(whole), rel=1e-4)


def test_evaluation_and_the_best_model(tmp_path):
    own = trainer(
        tmp_path, bert(), eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    own.train()
    evaluated = [entry["eval_loss"] for entry in own.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2
    assert own.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-4)


def test_a_checkpoint_resumes_bit_for_bit(whole, tmp_path):
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert_same(resumed.model.parameters(), whole.model.parameters())
    assert losses(resumed)[-4:] == losses(whole)[-4:]


def test_what_is_saved_is_loaded_by_from_pretrained(whole, tmp_path):
    accelerate.PartialState()  # of the process, which ended with the test that made the trainer
    whole.save_model(str(tmp_path / "result"))
    loaded = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path / "result"))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    words = Words()[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(words).logits, whole.model.eval()(words).logits)


def test_torch_compile_says_what_to_do(tmp_path):
    own = trainer(tmp_path, torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(kfc_fx.CaptureError, match="backend='inductor'"):
        own.train()


def test_two_ranks(tmp_path):
    printed = torchrun(2, "-m", "tests.trainers.transformers_ranks", str(tmp_path))
    found = json.loads(printed.splitlines()[-1])
    assert found["equal"]
    assert found["steps"] == 8
    assert found["losses"][-1] < found["losses"][0] - 0.3
