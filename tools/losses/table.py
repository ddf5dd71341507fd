"""Losses of torch and of the field, on outputs of every form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kfc_fx.tools.losses.case import LossCase

N, CLASSES = 32, 6


def loss_cases() -> list[LossCase]:
    """All cases, with the same targets every time."""
    generator = torch.Generator().manual_seed(0)
    return [*_classes(generator), *_locations(generator), *_binary(generator), *_numbers(generator)]


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _classes(generator: torch.Generator) -> Iterator[LossCase]:
    y = torch.randint(CLASSES, (N,), generator=generator)
    other = torch.randint(CLASSES, (N,), generator=generator)
    soft = _normal(generator, N, CLASSES).softmax(1)
    class_weights = _uniform(generator, CLASSES) + 0.2
    example_weights = _uniform(generator, N) + 0.2
    advantages = _normal(generator, N)
    shape, logits = (N, CLASSES), "Categorical(dim=-1)"

    def each(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none")

    def focal(z: Tensor) -> Tensor:
        return ((1 - (-each(z)).exp()).square() * each(z)).mean()

    def mixup(z: Tensor, reduction: str = "mean") -> Tensor:
        return 0.3 * F.cross_entropy(z, y, reduction=reduction) + 0.7 * F.cross_entropy(
            z, other, reduction=reduction
        )

    def distilled(z: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(z, 1), soft, reduction="batchmean")

    def soft_each(z: Tensor) -> Tensor:
        return F.cross_entropy(z, soft, reduction="none")

    ignored = torch.where(torch.arange(N) % 3 == 0, -100, y)
    yield LossCase("cross_entropy", logits, shape, lambda z: F.cross_entropy(z, y), examples=each)
    yield LossCase(
        "cross_entropy, sum",
        logits,
        shape,
        lambda z: F.cross_entropy(z, y, reduction="sum"),
        examples=each,
    )
    yield LossCase(
        "cross_entropy, two classes",
        logits,
        (N, 2),
        lambda z: F.cross_entropy(z, y % 2),
        examples=lambda z: F.cross_entropy(z, y % 2, reduction="none"),
    )
    yield LossCase(
        "cross_entropy, class weights",
        logits,
        shape,
        lambda z: F.cross_entropy(z, y, class_weights),
        examples=each,
        weights=class_weights[y],
    )
    yield LossCase(
        "cross_entropy, example weights",
        logits,
        shape,
        lambda z: (example_weights * each(z)).mean(),
        examples=each,
        weights=example_weights,
    )
    yield LossCase(
        "cross_entropy, ignore_index",
        logits,
        shape,
        lambda z: F.cross_entropy(z, ignored),
        examples=lambda z: F.cross_entropy(z, ignored, reduction="none"),
        weights=(ignored >= 0).double(),
    )
    yield LossCase(
        "cross_entropy, label smoothing",
        logits,
        shape,
        lambda z: F.cross_entropy(z, y, label_smoothing=0.1),
        examples=lambda z: F.cross_entropy(z, y, label_smoothing=0.1, reduction="none"),
        exact="soft",
    )
    yield LossCase(
        "cross_entropy, mixed-up targets",
        logits,
        shape,
        mixup,
        examples=lambda z: mixup(z, "none"),
        exact="soft",
    )
    yield LossCase(
        "cross_entropy, soft targets",
        logits,
        shape,
        lambda z: soft_each(z).mean(),
        examples=soft_each,
        exact="soft",
    )
    yield LossCase(
        "kl_div, distillation", logits, shape, distilled, examples=soft_each, exact="soft"
    )
    yield LossCase("focal loss", logits, shape, focal, exact="direction")
    yield LossCase(
        "cross_entropy and z-loss",
        logits,
        shape,
        lambda z: each(z).mean() + 1e-3 * z.logsumexp(1).square().mean(),
        examples=each,
        exact="soft",
    )
    yield LossCase(
        "cross_entropy and a penalty on the scores",
        logits,
        shape,
        lambda z: each(z).mean() + 1e-2 * z.square().mean(),
        examples=each,
        exact="soft",
    )
    yield LossCase(
        "policy gradient",
        logits,
        shape,
        lambda z: (advantages * each(z)).mean(),
        examples=each,
        weights=advantages.abs(),
    )
    yield LossCase("multi_margin_loss", logits, shape, lambda z: F.multi_margin_loss(z, y))
    yield LossCase(
        "nll_loss of log_softmax",
        logits,
        shape,
        lambda z: F.nll_loss(z, y),
        output=lambda h: F.log_softmax(h, 1),
        examples=lambda z: F.nll_loss(z, y, reduction="none"),
    )
    yield LossCase(
        "nll_loss of the logarithm of a softmax",
        "Categorical(dim=-1, probabilities=True)",
        shape,
        lambda z: F.nll_loss(z.log(), y),
        output=lambda h: h.softmax(1),
        examples=lambda z: F.nll_loss(z.log(), y, reduction="none"),
    )
    yield LossCase(
        "Brier score",
        "Gaussian()",
        shape,
        lambda z: (z - F.one_hot(y, CLASSES)).square().sum(1).mean(),
        output=lambda h: h.softmax(1),
        exact="direction",
    )


def _locations(generator: torch.Generator) -> Iterator[LossCase]:
    tokens = torch.randint(CLASSES, (N, 5), generator=generator)
    padded = torch.where(torch.arange(5) >= torch.arange(N)[:, None] % 5 + 1, -100, tokens)
    pixels = torch.randint(CLASSES, (N, 3, 4), generator=generator)

    def of_tokens(z: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(z.mT, targets, reduction="none").sum(1)

    yield LossCase(
        "cross_entropy, tokens [N, T, C]",
        "Categorical(dim=-1)",
        (N, 5, CLASSES),
        lambda z: F.cross_entropy(z.flatten(0, 1), tokens.flatten()),
        examples=lambda z: of_tokens(z, tokens),
    )
    yield LossCase(
        "cross_entropy, padded tokens",
        "Categorical(dim=-1)",
        (N, 5, CLASSES),
        lambda z: F.cross_entropy(z.flatten(0, 1), padded.flatten()),
        examples=lambda z: of_tokens(z, padded),
    )
    yield LossCase(
        "cross_entropy, [N, C, L]",
        "Categorical(dim=1)",
        (N, CLASSES, 5),
        lambda z: F.cross_entropy(z, tokens),
        examples=lambda z: of_tokens(z.mT, tokens),
    )
    yield LossCase(
        "cross_entropy, segmentation",
        "Categorical(dim=1)",
        (N, CLASSES, 3, 4),
        lambda z: F.cross_entropy(z, pixels),
        examples=lambda z: F.cross_entropy(z, pixels, reduction="none").flatten(1).sum(1),
    )


def _binary(generator: torch.Generator) -> Iterator[LossCase]:
    one = torch.randint(2, (N,), generator=generator).double()
    labels = torch.randint(2, (N, CLASSES), generator=generator).double()
    pixels = ((_uniform(generator, N, 1, 4, 4) - 0.5) * 2).clamp_min(0)
    positive = _uniform(generator, CLASSES) * 4 + 0.2
    smooth = 0.05 + 0.9 * labels
    binary = F.binary_cross_entropy_with_logits

    def each(z: Tensor, targets: Tensor) -> Tensor:
        return binary(z, targets, reduction="none").flatten(1).sum(1)

    def of_probabilities(z: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy(z, targets, reduction="none").flatten(1).sum(1)

    yield LossCase(
        "binary_cross_entropy_with_logits [N]",
        "Bernoulli()",
        (N,),
        lambda z: binary(z, one),
        examples=lambda z: binary(z, one, reduction="none"),
    )
    yield LossCase(
        "binary_cross_entropy_with_logits [N, 1]",
        "Bernoulli()",
        (N, 1),
        lambda z: binary(z, one[:, None]),
        examples=lambda z: each(z, one[:, None]),
    )
    yield LossCase(
        "binary_cross_entropy_with_logits, multi-label",
        "Bernoulli()",
        (N, CLASSES),
        lambda z: binary(z, labels),
        examples=lambda z: each(z, labels),
    )
    yield LossCase(
        "binary_cross_entropy_with_logits, pos_weight",
        "Bernoulli()",
        (N, CLASSES),
        lambda z: binary(z, labels, pos_weight=positive),
        exact="direction",
    )
    yield LossCase(
        "binary_cross_entropy_with_logits, smoothed",
        "Bernoulli()",
        (N, CLASSES),
        lambda z: binary(z, smooth),
        examples=lambda z: each(z, smooth),
        exact="soft",
    )
    yield LossCase(
        "multilabel_soft_margin_loss",
        "Bernoulli()",
        (N, CLASSES),
        lambda z: F.multilabel_soft_margin_loss(z, labels),
        examples=lambda z: each(z, labels),
    )
    yield LossCase(
        "soft_margin_loss",
        "Bernoulli()",
        (N, 1),
        lambda z: F.soft_margin_loss(z, 2 * one[:, None] - 1),
        examples=lambda z: each(z, one[:, None]),
    )
    yield LossCase(
        "sigmoid_focal_loss",
        "Bernoulli()",
        (N, CLASSES),
        lambda z: _sigmoid_focal_loss(z, labels),
        exact="direction",
    )
    yield LossCase(
        "binary_cross_entropy_with_logits, grey images",
        "Bernoulli()",
        (N, 1, 4, 4),
        lambda z: binary(z, pixels),
        examples=lambda z: each(z, pixels),
        exact="soft",
    )
    yield LossCase(
        "binary_cross_entropy of a sigmoid",
        "Bernoulli(probabilities=True)",
        (N, CLASSES),
        lambda z: F.binary_cross_entropy(z, labels),
        output=torch.sigmoid,
        examples=lambda z: of_probabilities(z, labels),
    )
    yield LossCase(
        "binary_cross_entropy of a sigmoid, grey images",
        "Bernoulli(probabilities=True)",
        (N, 1, 4, 4),
        lambda z: F.binary_cross_entropy(z, pixels, reduction="sum") / N,
        output=torch.sigmoid,
        examples=lambda z: of_probabilities(z, pixels),
        exact="soft",
    )


def _sigmoid_focal_loss(z: Tensor, targets: Tensor, alpha: float = 0.25) -> Tensor:
    """``−α_t (1 − p_t)² log p_t`` (Lin et al. 2017, equation 5, γ = 2), the mean over entries."""
    loss = F.binary_cross_entropy_with_logits(z, targets, reduction="none")
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return (weight * (1 - (-loss).exp()).square() * loss).mean()


def _numbers(generator: torch.Generator) -> Iterator[LossCase]:
    y = _normal(generator, N, CLASSES)
    sign = torch.randint(2, (N, 1), generator=generator).double() * 2 - 1
    counts = torch.poisson(3 * _uniform(generator, N, CLASSES), generator=generator)
    pixels = ((_uniform(generator, N, 1, 4, 4) - 0.5) * 2).clamp_min(0)
    greys = 0.1 + 0.8 * _uniform(generator, N, 1, 4, 4)
    numbers, shape = "Gaussian()", (N, CLASSES)

    def cases() -> Iterator[tuple[str, tuple[int, ...], object, object]]:
        yield "mse_loss", shape, lambda z: F.mse_loss(z, y), None
        yield "mse_loss [N]", (N,), lambda z: F.mse_loss(z, y[:, 0]), None
        yield "half the sum of squares", shape, lambda z: (z - y).square().sum() / 2 / N, None
        yield "l1_loss", shape, lambda z: F.l1_loss(z, y), None
        yield "smooth_l1_loss", shape, lambda z: F.smooth_l1_loss(z, y), None
        yield "huber_loss", shape, lambda z: F.huber_loss(z, y, delta=0.5), None
        yield "gaussian_nll_loss", shape, lambda z: F.gaussian_nll_loss(z, y, y.square()), None
        yield "poisson_nll_loss", shape, lambda z: F.poisson_nll_loss(z, counts), None
        yield "cosine_similarity", shape, lambda z: -F.cosine_similarity(z, y).mean(), None
        yield (
            "triplet_margin_loss",
            shape,
            lambda z: F.triplet_margin_loss(z, y, y.flip(0)),
            None,
        )
        yield "least-squares GAN", (N, 1), lambda z: (z - (sign + 1) / 2).square().mean(), None
        yield "Wasserstein GAN", (N, 1), lambda z: (z * sign).mean(), None
        yield "hinge GAN", (N, 1), lambda z: F.relu(1 - z * sign).mean(), None
        yield "mse_loss of images", (N, 1, 4, 4), lambda z: F.mse_loss(z, pixels), None
        yield (
            "mse_loss of images of a sigmoid",
            (N, 1, 4, 4),
            lambda z: F.mse_loss(z, pixels),
            torch.sigmoid,
        )

    for name, own, loss, output in cases():
        given = {} if output is None else {"output": output}
        yield LossCase(name, numbers, own, loss, exact="direction", **given)  # type: ignore[arg-type]
    yield LossCase(
        "binary_cross_entropy_with_logits, grey images without black and white",
        numbers,
        (N, 1, 4, 4),
        lambda z: F.binary_cross_entropy_with_logits(z, greys),
        exact="direction",
        doubtful=True,
    )
