"""Losses that models of transformers, diffusers and torchvision compute or are trained by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx

Step = Callable[[nn.Module], Tensor]
"""From the compiled model to its loss on a small batch."""


@dataclass(frozen=True)
class ModelLoss:
    """A model and its loss.

    Attributes:
        name: of the model and the loss.
        decision: the likelihood that is to be found, as the plan shows it: with the output's path.
        build: the model, small and untrained.
        loss: of a batch.
    """

    name: str
    decision: str
    build: Callable[[], nn.Module]
    loss: Step


def model_losses(library: str) -> list[ModelLoss]:
    """The losses of one library's models; the library must be installed.

    Raises:
        ValueError: ``library`` is none of "torchvision", "transformers" and "diffusers".
    """
    tables = {"torchvision": _torchvision, "transformers": _transformers, "diffusers": _diffusers}
    if library not in tables:
        raise ValueError(f"library must be one of {', '.join(tables)}, got {library!r}")
    return list(tables[library]())


def found_likelihood(case: ModelLoss, backend: str = "eager") -> str:
    """The likelihood that one backward pass finds, as the plan shows it, without the reason."""
    torch.manual_seed(0)
    model = kfc_fx.compile(case.build(), backend=backend)
    opt = kfc_fx.KFC(model)
    case.loss(model).backward()
    del opt  # its step would refresh every factor, and tell nothing more
    return "; ".join(line.split(": ")[0] for line in kfc_fx.Compilation.of(model).plan.likelihood)


def _torchvision() -> Iterator[ModelLoss]:
    from torchvision import models

    images = torch.randn(4, 3, 64, 64)
    y = torch.tensor([0, 1, 2, 1])

    def with_auxiliary(model: nn.Module) -> Tensor:
        scores, *others = model(torch.randn(4, 3, 96, 96))
        return F.cross_entropy(scores, y) + 0.3 * sum(F.cross_entropy(z, y) for z in others)

    def segmented(model: nn.Module) -> Tensor:
        output = model(images[:2, :, :32, :32])
        pixels = torch.randint(3, (2, 32, 32))
        return F.cross_entropy(output["out"], pixels) + 0.5 * F.cross_entropy(output["aux"], pixels)

    yield ModelLoss(
        "resnet18, cross_entropy",
        "Categorical(dim=-1)",
        lambda: models.resnet18(num_classes=3),
        lambda model: F.cross_entropy(model(images), y, label_smoothing=0.1),
    )
    yield ModelLoss(
        "googlenet with its auxiliary classifiers",
        "Categorical(dim=-1) of output 'logits'",
        lambda: models.googlenet(num_classes=3, init_weights=False),
        with_auxiliary,
    )
    yield ModelLoss(
        "lraspp, cross_entropy over pixels",
        "Categorical(dim=1) of output 'out'",
        lambda: models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=3),
        lambda model: F.cross_entropy(model(images)["out"], torch.randint(3, (4, 64, 64))),
    )
    yield ModelLoss(
        "fcn_resnet50 with its auxiliary classifier",
        "Categorical(dim=1) of output 'out'",
        lambda: models.segmentation.fcn_resnet50(
            weights_backbone=None, num_classes=3, aux_loss=True
        ),
        segmented,
    )


def _transformers() -> Iterator[ModelLoss]:
    import transformers as hf

    tokens, labels = torch.randint(1, 60, (4, 12)), torch.tensor([0, 1, 2, 1])
    padded = torch.where(torch.arange(12) >= 9, -100, tokens)
    text = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = text | {"intermediate_size": 32, "num_labels": 3}
    logits = "of output 'logits'"

    def classifier(problem: str) -> Callable[[], nn.Module]:
        return lambda: hf.BertForSequenceClassification(hf.BertConfig(**bert, problem_type=problem))

    def own(**inputs: Tensor) -> Step:
        return lambda model: model(**inputs).loss

    yield ModelLoss(
        "GPT2LMHeadModel",
        f"Categorical(dim=-1) {logits}",
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)
        ),
        own(input_ids=tokens, labels=padded),
    )
    yield ModelLoss(
        "T5ForConditionalGeneration",
        f"Categorical(dim=-1) {logits}",
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=64,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                decoder_start_token_id=0,
                pad_token_id=0,
            )
        ),
        own(input_ids=tokens, labels=padded),
    )
    yield ModelLoss(
        "BertForMaskedLM",
        f"Categorical(dim=-1) {logits}",
        lambda: hf.BertForMaskedLM(hf.BertConfig(**bert)),
        own(input_ids=tokens, labels=torch.where(torch.arange(12) % 3 == 0, tokens, -100)),
    )
    yield ModelLoss(
        "BertForSequenceClassification, one label",
        f"Categorical(dim=-1) {logits}",
        classifier("single_label_classification"),
        own(input_ids=tokens, labels=labels),
    )
    yield ModelLoss(
        "BertForSequenceClassification, several labels",
        f"Bernoulli() {logits}",
        classifier("multi_label_classification"),
        own(input_ids=tokens, labels=F.one_hot(labels, 3).float()),
    )
    yield ModelLoss(
        "BertForSequenceClassification, regression",
        f"Gaussian() {logits}",
        classifier("regression"),
        own(input_ids=tokens, labels=torch.randn(4, 3)),
    )
    yield ModelLoss(
        "ViTForImageClassification",
        f"Categorical(dim=-1) {logits}",
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=16,
                patch_size=8,
                num_labels=3,
            )
        ),
        own(pixel_values=torch.randn(4, 3, 16, 16), labels=labels),
    )
    yield ModelLoss(
        "Wav2Vec2ForCTC",
        f"Categorical(dim=-1) {logits}",
        lambda: hf.Wav2Vec2ForCTC(
            hf.Wav2Vec2Config(
                vocab_size=12,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                conv_dim=(8, 8),
                conv_kernel=(10, 3),
                conv_stride=(5, 2),
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
                mask_time_prob=0.0,
                layerdrop=0.0,
                num_feat_extract_layers=2,
            )
        ),
        own(input_values=torch.randn(2, 800), labels=torch.randint(1, 12, (2, 5))),
    )
    yield ModelLoss(
        "SegformerForSemanticSegmentation",
        f"Categorical(dim=1) {logits}",
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                num_encoder_blocks=2,
                depths=[1, 1],
                hidden_sizes=[8, 16],
                num_attention_heads=[1, 2],
                sr_ratios=[2, 1],
                patch_sizes=[3, 3],
                strides=[2, 2],
                mlp_ratios=[2, 2],
                decoder_hidden_size=16,
                num_labels=3,
            )
        ),
        own(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.randint(3, (2, 32, 32))),
    )


def _diffusers() -> Iterator[ModelLoss]:
    from diffusers import UNet2DModel

    noise = torch.randn(4, 3, 16, 16)
    yield ModelLoss(
        "UNet2DModel, predicted noise",
        "Gaussian() of output 'sample'",
        lambda: UNet2DModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        ),
        lambda model: F.mse_loss(model(noise, torch.arange(4)).sample, torch.randn_like(noise)),
    )
