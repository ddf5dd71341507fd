"""Which likelihood a model's output has: named by the user, or found from the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kfc_fx.errors import warn
from kfc_fx.statistics.likelihoods.bernoulli import Bernoulli
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.likelihoods.evidence import Finding, find_likelihood
from kfc_fx.statistics.likelihoods.likelihood import Likelihood
from kfc_fx.statistics.likelihoods.named import likelihood_from

DISAGREES = 0.5
"""Cosine of the loss's gradient and a named likelihood's, below which the name is doubted."""


class LikelihoodChoice:
    """The likelihood of one model's output, of each tensor in it that a loss is computed from. Once
    it is known it stays.

    Args:
        named: as the user named it; None where it is found from the loss.
        of_graphs: what the model's graphs tell of a loss whose gradient is not seen.
        batch_dim: dimension of the examples as the user named it: of inputs and output, or of each.
    """

    def __init__(
        self,
        named: Likelihood | None,
        of_graphs: Callable[[], Finding | None] = lambda: None,
        *,
        batch_dim: int | tuple[int, int] = 0,
    ) -> None:
        self._named, self._of_graphs = named, of_graphs
        self._batch_dim = batch_dim
        self._examples_noted = batch_dim != (0, 0) and not isinstance(batch_dim, int)
        self._checked = False
        self._found: dict[str, tuple[Likelihood, str]] = {}

    def of(self, path: str) -> Likelihood | None:
        """That of the tensor at a path of the output; None where it is not known."""
        return self._named or self._found.get(path, (None, ""))[0]

    def note_examples(self, of_inputs: int, of_output: int) -> None:
        """Warn once where inputs and output have different sizes in the dimension of the examples,
        unless the user has named one for each."""
        if self._examples_noted or not of_inputs or of_inputs == of_output:
            return
        self._examples_noted = True
        dim = self._batch_dim
        if isinstance(dim, int) and dim:
            warn(
                f"batch_dim={dim} says where examples are in inputs and output, but the model's "
                f"input has {of_inputs} there and its output {of_output}: the likelihood and the "
                f"scale of factors may be wrong. Pass both to kfc_fx.compile, as in "
                f"batch_dim=({dim}, 0) for an output [time * examples, classes]"
            )
            return
        warn(
            f"the model's input leads with {of_inputs} and its output with {of_output}, which is "
            "taken for the number of examples: factors are of another scale if it is not. Pass "
            "batch_dim= to kfc_fx.compile, as in batch_dim=1 for a model that leads with time, "
            "batch_dim=(0, 1) for an output [time, examples, classes], or batch_dim=(1, 0) for an "
            "output [time * examples, classes]; or return an output that leads with the examples"
        )

    def unseen(self, path: str) -> Likelihood | None:
        """That of a tensor with respect to which the gradient of the loss is not seen."""
        if self.of(path) is None and (found := self._of_graphs()) is not None:
            self._found[path] = (found.likelihood, found.reason)
        return self.of(path)

    @property
    def likelihood(self) -> Likelihood | None:
        """That of the tensor that was differentiated first; None until it is known."""
        return self._named or next((likelihood for likelihood, _ in self._found.values()), None)

    @property
    def names_output(self) -> bool:
        """Whether the user has named a tensor of the output."""
        return getattr(self._named, "output", None) is not None

    @property
    def output(self) -> str | None:
        """The path of the tensor in the output that is meant; None where nobody said so yet."""
        if self._named is not None:
            named = getattr(self._named, "output", None)
            return None if named is None else str(named)
        return next(iter(self._found), None)

    def settled(
        self, values: Tensor, cotangent: Tensor, examples: int, batch_dim: int, path: str
    ) -> Likelihood | None:
        """The likelihood, found from the loss's cotangent where it was not known. One that was
        named is checked by it.

        Args:
            values: the output, in single precision at least.
            cotangent: of what is minimized.
            examples: of the batch; 0 where that is not known.
            batch_dim: dimension of the examples in the output.
            path: of these values in the model's output.

        Returns:
            None where it is not known: a cotangent that is zero or not finite decides nothing.
        """
        known = self.of(path)
        if known is not None and (self._named is None or self._checked):
            return known
        found = find_likelihood(values, cotangent, examples, batch_dim)
        if found is None:
            return known
        if known is None:
            self._found[path] = (found.likelihood, found.reason)
            if found.doubt:
                warn(f"the likelihood is taken to be {found.likelihood}: {found.doubt}")
            return found.likelihood
        self._checked = True
        _compare(known, values, cotangent, found)
        return known

    @property
    def lines(self) -> list[str]:
        """What is known, for people: one line for each tensor of the output."""
        if self._named is not None:
            return [f"{self._named}, as named"]
        if not self._found:
            return ["found from the loss at the first step"]
        return [
            f"{likelihood}{f' of output {path!r}' if path else ''}: {reason}"
            for path, (likelihood, reason) in self._found.items()
        ]

    def state(self) -> dict[str, Any]:
        """What was found, as plain data by path."""
        return {
            path: {"likelihood": likelihood.as_dict(), "reason": reason}
            for path, (likelihood, reason) in self._found.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with what was found before, where none was named."""
        if self._named is None:
            self._found = {
                path: (likelihood_from(own["likelihood"]), own["reason"])
                for path, own in state.items()
            }


def _compare(named: Likelihood, values: Tensor, cotangent: Tensor, found: Finding) -> None:
    """Warn where the loss's gradient is far from that of a named likelihood."""
    agreement = float(named.agreement(values, cotangent.to(values.dtype)))
    if agreement < DISAGREES or not _may_be(named, values, found):
        warn(
            f"likelihood={named} does not fit the loss (cosine of their gradients "
            f"{agreement:.2f}). {found.likelihood} does, since {found.reason}: pass that, or "
            "likelihood='auto', to kfc_fx.compile"
        )


def _may_be(named: Likelihood, values: Tensor, found: Finding) -> bool:
    """Whether the loss may be that of a named likelihood, after what was found."""
    other = found.likelihood
    if isinstance(named, Categorical) and isinstance(other, Categorical):
        count = values.dim()
        return named.class_dim(values) % count == other.class_dim(values) % count
    if isinstance(named, Categorical):
        return False
    return not (isinstance(named, Bernoulli) and isinstance(other, Categorical))
