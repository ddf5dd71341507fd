"""The backward pass of the loss, in which the statistics of a forward pass are taken."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import Node, get_gradient_edge

from kfc_fx.statistics.fisher_pass import REENTRANT, FisherPass
from kfc_fx.statistics.gradient_pass import GradientPass
from kfc_fx.statistics.likelihoods.likelihood import Likelihood
from kfc_fx.statistics.prediction import Prediction, widened
from kfc_fx.statistics.setup import PassSetup

UNSEEN = (
    "the loss is computed within the model, where its gradient is not seen, so that its likelihood "
    "cannot be found: pass likelihood= to kfc_fx.compile"
)
"""Why the likelihood is not found in a backward pass."""
LOSS_ALONE = (
    "the model returns its loss and no prediction, which sampled targets are of: return both, as a "
    "tuple or a dict, or pass statistics=kfc_fx.Statistics(fisher='empirical')"
)
EMPTY = "the batch holds no example"
UNDECIDED = (
    "the gradient of the loss with respect to the model's output is zero or not finite, and tells "
    "nothing of the likelihood"
)


class Pass(Protocol):
    """A pass that takes statistics."""

    lasts: bool
    """Whether it lasts as long as the loss's; else it is over when :meth:`begin` returns."""

    def begin(self) -> None:
        """Take statistics from now on."""


class LossPasses:
    """Those of all collectors that take statistics of one forward pass.

    Args:
        losses: scalars of the output by their place among the tapped tensors. Where the loss is
            one of them, its gradient with respect to the prediction comes by within the model.
    """

    def __init__(self, passes: Sequence[LossPass], losses: dict[int, Node | None]) -> None:
        self._passes, self._losses = tuple(passes), losses
        self._waiting: list[LossPass] = []
        if losses:
            for prediction in {id(p.likeliest.tensor): p.likeliest for p in passes}.values():
                prediction.tensor.register_hook(_Within(self, prediction.tensor))

    def __call__(self, cotangents: Sequence[Tensor | None]) -> None:
        """The tap's backward: a backward pass comes by, with the cotangents of the tapped tensors,
        and has not reached a layer yet."""
        ready: list[tuple[LossPass, Pass | None]] = []
        for own in self._passes:
            if own.over or not own.reaches_weights() or own.joins() or own.is_auxiliary():
                continue
            if self._comes_within(own, cotangents):
                self._waiting.append(own)  # for all of the gradient, from outside too
            else:
                given = own.differentiated(cotangents)
                ready.append((own, own.begun(*(given or (own.likeliest, None)))))
        _begin(ready)

    def within(self, tensor: Tensor, cotangent: Tensor) -> None:
        """The cotangent of a prediction, of a loss that the model has computed from it."""
        here = [own for own in self._waiting if own.likeliest.tensor is tensor]
        self._waiting = [own for own in self._waiting if own not in here]
        _begin([(own, own.begun(own.likeliest, cotangent)) for own in here])

    def _comes_within(self, own: LossPass, cotangents: Sequence[Tensor | None]) -> bool:
        """Whether the loss is a scalar of the output that was computed from the prediction."""
        target = own.likeliest.tensor.grad_fn
        starts = [node for place, node in self._losses.items() if cotangents[place] is not None]
        return target is not None and any(_leads_to(node, target) for node in starts)


def _begin(passes: Sequence[tuple[LossPass, Pass | None]]) -> None:
    """Passes of their own run at once, before those are opened that last as long as the loss's."""
    for own in sorted((own for _, own in passes if own), key=lambda own: own.lasts):
        own.begin()
    for loss_pass, _ in passes:  # after what the passes themselves do at the end
        Variable._execution_engine.queue_callback(loss_pass.note_gradients)


class LossPass:
    """Takes the statistics of one forward pass for one collector, once, in the first backward pass
    that gives its parameters gradients. Passes to inputs alone, as for saliency, attacks or
    penalties, take nothing.

    Several forward passes may be on the way of one loss: of a module of the model, and of another
    one that its output went into. The first that the backward pass reaches has the prediction, and
    the others give their statistics to its pass.

    Args:
        predictions: tensors of the output whose likelihood may be meant, the likeliest first.
        entry: path of the module that was called, where it was not the model.
    """

    def __init__(
        self, setup: PassSetup, predictions: Sequence[Prediction], entry: str | None = None
    ) -> None:
        self.setup = setup
        self._predictions, self._entry = tuple(predictions), entry
        self.over: bool = False
        """Whether its backward pass has come by."""
        self._pass: Pass | None = None
        self._nodes: list[Node | None] = []
        self._delivered = False
        setup.taps.waiting.add(self)

    @property
    def likeliest(self) -> Prediction:
        """The prediction that is meant where the loss does not say so."""
        return self._predictions[0]

    def differentiated(
        self, cotangents: Sequence[Tensor | None]
    ) -> tuple[Prediction, Tensor] | None:
        """The prediction that the loss differentiates most, with its cotangent."""
        seen = {p: cotangents[p.position] for p in self._predictions}
        given = {p: cotangent for p, cotangent in seen.items() if cotangent is not None}
        if len(given) > 1:
            return max(given.items(), key=_size)
        return next(iter(given.items()), None)

    def joins(self) -> bool:
        """Whether the statistics are taken by a pass that the backward pass has opened already: for
        a forward pass that this one's output went into or, where both are calls of modules, for
        another module's on the same examples."""
        taps = self.setup.taps
        opened: list[LossPass] = taps.current
        if not opened and self.setup.opened:  # in a pass within the one that opened it
            opened = taps.opened
        above = [own for own in opened if self.is_among(_reached(own._nodes))]
        found = above or self._beside(opened)
        if not found:
            return False
        chosen = found[-1]
        if isinstance(chosen._pass, GradientPass):
            chosen._pass.add(self.setup)
        elif isinstance(chosen._pass, FisherPass):
            return False  # its examples have had their targets; this is another branch
        elif chosen._delivered:
            self.setup.deliver(self.setup.record.inputs, self.setup.record, 0, 0.0)
        self._end()
        return True

    def _beside(self, opened: Sequence[LossPass]) -> list[LossPass]:
        """Those of other modules that were called on the same examples, as an actor and a critic
        are. The same module called again, or another number of examples, is another batch."""
        if self._entry is None or any(own._entry == self._entry for own in opened):
            return []
        examples = self.setup.examples
        return [o for o in opened if o._entry is not None and o.setup.examples == examples]

    def is_auxiliary(self) -> bool:
        """Whether the module was called on the way to another prediction too, which the backward
        pass has not reached yet: what it gives here is none, and is left out."""
        waiting = [own for own in self.setup.taps.waiting if own is not self and not own.over]
        same = [own for own in waiting if own._entry is not None and own._entry == self._entry]
        if not same:
            return False
        below = [own for own in waiting if own not in same and own.reaches_weights()]
        for own in below:
            reached = _reached([p.tensor.grad_fn for p in own._predictions])
            if any(one.is_among(reached) for one in same) and not self.is_among(reached):
                self._end()
                return True
        return False

    def _end(self) -> None:
        self.over, self._predictions = True, ()
        self.setup.taps.waiting.discard(self)

    def begun(self, prediction: Prediction, cotangent: Tensor | None) -> Pass | None:
        """The pass for a prediction with this cotangent; None where no more is to be done."""
        counted = not self._beside(self.setup.taps.current)
        self._nodes = [prediction.tensor.grad_fn]
        self._end()
        self._pass = self._found(prediction, cotangent, counted=counted)
        self.setup.taps.note_opened(self)
        return self._pass

    def _found(
        self, prediction: Prediction, cotangent: Tensor | None, *, counted: bool
    ) -> Pass | None:
        setup, record = self.setup, self.setup.record
        values = prediction.values
        if values is None:
            setup.miss("the output that the loss is computed from was changed in place")
            return None
        is_loss = values.dim() == 0  # its gradient with respect to a prediction is not seen
        if is_loss:
            cotangent = None
        if cotangent is not None and setup.request.maximize:
            cotangent = -cotangent
        if not values.numel():
            setup.miss(EMPTY)
            return None
        likelihood = self._likelihood(prediction, values, cotangent)
        if self._entry is not None and (known := setup.choice.of(prediction.path)) is not None:
            known.check(prediction.tensor)
        setup.sums().drop_lost(or_zero=True)
        setup.choice.note_examples(setup.examples, _examples(setup, values))
        alone = not any(not own.over for own in setup.taps.waiting)
        if alone and not record.probes and not record.again:  # none depends on the likelihood
            setup.deliver(record.inputs, record, _examples(setup, values), 0.0)
            self._delivered = True
            return None
        if likelihood is None:
            setup.miss(UNSEEN if cotangent is None else UNDECIDED)
            return None
        if record.fisher is None:
            record.fisher = setup.request.fisher_for(likelihood)
            record.share = setup.request.share(setup.examples, record.fisher)
        if record.fisher == "empirical":
            return GradientPass(setup, likelihood, values, cotangent)
        if record.again or is_loss:
            setup.miss(REENTRANT if record.again else LOSS_ALONE)
            return None
        others = self._above()
        return FisherPass(
            setup, likelihood, prediction.tensor, values, cotangent, others, counted=counted
        )

    def _above(self) -> list[PassSetup]:
        """Forward passes that the prediction was computed from and that have waited; they are over
        then."""
        waiting = [own for own in self.setup.taps.waiting if not own.over]
        if not waiting:
            return []
        reached = _reached(self._nodes)
        found = [own for own in waiting if own.is_among(reached) and own.reaches_weights()]
        for own in found:
            own._end()
            if own.setup.record.fisher is None:
                own.setup.record.fisher = "sampled"
                own.setup.record.share = own.setup.request.share(own.setup.examples, "sampled")
        return [own.setup for own in found]

    def is_among(self, nodes: Collection[Node | None]) -> bool:
        """Whether one of its output's tensors is what one of these nodes has computed."""
        return any(prediction.tensor.grad_fn in nodes for prediction in self._predictions)

    def _likelihood(
        self, prediction: Prediction, values: Tensor, cotangent: Tensor | None
    ) -> Likelihood | None:
        """That of a prediction, found from the loss where it was not known."""
        setup = self.setup
        if cotangent is None:
            return setup.choice.unseen(prediction.path)
        with torch.no_grad():
            return setup.choice.settled(
                values, cotangent, setup.examples, setup.batch_dim, prediction.path
            )

    def note_gradients(self) -> None:
        """Keep which parameters have gradients at the end of the backward pass."""
        self.setup.sums().note_gradients()
        self._nodes = []
        self.setup.taps.forget(self)

    def reaches_weights(self) -> bool:
        """Whether the backward pass that runs is one for gradients of parameters.

        A checkpoint that is reentrant hides its parameters, and refuses passes to inputs alone.
        """
        record = self.setup.record
        if record.again:
            return True
        if self._entry is not None and not record.rows:  # of no layer that is trained
            reached = _reached([prediction.tensor.grad_fn for prediction in self._predictions])
            waiting = [own for own in self.setup.taps.waiting if not own.over]
            above = [own for own in waiting if own.setup.record.rows and own.is_among(reached)]
            return any(own.reaches_weights() for own in above)
        weights = [weight for weight in record.weights.values() if weight.requires_grad]
        return not weights or any(map(_is_reached, weights))


class _Within:
    """A hook on the prediction, which must not keep what is above it alive."""

    def __init__(self, of: LossPasses, tensor: Tensor) -> None:
        self._of, self._tensor = weakref.ref(of), weakref.ref(tensor)

    def __call__(self, cotangent: Tensor) -> None:
        found, tensor = self._of(), self._tensor()
        if found is not None and tensor is not None:
            found.within(tensor, cotangent)


def _size(entry: tuple[Prediction, Tensor]) -> float:
    return float(torch.linalg.vector_norm(widened(entry[1].detach())))


def _examples(setup: PassSetup, values: Tensor) -> int:
    if values.dim() == 0:
        return setup.examples
    return values.shape[setup.batch_dim] if values.dim() > setup.batch_dim else 1


def _is_reached(weight: Tensor) -> bool:
    """Whether the backward pass that runs computes the gradient of a weight."""
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(weight).node))
    except RuntimeError:  # torch does not say so of a leaf that autograd.grad was asked for
        return True


def _leads_to(start: Node | None, target: Node) -> bool:
    """Whether a node other than the target itself leads down to it."""
    return start is not None and start is not target and target in _reached([start], target)


def _reached(starts: Sequence[Node | None], target: Node | None = None) -> set[Node | None]:
    """The nodes that some lead down to, these among them; no more of them than until the target."""
    waiting = [node for node in starts if node is not None]
    known: set[Node | None] = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in known:
                known.add(node)
                waiting.append(node)
                if node is target:
                    return known
    return known
