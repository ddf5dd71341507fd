"""What factors are estimated from, how often, and in which form they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, get_args

from kfc_fx.optim.checks import COUNT, DECAY, POSITIVE, Checked, either, one_of
from kfc_fx.plan.forms import InputFactorOption
from kfc_fx.statistics.request import Fisher, Samples


@dataclass(frozen=True, kw_only=True)
class Statistics(Checked):
    """Statistics of the factors Ω and Γ.

    Args:
        fisher: what Γ is estimated from. ``"sampled"``: targets from the model's predictive
            distribution, by a backward pass of their own. ``"empirical"``: the gradient of the
            loss, within its backward pass, at the scale of the likelihood's. None is "empirical"
            for classes where no step depends on the scale of Γ ("adam"), else "sampled".
        every: T_s, steps between statistics. The interval begins as one step and grows by a
            quarter of the steps so far until it is T_s, since curvature changes fastest at the
            start; ``refresh_every`` grows likewise.
        refresh_every: T_f, steps between refreshes of inverses or bases. Where it equals
            ``every``, "adam" and "eigen" keep the moving average of a factor F as its eigenbasis Q
            and the diagonal of ``Qᵀ F Q``. That halves the memory, and forgets what orthogonal
            iteration leaves beside the diagonal.
        budget: largest work of statistics and refreshes in the early phase, in that of the
            gradients, averaged over any 20 steps; None for no bound. Where all that is due costs
            more, dear stacks of blocks are due at fewer of these steps, but twice in 20 at least.
            Work is counted in operations of layers and decompositions at the first statistics, by
            no clock, so that runs are the same again and ranks agree.
        samples: the first examples of a batch, which statistics are estimated from: a number, None
            for all, or "auto". "auto" takes a quarter of the batch, but at least 32 examples; with
            sampled targets half, but at least 128. On several ranks these numbers are of the
            examples of all. Where targets are not sampled, "auto" estimates Ω of a layer with many
            locations from at most 8 times as many rows as its side. A layer whose input does not
            lead with the examples takes the same share of what leads.
        decay: of the moving average of the factors. Of the first 2/(1 − decay) statistics the n-th
            weighs n times the first instead, so that those of the untrained network are soon
            forgotten.
        input_factor: ``"dense"``, ``"separable"`` into channels and offsets, or ``"auto"``:
            separable for convolutions whose dense Ω is wider than 1024.
        basis_limit: widest side of an eigenbasis ("adam", "eigen"). A wider dense factor of a
            linear or pointwise layer, or of output channels (with their offsets in a transposed
            convolution), is cut into equal parts, each with a basis of its own, as if channels of
            two parts were uncorrelated.

    Raises:
        OptionError: a field is of the wrong type or out of range.
    """

    fisher: Annotated[Fisher | None, either(one_of(*get_args(Fisher)), None)] = None
    every: Annotated[int, COUNT] = 20
    refresh_every: Annotated[int, COUNT] = 20
    budget: Annotated[float | None, either(POSITIVE, None)] = 2.0
    samples: Annotated[Samples, either(COUNT, "auto", None)] = "auto"
    decay: Annotated[float, DECAY] = 0.95
    input_factor: Annotated[InputFactorOption, one_of(*get_args(InputFactorOption))] = "auto"
    basis_limit: Annotated[int, COUNT] = 512
