"""The backward passes that statistics are taken in."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kfc_fx
from kfc_fx.statistics.request import StatisticsRequest
from kfc_fx.statistics.sums import Sums
from tests.models import IMAGES, LABELS, collector_of, conv_network, make
from tests.options import kfc

BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


def make_whole(backend: str = "eager", **options) -> tuple[nn.Module, kfc_fx.KFC]:
    """With statistics of whole batches."""
    return make(backend=backend, samples=None, **options)


def factors(opt: kfc_fx.KFC) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (own.omega, own.gamma) for name, own in opt.factors.items()}


class Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("fisher", "passes"), [("empirical", [2, 1]), ("sampled", [3, 2])])
def test_empirical_statistics_take_no_backward_pass_of_their_own(fisher, passes):
    compiled, opt = make_whole(fisher=fisher)
    loss = F.cross_entropy(compiled(IMAGES), LABELS)
    with Operators() as operators:
        loss.backward()
    # One that goes to the sites alone ends at the first convolution.
    names = ("convolution_backward", "native_batch_norm_backward")
    assert [operators.counts[name] for name in names] == passes
    opt.step()
    assert set(opt.factors) == {"0", "1", "3", "6"}


@BACKENDS
def test_empirical_factors_are_of_the_gradients_of_the_loss(backend):
    """Also where the loss is none of the likelihood's own: its scale alone is fitted. Rows are at
    their own scale, that of a smoothed one to the share of a target that is smoothed away."""
    compiled, opt = make_whole(backend, fisher="empirical")
    compiled.eval()
    weights = torch.rand(5) + 0.5
    logits = compiled(IMAGES)
    loss = 3 * F.cross_entropy(logits, LABELS, weight=weights, label_smoothing=0.1)
    (own,) = torch.autograd.grad(
        3
        * F.cross_entropy(
            z := logits.detach().requires_grad_(), LABELS, weights, label_smoothing=0.1
        ),
        z,
    )
    likely = logits.detach().softmax(1) - F.one_hot(LABELS, 5)
    squares = own.square().sum(1)
    scale = (squares / (3 * weights[LABELS] / weights[LABELS].sum())).sum() / squares.sum()
    rows = own * scale
    loss.backward()
    opt.step()
    ratio = opt.factors["6"].gamma / (rows.T @ rows / len(IMAGES))
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
    assert 1 <= ratio.mean() < 1 / (1 - 0.1) ** 2
    # Weights change its directions, and not only its scale.
    assert not torch.allclose(opt.factors["6"].gamma, likely.T @ likely / len(IMAGES), rtol=0.02)


def test_gradients_of_parameters_alone_give_the_same_statistics():
    compiled, opt = make_whole()
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    opt.step()
    expected = factors(opt)
    compiled, opt = make_whole()
    parameters = list(compiled.parameters())
    loss = F.cross_entropy(compiled(IMAGES), LABELS)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    opt.step()
    torch.testing.assert_close(factors(opt), expected, rtol=0, atol=0)


def test_a_compiled_graph_needs_a_whole_backward_pass():
    compiled, opt = make_whole("aot_eager")
    loss = F.cross_entropy(compiled(IMAGES), LABELS)
    loss.backward(inputs=list(compiled.parameters()))
    with pytest.raises(kfc_fx.StatisticsError, match=r"by loss.backward\(\), without inputs="):
        opt.step()


def test_a_backward_pass_that_is_differentiated_keeps_no_graph_of_statistics():
    compiled, opt = make_whole()
    compiled.eval()
    parameters = list(compiled.parameters())
    loss = F.cross_entropy(compiled(IMAGES), LABELS)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    sums = collector_of(compiled).sums.blocks
    assert set(sums) == {"0", "1", "3", "6"}
    assert not any(value.requires_grad for own in sums.values() for value in own.values())
    before = {name: dict(own) for name, own in sums.items()}
    (loss + sum(g.square().sum() for g in gradients)).backward()
    for name, own in collector_of(compiled).sums.blocks.items():  # not taken a second time
        torch.testing.assert_close(own, before[name], rtol=0, atol=0)
    opt.step()


def test_micro_batches_add_up():
    compiled, opt = make_whole(fisher="empirical")
    compiled.eval()
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    opt.step()
    expected = factors(opt)
    for together in (False, True):
        compiled, opt = make_whole(fisher="empirical")
        compiled.eval()
        parts = zip(IMAGES.split(4), LABELS.split(4), strict=True)
        losses = [F.cross_entropy(compiled(x), y) / 3 for x, y in parts]
        if together:
            sum(losses).backward()
        else:
            for loss in losses:
                loss.backward()
        opt.step()
        torch.testing.assert_close(factors(opt), expected, rtol=1e-4, atol=1e-4)


def test_a_second_backward_pass_collects_nothing_more():
    compiled, _ = make_whole(fisher="empirical")
    loss = F.cross_entropy(compiled(IMAGES), LABELS)
    loss.backward(retain_graph=True)
    before = copy.deepcopy(collector_of(compiled).sums.blocks)
    loss.backward()
    torch.testing.assert_close(collector_of(compiled).sums.blocks, before, rtol=0, atol=0)
    assert collector_of(compiled).sums.examples == 12


@BACKENDS
def test_a_backward_pass_that_fails_leaves_nothing_behind(backend):
    compiled, opt = make_whole(backend, fisher="empirical")
    compiled.eval()

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("out of memory, say")

    first = compiled[0].weight
    handle = first.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        F.cross_entropy(compiled(IMAGES), LABELS).backward()
    assert not collector_of(compiled).taking  # at once: another model may be next
    handle.remove()
    opt.zero_grad()
    assert not collector_of(compiled).taking
    assert not collector_of(compiled).sums.blocks
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    assert not collector_of(compiled).taking
    opt.step()
    found = factors(opt)
    compiled, opt = make_whole(backend, fisher="empirical")
    compiled.eval()
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    opt.step()
    torch.testing.assert_close(found, factors(opt), rtol=0, atol=0)


def test_a_loss_without_gradient_at_the_prediction_gives_zeros():
    compiled = kfc_fx.compile(conv_network(), likelihood="categorical")
    opt = kfc(compiled, fisher="empirical", samples=None)
    (0 * F.cross_entropy(compiled(IMAGES), LABELS)).backward()
    opt.step()
    assert opt.diagnostics.dropped_statistics == {}
    assert not opt.factors["6"].gamma.any()
    assert opt.factors["6"].omega.any()


@pytest.mark.parametrize(
    ("likelihood", "options", "fisher"),
    [
        ("categorical", {}, "empirical"),
        ("categorical", {"scaling": "spectral"}, "empirical"),
        ("categorical", {"fisher": "sampled"}, "sampled"),
        ("categorical", {"scaling": "eigen"}, "sampled"),
        ("categorical", {"blocks": {"0": {"scaling": "inverse"}}}, "sampled"),
        ("bernoulli", {}, "sampled"),
        ("gaussian", {}, "sampled"),
        (lambda z: z, {}, "sampled"),
    ],
)
def test_by_default_gradients_of_the_loss_serve_where_only_directions_count(
    likelihood, options, fisher
):
    compiled = kfc_fx.compile(conv_network(), likelihood=likelihood)
    _opt = kfc(compiled, **options)
    collector = collector_of(compiled)
    assert collector.request.fisher_for(collector.likelihood) == fisher


class WithLoss(nn.Module):
    """Computes its loss itself, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@BACKENDS
def test_a_loss_that_the_model_computes_gives_the_same_statistics(backend):
    compiled, opt = make_whole(backend)
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    opt.step()
    expected = factors(opt)
    compiled = kfc_fx.compile(WithLoss(), backend=backend)
    opt = kfc(compiled, lr=0.01, samples=None)
    compiled(IMAGES, LABELS)["loss"].backward()
    opt.step()
    found = {name.removeprefix("net."): own for name, own in factors(opt).items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_loss_that_the_model_computes_is_seen():
    """At its scale, which "eigen" depends on; a copy that returns its logits says what it is."""
    expected, opt = make_whole(fisher="empirical", scaling="eigen")
    (3 * F.cross_entropy(expected(IMAGES), LABELS)).backward()
    opt.step()
    compiled = kfc_fx.compile(WithLoss())
    other = kfc(compiled, lr=0.01, fisher="empirical", scaling="eigen", samples=None)
    (3 * compiled(IMAGES, LABELS)["loss"]).backward()
    other.step()
    (line,) = compiled.kfc.plan.likelihood
    assert line.startswith("Categorical(dim=-1) of output 'logits': ")
    found = {name.removeprefix("net."): own for name, own in factors(other).items()}
    torch.testing.assert_close(found, factors(opt), rtol=1e-4, atol=1e-6)


def test_where_the_scale_matters_the_loss_must_be_seen():
    compiled = kfc_fx.compile(WithLoss(), backend="aot_eager")
    _opt = kfc(compiled, lr=0.01, fisher="empirical", scaling="eigen")
    with pytest.raises(kfc_fx.OutputError, match=r"loss was not computed from it.*sampled"):
        compiled(IMAGES, LABELS)["loss"].backward()
    assert not collector_of(compiled).taking


# -- passes beside each other ----------------------------------------------------------------


def collected(fisher: str, batches: list[slice], losses_of: Callable[..., None]) -> Sums:
    """The statistics of a share of each of some batches."""
    compiled = kfc_fx.compile(conv_network().double().eval())
    collector = compiled.kfc.attach(StatisticsRequest(fisher=fisher, samples=3, seed=0))
    collector.arm()
    losses_of([lambda own=own: loss_of(compiled, own) for own in batches])
    return collector.take()


def loss_of(model: nn.Module, batch: slice) -> torch.Tensor:
    return F.cross_entropy(model(IMAGES[batch].double()), LABELS[batch], reduction="sum")


def one_by_one(losses: list[Callable[[], torch.Tensor]]) -> None:
    for loss in losses:
        loss().backward()


def summed(losses: list[Callable[[], torch.Tensor]]) -> None:
    sum(loss() for loss in losses).backward()


def one_within_the_other(losses: list[Callable[[], torch.Tensor]]) -> None:
    first, *others = losses
    loss = first()
    loss.register_hook(lambda _: torch.enable_grad()(one_by_one)(others))
    loss.backward()


def in_threads(losses: list[Callable[[], torch.Tensor]]) -> None:
    """The forward passes one after the other, the backward passes at once."""
    threads = [threading.Thread(target=loss.backward) for loss in [loss() for loss in losses]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("together", [summed, one_within_the_other, in_threads])
def test_each_forward_pass_has_the_share_of_its_own_batch(together):
    """However backward passes meet, statistics are of the first three examples of each batch, and
    scaled by the size of each batch."""
    batches = [slice(0, 4), slice(4, 12)]
    expected = collected("empirical", batches, one_by_one)
    found = collected("empirical", batches, together)
    assert found.examples == expected.examples
    assert found.rows == expected.rows
    torch.testing.assert_close(found.blocks, expected.blocks)


def test_models_that_train_in_threads_do_not_meet():
    """One takes statistics all the time, the other never: neither sees the other's passes."""

    def train(armed: bool) -> None:
        compiled = kfc_fx.compile(conv_network().double().eval())
        compiled.kfc.trace(IMAGES.double())
        collector = compiled.kfc.attach(StatisticsRequest(fisher="empirical", seed=0))
        collector.arm(armed)
        barrier.wait()
        for _ in range(20):
            loss_of(compiled, slice(0, 4)).backward()
            sums[armed].append(collector.take())

    barrier, sums = threading.Barrier(2), {True: [], False: []}
    threads = [threading.Thread(target=train, args=(armed,)) for armed in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [own.examples for own in sums[True]] == [4] * 20
    for own in sums[True]:
        torch.testing.assert_close(own.blocks, sums[True][0].blocks)
    assert not any(own.blocks for own in sums[False])
