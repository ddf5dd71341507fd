"""What the loss's gradient tells of the likelihood.

The cotangent c of a loss with respect to the output z has a form that its likelihood gives it. Of
class scores it is ``s (softmax(z) − t)``, which sums to zero over the classes. Of binary logits it
is ``s (σ(z) − t)`` with targets t in [0, 1], most of them 0 or 1. The scale s is the loss's own: it
holds the reduction, weights, and the factor of a gradient scaler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from kfc_fx.statistics.likelihoods.bernoulli import EDGE, Bernoulli
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.likelihoods.gaussian import Gaussian
from kfc_fx.statistics.likelihoods.likelihood import Likelihood

MOST_NUMBERS = 2**22
"""Of an output that are looked at, in whole examples."""
EXACT, ROUNDED = 1e-3, 2.0
"""Up to what sums count as zero: this, or so many units of rounding of the cotangent's dtype."""
EQUAL, EQUALLY_ROUNDED = 2e-4, 4.0
"""Up to what relative difference scales count as equal, likewise."""
PENALISED, ALIKE = 0.2, 0.9
"""A penalty on the scores leaves sums over classes up to the first, relative to absolute values,
and a cosine from the second on with the cotangent of one class."""
FEW = 3
"""Entries below which nothing is told of binary targets."""
MANY = 64
"""Entries that soft targets take to be told, which few numbers look like by chance."""
FEWEST, ON_THE_EDGE = 8, 0.05
"""Entries, and share of the entries, whose target is 0 or 1 at the scale of them all."""
DISTANT = 0.2
"""Distance of a soft target from its probability, that some have."""
SMOOTH = 0.05
"""Squares of the steps of c along z, relative to those of the differences of c from its mean, up to
which c is a function of z. Of independent values they are twice as many. And the relative standard
deviation of c from which on it varies."""
TIGHT = 0.75
"""Share of a reduction's scale that soft targets need at least."""
WIDE = 10.0
"""Times what counts as equal, by which ``σ(z)`` must vary for a constant scale to say anything."""


@dataclass(frozen=True)
class Finding:
    """A likelihood, and what it was found from."""

    likelihood: Likelihood
    reason: str
    """What was seen, as the end of a sentence."""
    doubt: str = ""
    """What else it might be, with what to pass; empty where it is clear."""


def find_likelihood(
    output: Tensor, cotangent: Tensor, examples: int, batch_dim: int = 0
) -> Finding | None:
    """The likelihood that a loss is the negative logarithm of, or comes closest to.

    Args:
        output: z, in single precision at least.
        cotangent: c, in the dtype that it was computed in.
        examples: of the batch; 0 where that is not known.
        batch_dim: dimension of the examples in z.

    Returns:
        None where the cotangent tells nothing: it is zero, or not finite.
    """
    rounding = torch.finfo(cotangent.dtype).eps
    z, c = _some(output, cotangent, batch_dim)
    c = c.to(z.dtype)
    # scores of classes that are masked out
    z = torch.where((z == -torch.inf) & (c == 0), torch.finfo(z.dtype).min / 4, z)
    if not torch.isfinite(c).all() or not torch.isfinite(z).all() or not (c != 0).any():
        return None
    counts = {output.numel(), output.shape[batch_dim] if output.dim() > batch_dim else 1, 1}
    largest = c.abs().max()
    reductions = tuple(float(1 / count / largest) for count in counts)
    tolerance = max(EXACT, ROUNDED * rounding)
    equal = max(EQUAL, EQUALLY_ROUNDED * rounding)
    seen = _Evidence(z, c / largest, tolerance, equal, examples, batch_dim, reductions)
    return seen.of_classes() or seen.of_binary() or seen.of_penalised_classes() or seen.of_numbers()


def _some(output: Tensor, cotangent: Tensor, batch_dim: int) -> tuple[Tensor, Tensor]:
    """Of large tensors the first examples that the loss counts."""
    if output.dim() <= batch_dim or output.numel() <= MOST_NUMBERS:
        return output, cotangent
    count = output.shape[batch_dim]
    counted = cotangent.movedim(batch_dim, 0).flatten(1).any(1).nonzero().flatten()
    kept = counted[: max(1, MOST_NUMBERS * count // output.numel())]
    return output.index_select(batch_dim, kept), cotangent.index_select(batch_dim, kept)


@dataclass(frozen=True)
class _Evidence:
    z: Tensor
    c: Tensor
    """Relative to its largest entry."""
    tolerance: float
    equal: float
    examples: int
    batch_dim: int
    reductions: tuple[float, ...]
    """Scales of the mean over entries, over examples, and of the sum, relative to that entry."""

    # -- classes -----------------------------------------------------------------------------

    def of_classes(self) -> Finding | None:
        """A cotangent that sums to zero over one dimension, or is that of log-probabilities or of
        probabilities."""
        normalised = self._normalised()
        if normalised is not None:
            return normalised
        exact = {dim: self._residue(dim) for dim in self._dims()}
        exact = {dim: residue for dim, residue in exact.items() if residue <= self.tolerance}
        if not exact:
            return None
        dim = min(exact, key=exact.__getitem__)
        one_class = self._agreement(dim) > 1 - self.tolerance
        if self.z.dim() == 1 and len(self.z) == self.examples and not one_class:
            return None  # a loss of differences between examples
        if not one_class and self._sums(self.z, dim) <= self.tolerance:
            named = "likelihood='categorical' to kfc_fx.compile, or 'gaussian'"
            return Finding(
                Gaussian(),
                f"the output sums to zero over dimension {dim}, as its gradient does",
                f"scores of classes that are centred look alike: pass {named}",
            )
        where = f"the loss's gradient sums to zero over dimension {dim} of the output"
        return Finding(self._categorical(dim), where)

    def of_penalised_classes(self) -> Finding | None:
        """A cotangent that is close to one of classes, besides which the loss has a penalty."""
        for dim in self._dims():
            if self.z.numel() < MANY or (self.z.dim() == 1 and len(self.z) == self.examples):
                continue  # few residuals look so by chance
            residue, agreement = self._residue(dim), self._agreement(dim)
            if residue <= PENALISED and agreement >= ALIKE:
                return Finding(
                    self._categorical(dim),
                    f"the loss's gradient nearly sums to zero over dimension {dim} of the output",
                )
        return None

    def _normalised(self) -> Finding | None:
        for dim in self._dims():
            pushes_up = bool((self.c <= 0).all())
            if self._close(self.z.logsumexp(dim), 0.0) and (
                pushes_up or self._residue(dim) <= 10 * self.tolerance
            ):
                return Finding(
                    self._categorical(dim),
                    f"the output holds log-probabilities over dimension {dim}",
                )
            if not (self.z >= 0).all() or not self._close(self.z.sum(dim), 1.0):
                continue
            if pushes_up:
                return Finding(
                    self._categorical(dim, probabilities=True),
                    f"the output holds probabilities over dimension {dim}",
                )
            if self._agreement(dim) <= max(1 - self.tolerance, self._agreement(dim, self.z)):
                return Finding(
                    Gaussian(),
                    f"the output holds probabilities over dimension {dim}, and the loss's gradient "
                    "is not that of their logarithms",
                )
        return None

    def _dims(self) -> Iterator[int]:
        """Dimensions that may be those of classes."""
        for dim in range(self.z.dim()):
            if (dim != self.batch_dim or self.z.dim() == 1) and self.z.shape[dim] > 1:
                yield dim

    def _categorical(self, dim: int, *, probabilities: bool = False) -> Categorical:
        own = -1 if dim == self.z.dim() - 1 else dim
        return Categorical(own, probabilities=probabilities)

    def _residue(self, dim: int) -> float:
        return self._sums(self.c, dim)

    def _sums(self, x: Tensor, dim: int) -> float:
        """Sums over a dimension, relative to those of absolute values."""
        total = x.abs().sum()
        return float(x.sum(dim).abs().sum() / total) if total > 0 else 0.0

    def _agreement(self, dim: int, p: Tensor | None = None) -> float:
        """Cosine with the cotangent of one class for each prediction, rows by their own scale.

        Args:
            p: probabilities, those of the scores by default.
        """
        p = self.z.softmax(dim) if p is None else p
        target = self.c.argmin(dim, keepdim=True)
        own = p.scatter_add(dim, target, -torch.ones_like(target, dtype=p.dtype))
        square = self.c.square().sum(dim)
        norms = (own.square().sum(dim) * square).sqrt()
        cosines = (own * self.c).sum(dim) / norms.clamp_min(torch.finfo(p.dtype).tiny)
        return float((cosines * square).sum() / square.sum())

    def _close(self, values: Tensor, to: float) -> bool:
        return bool(((values - to).abs() <= 10 * self.tolerance).all())

    # -- binary -------------------------------------------------------------------------------

    def of_binary(self) -> Finding | None:
        """Entries whose targets are 0 or 1 at one scale, of logits or of probabilities."""
        forms = [Bernoulli()]
        if bool(((self.z >= 0) & (self.z <= 1)).all()):
            forms.insert(0, Bernoulli(probabilities=True))
        for likelihood in forms:
            what = "probabilities" if likelihood.probabilities else "logits"
            seen = f"the loss's gradient is that of {what} with targets"
            if self._has_hard_targets(likelihood) or self._is_function_of_output(likelihood):
                return Finding(likelihood, f"{seen} 0 and 1")
            if self._has_one_size():
                continue
            if self._has_some_hard_targets(likelihood):
                return Finding(likelihood, f"{seen} in [0, 1], some of them 0 or 1")
            if self._has_two_targets(likelihood) or (
                self._has_soft_targets(likelihood) and self._is_wide(likelihood)
            ):
                return Finding(likelihood, f"{seen} in [0, 1]")
        return None

    def _scales(self, likelihood: Bernoulli) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of the scales at which targets are 0 or 1, those of what they were divided by,
        and which entries count."""
        counted = self.c != 0
        if likelihood.probabilities:
            counted &= (self.z > EDGE) & (self.z < 1 - EDGE)
        logs = likelihood.entry_scales(self.z, self.c)[counted].log()
        slope = self.z[counted] * (1 - self.z[counted]) if likelihood.probabilities else 1.0
        return logs, (self.c[counted].abs() * slope).log() - logs, counted

    def _has_hard_targets(self, likelihood: Bernoulli) -> bool:
        """Whether all entries have one scale, or those of an example, of an output unit, of a sign
        or of a unit's sign: weights of examples and units, and of positive targets."""
        logs, divisors, counted = self._scales(likelihood)
        sign = (self.c[counted] > 0).long()
        unit = _positions(self.c, self.batch_dim)[counted]
        example = _indices(self.c, self.batch_dim)[counted]
        nothing = torch.zeros_like(sign)
        for groups in (nothing, sign, unit, 2 * unit + sign, example):
            own, varied = _within(logs, groups), _within(divisors, groups)
            if len(own) < FEW or own.abs().max() > self.equal:
                continue
            if varied.std() >= WIDE * self.equal:
                return True
            if groups is nothing and self._is_reduction(float(logs.mean())):
                return True
        return False

    def _is_reduction(self, log_scale: float) -> bool:
        """Whether a scale is that of a mean or a sum. Where the output hardly varies, that alone
        tells binary targets from other losses."""
        return any(abs(log_scale - log(scale)) <= self.equal for scale in self.reductions)

    def _has_one_size(self) -> bool:
        """Whether most entries of c are of one size: the gradient of the loss is a sign."""
        sizes = self.c[self.c != 0].abs()
        middle = sizes.median()
        return bool(((sizes - middle).abs() <= self.equal * middle).float().mean() > 0.5)

    def _has_some_hard_targets(self, likelihood: Bernoulli) -> bool:
        """Whether several entries are 0 or 1 at the least scale that leaves all within [0, 1],
        whatever their probabilities are."""
        logs, divisors, counted = self._scales(likelihood)
        if not len(logs):
            return False
        on_edge = logs >= logs.max() - self.equal
        if int(on_edge.sum()) < max(FEWEST, ON_THE_EDGE * len(logs)):
            return False
        up = self.c[counted] > 0
        for side in (up, ~up):
            some, varied = divisors[on_edge & side], divisors[side]
            if len(some) < FEWEST:
                continue
            if some.std() >= WIDE * self.equal and some.std() >= varied.std() / 2:
                return True
            if self._is_reduction(float(logs.max())):
                return True
        return False

    def _has_two_targets(self, likelihood: Bernoulli) -> bool:
        """Whether targets have but one or two values at the scale of a reduction, as smoothed ones
        do."""
        logs, divisors, counted = self._scales(likelihood)
        if len(logs) < FEWEST or divisors.std() < WIDE * self.equal:
            return False
        least = float(logs.max().exp())
        p = self.z if likelihood.probabilities else self.z.sigmoid()
        slope = p * (1 - p) if likelihood.probabilities else 1.0
        p, c = p[counted], (self.c * slope)[counted]
        for reduction in self.reductions:
            if not reduction / 10 <= least <= reduction * (1 + self.tolerance):
                continue
            targets = p - c / reduction
            for _ in range(2):
                targets = targets[(targets - targets.median()).abs() > self.equal]
                if len(targets) <= 0.05 * len(p):
                    return True
        return False

    def _has_soft_targets(self, likelihood: Bernoulli) -> bool:
        """Whether all targets are within [0, 1] at the scale of a reduction, and not at much less,
        and some are far from the probabilities."""
        logs, divisors, _ = self._scales(likelihood)
        if len(logs) < MANY:
            return False
        least, sizes = float(logs.max().exp()), (logs + divisors).exp()
        return any(
            TIGHT * s <= least <= s * (1 + self.tolerance)
            and float((sizes >= DISTANT * s).float().mean()) >= ON_THE_EDGE
            for s in self.reductions
        )

    def _is_wide(self, likelihood: Bernoulli) -> bool:
        """Whether some probabilities are near 0 and some near 1, far from where σ is a line."""
        p = self.z if likelihood.probabilities else self.z.sigmoid()
        return int((p < 0.1).sum()) >= FEWEST and int((p > 0.9).sum()) >= FEWEST

    def _is_function_of_output(self, likelihood: Bernoulli) -> bool:
        """Whether c is one function of z for positive c and one for negative c, as a focal loss of
        targets 0 and 1 has it. Both are found at z of both signs: no single target, whose residual
        is a function of z too, gives that."""
        if likelihood.probabilities:
            return False
        for side in (1.0, -1.0):
            chosen = side * self.c > 0
            z, c = self.z[chosen], self.c[chosen]
            if len(z) < FEWEST or not ((z < 0).any() and (z > 0).any()):
                return False
            spread = (c - c.mean()).square().sum()
            if c.std() <= SMOOTH * c.abs().max() or _is_line(z, c):
                return False
            if c[z.argsort()].diff().square().sum() > SMOOTH * spread:
                return False
        return True

    # -- numbers -----------------------------------------------------------------------------

    def of_numbers(self) -> Finding:
        """What is neither classes nor binary."""
        reason = "the loss's gradient is neither that of classes nor that of binary targets"
        return Finding(Gaussian(), reason, self._maybe_binary())

    def _maybe_binary(self) -> str:
        """What to pass where binary targets, hard or soft, would give the same gradient."""
        if int((self.c != 0).sum()) < FEW:
            return (
                "so few numbers do not tell a squared error from other losses: pass likelihood= to "
                "kfc_fx.compile, such as 'bernoulli' for binary cross-entropy"
            )
        forms = [Bernoulli()]
        if bool(((self.z >= 0) & (self.z <= 1)).all()):
            forms = [Bernoulli(probabilities=True)]
        if self._has_one_size() or not self._has_soft_targets(forms[0]):
            return ""
        if _is_line(self.z.flatten(), self.c.flatten()):
            return ""  # all targets are one number, if it is a squared error
        option = "kfc_fx.Bernoulli(probabilities=True)" if forms[0].probabilities else "'bernoulli'"
        return (
            "binary cross-entropy with soft targets and a squared error look alike here: pass "
            f"likelihood={option} or 'gaussian' to kfc_fx.compile"
        )


def _indices(x: Tensor, dim: int) -> Tensor:
    """Of each entry along a dimension."""
    shape = [1] * x.dim()
    shape[dim] = x.shape[dim]
    return torch.arange(x.shape[dim], device=x.device).reshape(shape).expand_as(x)


def _positions(x: Tensor, dim: int) -> Tensor:
    """Of each entry in its example."""
    moved = x.movedim(dim, 0)
    count = moved[0].numel() if len(moved) else 0
    positions = torch.arange(count, device=x.device).reshape(moved.shape[1:])
    return positions.expand_as(moved).movedim(0, dim)


def _within(values: Tensor, groups: Tensor) -> Tensor:
    """Differences from the mean of the own group, of groups with several entries."""
    count = int(groups.max()) + 1 if len(groups) else 0
    sizes = torch.zeros(count, dtype=values.dtype, device=values.device)
    sizes = sizes.scatter_add(0, groups, torch.ones_like(values))
    means = torch.zeros_like(sizes).scatter_add(0, groups, values) / sizes.clamp_min(1)
    return (values - means[groups])[sizes[groups] > 1]


def _is_line(x: Tensor, y: Tensor) -> bool:
    """Whether y is a linear function of x."""
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / x.square().sum().clamp_min(torch.finfo(x.dtype).tiny)
    return bool((y - slope * x).square().sum() <= 1e-4 * y.square().sum())
