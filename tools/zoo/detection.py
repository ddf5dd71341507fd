"""Detectors of torchvision in training mode: two images and their boxes in, losses out.

Their output is a dict of losses, of which no likelihood can be taken. So they run in a wrapper
that returns the class scores beside the losses, which is what such a model needs to train by KFC.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from kfc_fx.tools.zoo.case import ModelCase

CLASSES = 5
FIXED_SIDES = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
SIDE = 64


class DetectorWithScores(nn.Module):
    """A detector whose output is the scores of its classes, ``"logits"``, and its losses."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector
        self.scores: Tensor | None = None
        two_stages = hasattr(detector, "roi_heads")
        scorer = detector.roi_heads.box_predictor if two_stages else detector.head
        scorer.register_forward_hook(self._keep_scores)

    def _keep_scores(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.scores = output["cls_logits"] if isinstance(output, dict) else output[0]

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Losses by name, and ``"logits"``: ``[N, anchors, classes]``, or ``[boxes, classes]``
        of a detector with two stages."""
        losses = self.detector(images, targets)
        return {"logits": self.scores, **losses}


def detection_case(name: str) -> ModelCase:
    """The case of one detector."""
    side = FIXED_SIDES.get(name, SIDE)
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    if name not in FIXED_SIDES:
        options |= {"min_size": side, "max_size": side}
    model = DetectorWithScores(torchvision.models.get_model(name, **options)).train()
    images = [torch.rand(3, side, side) for _ in range(2)]
    targets = [_target(name, side, shift) for shift in (0, 4)]
    return ModelCase(model, (images, targets), size=f"{side}x{side}")


def _target(name: str, side: int, shift: int) -> dict[str, Tensor]:
    corners = torch.tensor([[4.0, 4.0, 28.0, 30.0], [20.0, 16.0, 52.0, 50.0]]) + shift
    target = {"boxes": corners, "labels": torch.tensor([1, 2])}
    if name.startswith("maskrcnn"):
        masks = torch.zeros(2, side, side, dtype=torch.uint8)
        masks[:, 20 + shift : 26 + shift, 21 + shift : 27 + shift] = 1
        target["masks"] = masks
    if name.startswith("keypointrcnn"):
        centres = (corners[:, :2] + corners[:, 2:]) / 2
        points = centres[:, None].expand(2, 17, 2)
        target["keypoints"] = torch.cat([points, torch.ones(2, 17, 1)], dim=-1)
        target["labels"] = torch.tensor([1, 1])
    return target
