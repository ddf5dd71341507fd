"""The likelihood that a loss function within a captured graph tells.

Where a compiled graph holds the loss too, its gradient with respect to the prediction stays within
the graph, and the loss's own function has to do.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx
from torch.nn import functional as F

from kfc_fx.compilation.captured_graph import CapturedGraph
from kfc_fx.statistics.likelihoods.bernoulli import Bernoulli
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.likelihoods.evidence import Finding
from kfc_fx.statistics.likelihoods.gaussian import Gaussian
from kfc_fx.statistics.likelihoods.likelihood import Likelihood

LIKELIHOODS: dict[object, Likelihood] = {
    F.cross_entropy: Categorical(),
    F.nll_loss: Categorical(),
    F.ctc_loss: Categorical(),
    F.binary_cross_entropy_with_logits: Bernoulli(),
    F.binary_cross_entropy: Bernoulli(probabilities=True),
    F.mse_loss: Gaussian(),
    F.l1_loss: Gaussian(),
    F.smooth_l1_loss: Gaussian(),
    F.huber_loss: Gaussian(),
}
"""Loss function to the likelihood that it is the negative logarithm of, or comes closest to."""


def likelihood_of_graphs(graphs: Iterable[CapturedGraph]) -> Finding | None:
    """The likelihood that all loss functions in the graphs have; None where they differ, or where
    there is none."""
    found = {
        _likelihood_of(node): node.target
        for graph in graphs
        for node in graph.captured[0].module.graph.nodes
        if node.op == "call_function" and node.target in LIKELIHOODS
    }
    if len(found) != 1:
        return None
    ((likelihood, function),) = found.items()
    name = getattr(function, "__name__", str(function))
    return Finding(likelihood, f"the model computes its loss by {name}")


def _likelihood_of(node: fx.Node) -> Likelihood:
    """That of a call of a loss function. Of three dimensions or more the second has the classes."""
    own, scores = LIKELIHOODS[node.target], node.args[0] if node.args else None
    value = scores.meta.get("example_value") if isinstance(scores, fx.Node) else None
    if isinstance(own, Categorical) and isinstance(value, Tensor) and value.dim() > 2:
        return own if node.target is F.ctc_loss else Categorical(dim=1)
    return own
