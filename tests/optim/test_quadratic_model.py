"""``quadratic_model`` and ``adapt_damping``: steps that the exact Fisher matrix measures."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.errors import StepError
from kfc_fx.optim.exact.fisher_vector import fisher_gram
from kfc_fx.optim.exact.quadratic_model import best_combination
from kfc_fx.optim.exact.trial import LEAST, MOST, adapted_damping
from kfc_fx.statistics.likelihoods.bernoulli import Bernoulli
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.likelihoods.gaussian import Gaussian
from tests.options import kfc

LOSSES = {
    "categorical": lambda z, y: F.cross_entropy(z, y.argmax(1)),
    "gaussian": lambda z, y: 0.5 * (z - y).square().sum() / len(z),
    "bernoulli": lambda z, y: (
        F.binary_cross_entropy_with_logits(z, (y > 0).to(z.dtype), reduction="sum") / len(z)
    ),
}


def network(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.BatchNorm1d(8), nn.Linear(8, 4)]
    return nn.Sequential(*layers).double()


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = {"generator": generator, "dtype": torch.float64}
    return torch.randn(64, 6, **shape), torch.randn(64, 4, **shape)


@pytest.mark.parametrize(
    ("likelihood", "name"),
    [(Categorical(), "categorical"), (Gaussian(), "gaussian"), (Bernoulli(), "bernoulli")],
    ids=str,
)
def test_the_gram_is_that_of_the_written_out_fisher_matrix(likelihood, name):
    net, (x, _) = network(), batch()
    weights = {n: p.detach() for n, p in net.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    vectors = [
        {n: torch.randn(p.shape, generator=generator).double() for n, p in weights.items()}
        for _ in range(2)
    ]
    vectors[1].pop("0.bias")

    def output(parameters):
        return torch.func.functional_call(copy.deepcopy(net), parameters, (x,))

    jacobian = torch.func.jacrev(output)(weights)
    directions = torch.stack(
        [
            sum(jacobian[n].flatten(2) @ v[n].flatten() for n in weights if n in v)
            for v in vectors
        ]
    )  # fmt: skip
    logits = output(weights)
    if name == "categorical":
        p = logits.softmax(1)
        fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    elif name == "bernoulli":
        p = logits.sigmoid()
        fisher = torch.diag_embed(p * (1 - p))
    else:
        fisher = torch.eye(4, dtype=torch.float64).expand(64, 4, 4)
    expected = torch.einsum("knc,ncd,lnd->kl", directions, fisher, directions) / 64
    found = fisher_gram(net, likelihood, ((x,), {}), vectors)
    torch.testing.assert_close(found, expected)


def test_the_best_combination_solves_the_model_and_leaves_out_what_is_zero():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 2, generator=generator).double()
    fisher, squares = root @ root.T, torch.tensor([[1.0, 0.3], [0.3, 2.0]]).double()
    slopes = torch.tensor([-1.0, 0.5]).double()
    found = best_combination(fisher, squares, slopes, 0.1)
    torch.testing.assert_close((fisher + 0.1 * squares) @ found, -slopes)
    tiny = torch.diag(torch.tensor([1.0, 1e-9])).double()  # a short vector is no less a direction
    scaled = best_combination(tiny @ fisher @ tiny, tiny @ squares @ tiny, tiny @ slopes, 0.1)
    torch.testing.assert_close(tiny @ scaled, found)
    fisher[1] = fisher[:, 1] = squares[1] = squares[:, 1] = slopes[1] = 0
    alone = best_combination(fisher, squares, slopes, 0.1)
    torch.testing.assert_close(alone, torch.stack([1 / (fisher[0, 0] + 0.1), alone[1] * 0]))


def test_parallel_vectors_are_one_direction():
    """Single precision leaves of the curvature across them nothing but rounding, of either sign."""
    along = torch.tensor([1.0, 0.3])
    for noise in (1e-6, -1e-6):
        fisher = torch.outer(along, along)
        fisher[1, 1] += noise * fisher[1, 1]
        slopes = -2 * along.double()
        found = best_combination(fisher, torch.zeros(2, 2), slopes, 0.0)
        assert found.abs().max() < 10
        torch.testing.assert_close(
            found @ along.double(), torch.tensor(2.0).double(), rtol=1e-3, atol=0
        )


def test_training_from_the_model_does_not_blow_up_in_single_precision():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 16, 10),
    )  # fmt: skip
    x, y = torch.randn(64, 3, 8, 8), torch.randint(10, (64,))
    model = kfc_fx.compile(net)
    opt = kfc(model, scaling="inverse", quadratic_model=True, seed=0)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.detach().item())
    assert max(losses) < 4 * losses[0]
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("likelihood", sorted(LOSSES))
def test_steps_are_where_the_model_is_least(likelihood):
    (x, y), damping = batch(), 0.02
    model = kfc_fx.compile(network(), likelihood=likelihood)
    opt = kfc(model, lr=0.3, scaling="inverse", quadratic_model=True, damping=damping)
    names = [name for name, _ in model.named_parameters()]
    previous = None
    for step in range(5):
        before = copy.deepcopy(model)
        opt.zero_grad()
        LOSSES[likelihood](model(x), y).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
        opt.step()
        old = dict(before.named_parameters())
        moved = {n: (p - old[n]).detach() for n, p in model.named_parameters()}
        along = [moved] if previous is None else [moved, previous]
        kind = model.kfc.likelihood
        fisher = fisher_gram(before, kind, ((x,), {}), along).double()
        for row, vector in enumerate(along):
            slope = sum((gradient[n] * vector[n]).sum() for n in names)
            square = sum((moved[n] * vector[n]).sum() for n in names)
            # At the least of the model its slope along every direction of the step is zero.
            residual = slope + fisher[0, row] + damping * square
            assert abs(residual) < 1e-5 * abs(slope) + 1e-12, (step, row)
        assert opt.diagnostics.step_size > 0
        assert (opt.diagnostics.momentum == 0) == (previous is None)
        previous = moved


def test_the_rate_does_not_matter_to_blocks():
    ends = []
    for lr in (1.0, 1e-3):
        (x, y), model = batch(), kfc_fx.compile(network())
        opt = kfc(model, lr=lr, scaling="inverse", quadratic_model=True, seed=0)
        for _ in range(3):
            opt.zero_grad()
            LOSSES["categorical"](model(x), y).backward()
            opt.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def closure_of(model, opt, x, y, calls):
    def closure():
        calls.append(torch.get_rng_state())
        opt.zero_grad()
        loss = LOSSES["categorical"](model(x), y)
        loss.backward()
        return loss

    return closure


def test_the_ratio_is_the_change_of_the_loss_over_the_prediction():
    (x, y), calls = batch(), []
    model = kfc_fx.compile(network(dropout=0.3))
    opt = kfc(model, lr=0.1, scaling="inverse", adapt_damping=1, damping=0.05, fisher="empirical")
    closure = closure_of(model, opt, x, y, calls)
    opt.step(closure)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    damping = opt.diagnostics.damping
    loss = opt.step(closure)
    assert len(calls) == 4
    assert torch.equal(calls[2], calls[3])  # the same dropout
    assert torch.equal(calls[2], state)
    after = model
    old = dict(before.named_parameters())
    moved = {n: (p - old[n]).detach() for n, p in after.named_parameters()}
    torch.set_rng_state(state)
    twin = copy.deepcopy(before)
    loss_before = LOSSES["categorical"](twin(x), y)
    gradients = torch.autograd.grad(loss_before, list(twin.parameters()))
    torch.set_rng_state(state)
    fisher = fisher_gram(before, Categorical(), ((x,), {}), [moved])[0, 0]
    torch.set_rng_state(state)
    changed = copy.deepcopy(before)
    changed.load_state_dict({**dict(before.named_buffers()), **dict(after.named_parameters())})
    loss_after = LOSSES["categorical"](changed(x), y)
    slope = sum((g * m).sum() for g, m in zip(gradients, moved.values(), strict=True))
    square = sum(m.square().sum() for m in moved.values())
    predicted = slope + (fisher + damping * square) / 2
    assert loss == loss_before
    ratio = float(((loss_after - loss_before) / predicted).detach())
    assert opt.diagnostics.reduction_ratio == pytest.approx(ratio, rel=1e-6)


def test_buffers_and_generators_are_as_after_one_call():
    results = []
    for interval in (1, None):
        (x, y), model = batch(), kfc_fx.compile(network(dropout=0.3))
        torch.manual_seed(3)
        opt = kfc(model, lr=0.1, scaling="inverse", adapt_damping=interval, seed=0)
        opt.step(closure_of(model, opt, x, y, []))
        results.append([*model.buffers(), torch.get_rng_state()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_damping_follows_the_ratio():
    assert adapted_damping(1.0, 0.9, 5) == pytest.approx((19 / 20) ** 5)
    assert adapted_damping(1.0, 0.5, 5) == 1.0
    assert adapted_damping(1.0, 0.1, 5) == pytest.approx((20 / 19) ** 5)
    assert adapted_damping(1.0, float("nan"), 5) > 1
    # Where nothing changes any more it stays within bounds, but for a user's own beyond them.
    assert adapted_damping(LEAST, 0.9, 5) == LEAST
    assert adapted_damping(MOST, float("nan"), 5) == MOST
    assert adapted_damping(1e-12, 0.9, 5) == 1e-12
    assert adapted_damping(0.0, 0.1, 5) == 0.0


def test_adapted_damping_is_used_saved_and_loaded():
    (x, y), model = batch(), kfc_fx.compile(network())
    opt = kfc(model, lr=0.1, scaling="inverse", adapt_damping=2)
    for _ in range(6):
        opt.step(closure_of(model, opt, x, y, []))
    adapted = opt.diagnostics.damping
    assert adapted != 0.01
    (numbers,) = opt._models[0]._option_numbers(opt._engine).values()
    assert numbers["damping"] == adapted
    other_model = kfc_fx.compile(network())
    other = kfc(other_model, lr=0.1, scaling="inverse", adapt_damping=2)
    other.load_state_dict(opt.state_dict())
    assert other.diagnostics.damping == adapted


def test_a_step_without_a_closure_is_refused_where_the_damping_is_adapted():
    (x, y), model = batch(), kfc_fx.compile(network())
    opt = kfc(model, lr=0.1, scaling="inverse", adapt_damping=2)
    for _ in range(2):
        LOSSES["categorical"](model(x), y).backward()
        if opt.diagnostics.steps == 1:
            with pytest.raises(StepError, match=r"call opt.step\(closure\)"):
                opt.step()
        else:
            opt.step()
        opt.zero_grad()


def test_a_closure_without_a_loss_is_refused_before_the_step():
    (x, y), model = batch(), kfc_fx.compile(network())
    opt = kfc(model, lr=0.1, scaling="inverse", adapt_damping=1)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        LOSSES["categorical"](model(x), y).backward()

    with pytest.raises(StepError, match="a closure that returns the loss"):
        opt.step(closure)
    assert all(torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))
    assert opt.diagnostics.steps == 0
