"""What the optimizer asks of the exact Fisher matrix: ν, the quadratic model, the damping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfc_fx.compilation import Compilation
from kfc_fx.errors import StepError
from kfc_fx.optim.diagnostics import Diagnostics
from kfc_fx.optim.exact.fisher_vector import fisher_gram
from kfc_fx.optim.exact.quadratic_model import best_combination, inner_products, predicted_change
from kfc_fx.optim.exact.trial import Trial, adapted_damping
from kfc_fx.optim.options import KFCOptions
from kfc_fx.optim.scalings.inverse import Inverse
from kfc_fx.statistics.collector import Collector


class ExactFisher:
    """Products with the Fisher matrix of the last batch, and what follows from them."""

    def __init__(
        self,
        compilation: Compilation,
        collector: Collector,
        options: KFCOptions,
        diagnostics: Diagnostics,
    ) -> None:
        self._compilation, self._collector = compilation, collector
        self._options, self._diagnostics = options, diagnostics

    @property
    def inverse_damping(self) -> float | None:
        """γ as it was adapted, where the general scaling is "inverse"; else None."""
        if isinstance(self._options.scaling, Inverse):
            return self._diagnostics.damping
        return None

    def scales(
        self,
        gradients: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor],
        momenta: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """How a step scales its vectors v: ``nu = vᵀFv + λ vᵀv``; or, where the quadratic model is
        asked, ``step_size`` and, with a momentum, ``momentum``."""
        if self._options.clipping == "exact":
            square = inner_products([vectors], [vectors]).to(torch.float32)
            return {"nu": (self._gram([vectors]) + self._damping * square)[0, 0]}
        along = [vectors, momenta] if momenta else [vectors]
        squares, slopes = inner_products(along, along), inner_products(along, [gradients])
        best = best_combination(self._gram(along), squares, slopes[:, 0], self._damping)
        self._diagnostics.last_step_size = best[0]
        self._diagnostics.last_momentum = best[1] if momenta else None
        return dict(zip(("step_size", "momentum"), best.to(torch.float32), strict=False))

    def trial(self, closure: Callable[[], Any] | None) -> Trial | None:
        """The place before the step that begins, where the damping is to be adapted after it.

        Raises:
            StepError: it is, and there is no closure.
        """
        interval = self._options.adapt_damping
        if interval is None or (self._diagnostics.steps + 1) % interval:
            return None
        if closure is None:
            raise StepError(
                "adapt_damping compares the loss before and after a step: call opt.step(closure)"
            )
        return Trial(self._compilation.model)

    def adapt_damping(
        self,
        trial: Trial,
        closure: Callable[[], Any],
        loss: Any,
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Compare the change of the loss with what the quadratic model predicted.

        Args:
            trial: from before the step.
            closure: gives the loss of the same batch, now after the step.
            loss, gradients: from before the step; gradients of what is minimized.
        """
        interval, diagnostics = self._options.adapt_damping, self._diagnostics
        assert interval is not None
        change = trial.change()
        moved = {name: change[name] for name in gradients}
        square, slope = inner_products([moved], [moved]), inner_products([moved], [gradients])
        with trial.repeated():
            fisher = self._gram([moved], trial.parameters).double()
        predicted = predicted_change(fisher, square, slope, self._damping)
        self._collector.arm(False)  # what the closure computes is no statistic
        with trial.repeated(), torch.enable_grad():
            after = torch.as_tensor(closure()).detach()
        gained = after.double() - torch.as_tensor(loss).detach().double()
        if self._options.maximize:
            gained = -gained
        diagnostics.reduction_ratio = ratio = float(gained / predicted.to(gained.device))
        diagnostics.damping = adapted_damping(self._damping, ratio, interval)

    @property
    def _damping(self) -> float:
        """λ: the damping of the scalings that step by a vector."""
        adapted = self.inverse_damping
        damping = self._options.damping if adapted is None else adapted
        assert damping is not None
        return damping

    def _gram(
        self, vectors: Sequence[Mapping[str, Tensor]], at: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """``vᵢᵀ F vⱼ`` on the last batch."""
        inputs, bound = self._collector.last_inputs, self._options.bound
        samples = bound.clip_samples if bound else None
        if inputs is None:
            raise StepError(
                "the exact Fisher matrix needs a forward pass through the compiled model"
            )
        likelihood = self._collector.likelihood
        if likelihood is None:
            raise StepError("the exact Fisher matrix needs a likelihood, and no loss told it yet")
        return fisher_gram(
            self._compilation.model,
            likelihood,
            inputs,
            vectors,
            samples=samples,
            parameters=at,
            output_path=self._collector.choice.output,
            batch_dims=self._compilation.options.batch_dims,
        )
