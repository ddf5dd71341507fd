"""The likelihood that is found from a loss, and factors at its scale."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.statistics.likelihoods.evidence import find_likelihood
from kfc_fx.tools.losses.case import LossCase
from kfc_fx.tools.losses.check import SmallNet, check_loss
from kfc_fx.tools.losses.models import ModelLoss, found_likelihood, model_losses
from kfc_fx.tools.losses.table import loss_cases
from tests.models import collector_of

CASES = {case.name: case for case in loss_cases()}
SOFT = (0.97, 1.03)
"""Bounds of the scale where targets are soft, or there is a penalty."""


def mlp(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, outputs))


@pytest.mark.parametrize("name", CASES)
def test_a_loss_tells_its_likelihood_and_the_scale_of_its_factors(name: str):
    case = CASES[name]
    found = check_loss(case)
    assert found.decision == case.decision
    assert bool(found.doubt) == case.doubtful
    assert found.direction < 1e-9
    if case.examples is not None:
        assert found.scale is not None
        bounds = (1 - 1e-6, 1 + 1e-6) if case.exact == "scale" else SOFT
        assert bounds[0] < found.scale < bounds[1]


@pytest.mark.parametrize("scale", [2.0**16, 0.25])
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.exact == "scale" and case.examples]
)
def test_a_gradient_scaler_changes_neither(name: str, scale: float):
    case = CASES[name]
    scaled = LossCase(**vars(case) | {"loss": lambda z: scale * case.loss(z)})
    assert check_loss(scaled).decision == case.decision
    assert check_loss(scaled).scale == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if not case.doubtful and case.exact != "soft"]
)
def test_the_likelihood_is_found_in_lower_precision_and_of_any_spread(name, spread, dtype):
    """Of what autocast gives: the output in half precision, the loss in single precision."""
    if dtype == torch.bfloat16 and "pos_weight" in name and spread < 1:
        pytest.skip("five units of rounding tell no two weights apart")
    case = CASES[name]
    torch.manual_seed(0)
    z = case.output(spread * torch.randn(case.shape)).to(dtype).requires_grad_()
    case.loss(z.double()).backward()
    found = find_likelihood(z.detach().float(), z.grad, case.shape[0])
    assert found is not None
    assert repr(found.likelihood) == case.decision


@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(32,), (64, 1), (32, 10), (16, 500), (8, 3, 6, 6)]),
    spread=st.floats(0.05, 5),
    error=st.floats(0.05, 3),
    kind=st.sampled_from(["mse_loss", "l1_loss", "smooth_l1_loss"]),
)
def test_a_regression_is_taken_for_nothing_else(seed, shape, spread, error, kind):
    """Whatever its outputs are like, and however near its targets."""
    generator = torch.Generator().manual_seed(seed)
    z = (spread * torch.randn(shape, generator=generator)).requires_grad_()
    y = z.detach() + error * torch.randn(shape, generator=generator)
    getattr(F, kind)(z, y).backward()
    found = find_likelihood(z.detach(), z.grad, shape[0])
    assert found is not None
    assert isinstance(found.likelihood, kfc_fx.Gaussian)


@pytest.mark.parametrize("library", ["torchvision", "transformers", "diffusers"])
def test_models_of_other_libraries_tell_theirs(library: str, subtests):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install kfc_fx[zoo]")
    for case in model_losses(library):
        with subtests.test(case.name):
            assert found_likelihood(case) == case.decision


class WithLoss(nn.Module):
    """Computes its loss itself."""

    def __init__(self, loss, outputs: int) -> None:
        super().__init__()
        self.net, self.loss = mlp(outputs), loss

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": self.loss(logits, y), "logits": logits}


@pytest.mark.parametrize(
    ("loss", "targets", "decision"),
    [
        (F.cross_entropy, lambda: torch.randint(3, (16,)), "Categorical()"),
        (F.binary_cross_entropy_with_logits, lambda: torch.rand(16, 3).round(), "Bernoulli()"),
        (F.mse_loss, lambda: torch.randn(16, 3), "Gaussian()"),
    ],
)
def test_a_loss_within_a_compiled_graph_tells_by_its_function(loss, targets, decision):
    case = ModelLoss(
        "", "", lambda: WithLoss(loss, 3), lambda m: m(torch.randn(16, 6), targets())["loss"]
    )
    assert found_likelihood(case, "aot_eager") == f"{decision} of output 'logits'"


def test_a_loss_within_a_compiled_graph_that_tells_nothing_asks_for_the_name():
    model = kfc_fx.compile(WithLoss(lambda z, y: (z - y).square().mean(), 3), backend="aot_eager")
    opt = kfc_fx.KFC(model)
    model(torch.randn(16, 6), torch.randn(16, 3))["loss"].backward()
    with pytest.raises(
        kfc_fx.StatisticsError, match="likelihood cannot be found: pass likelihood="
    ):
        opt.step()


# -- the decision stays ----------------------------------------------------------------------


def train(net: nn.Module, opt: kfc_fx.KFC, steps: int, loss) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss(net(torch.randn(16, 6))).backward()
        opt.step()


def coins(z: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, torch.rand_like(z).round())


def test_the_decision_stays_and_is_saved_copied_and_shown():
    net = kfc_fx.compile(mlp())
    opt = kfc_fx.KFC(net)
    assert str(net.kfc.likelihood) == "None"
    train(net, opt, 2, coins)
    assert net.kfc.likelihood == kfc_fx.Bernoulli()
    assert "likelihood  Bernoulli(): the loss's gradient is that of logits" in str(net.kfc.plan)
    assert "likelihood: Bernoulli(), sampled" in repr(opt)
    train(net, opt, 2, lambda z: z.square().mean())  # of another loss in mid-run
    assert net.kfc.likelihood == kfc_fx.Bernoulli()
    assert copy.deepcopy(net).kfc.likelihood == kfc_fx.Bernoulli()
    fresh = kfc_fx.compile(mlp())
    other = kfc_fx.KFC(fresh)
    other.load_state_dict(opt.state_dict())
    assert fresh.kfc.likelihood == kfc_fx.Bernoulli()
    assert fresh.kfc.choice.lines == net.kfc.choice.lines


def test_a_named_likelihood_is_not_replaced_by_a_saved_one():
    net = kfc_fx.compile(mlp())
    opt = kfc_fx.KFC(net)
    train(net, opt, 1, coins)
    fresh = kfc_fx.compile(mlp(), likelihood="gaussian")
    other = kfc_fx.KFC(fresh)
    other.load_state_dict(opt.state_dict())
    assert fresh.kfc.likelihood == kfc_fx.Gaussian()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_first_gradient_that_tells_nothing_decides_nothing(value: float):
    net = kfc_fx.compile(mlp())
    opt = kfc_fx.KFC(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(kfc_fx.KfcWarning, match="the step is skipped"):
        train(net, opt, 1, lambda z: value * coins(z))
    assert net.kfc.likelihood is None
    for name, own in net.state_dict().items():
        assert torch.equal(own, before[name])
    train(net, opt, 1, coins)
    assert net.kfc.likelihood == kfc_fx.Bernoulli()
    assert opt.diagnostics.steps == 1


def test_two_heads_that_train_by_turns_have_a_likelihood_each():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.other = mlp(5), nn.Linear(5, 3), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return self.one(h), self.other(h)

    net = kfc_fx.compile(Heads())
    opt = kfc_fx.KFC(net)
    train(net, opt, 1, lambda out: F.cross_entropy(out[0], torch.randint(3, (16,))))
    train(net, opt, 1, lambda out: F.mse_loss(out[1], torch.randn(16, 1)))
    first, second = net.kfc.plan.likelihood
    assert first.startswith("Categorical(dim=-1) of output '0': ")
    assert second.startswith("Gaussian() of output '1': ")


# -- a likelihood that was named -------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "outputs", "loss", "fits"),
    [
        ("categorical", 3, lambda z: F.cross_entropy(z, torch.randint(3, (16,))), True),
        ("categorical", 3, coins, False),
        ("categorical", 3, lambda z: F.mse_loss(z, torch.randn(16, 3)), False),
        ("bernoulli", 3, coins, True),
        ("gaussian", 3, coins, True),
        ("gaussian", 3, lambda z: F.mse_loss(z, torch.randn(16, 3)), True),
    ],
)
def test_a_named_likelihood_is_checked_by_the_loss(named, outputs, loss, fits, recwarn):
    net = kfc_fx.compile(mlp(outputs), likelihood=named)
    train(net, kfc_fx.KFC(net), 2, loss)
    told = [str(w.message) for w in recwarn if "does not fit the loss" in str(w.message)]
    assert len(told) == (0 if fits else 1)
    if not fits:
        assert f"likelihood={net.kfc.likelihood} does not fit" in told[0]
        assert "likelihood='auto'" in told[0]


def test_one_class_is_an_error():
    net = kfc_fx.compile(mlp(1), likelihood="categorical")
    _opt = kfc_fx.KFC(net)
    with pytest.raises(kfc_fx.OutputError, match=r"over one class.*'bernoulli'.*'gaussian'"):
        net(torch.randn(16, 6))


def test_one_logit_has_the_variance_of_its_coin():
    net = kfc_fx.compile(nn.Linear(8, 1))
    opt = kfc_fx.KFC(net, lr=0.0, statistics=kfc_fx.Statistics(samples=None, fisher="empirical"))
    x, y = torch.randn(256, 8), torch.rand(256, 1).round()
    z = net(x)
    F.binary_cross_entropy_with_logits(z, y).backward()
    opt.step()
    expected = (z.detach().sigmoid() - y).square().mean()
    torch.testing.assert_close(opt.factors[""].gamma[0, 0], expected)


# -- what a likelihood samples ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("likelihood", "output"),
    [
        (kfc_fx.Categorical(), lambda h: h),
        (kfc_fx.Categorical(), lambda h: F.log_softmax(h, -1)),
        (kfc_fx.Categorical(probabilities=True), lambda h: h.softmax(-1)),
        (kfc_fx.Bernoulli(), lambda h: h),
        (kfc_fx.Bernoulli(probabilities=True), torch.sigmoid),
        (kfc_fx.Gaussian(), lambda h: h),
    ],
    ids=["scores", "log-probabilities", "probabilities", "logits", "chances", "numbers"],
)
def test_sampled_cotangents_have_the_fisher_matrix_of_the_output(likelihood, output):
    """Seen from what is before a softmax or a sigmoid, along random directions."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, 4, generator=generator, dtype=torch.float64).expand(20_000, 4).contiguous()
    directions = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    z, pull = torch.func.vjp(output, h)
    (rows,) = pull(likelihood.sampled_cotangent(z, generator))
    found = (rows @ directions.T).T @ (rows @ directions.T) / len(rows)
    one = h[:1]
    tangents = [torch.func.jvp(output, (one,), (d[None],))[1] for d in directions]
    exact = likelihood.curvature(output(one), torch.stack(tangents))
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02 * float(exact.diagonal().mean()))


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_what_the_loss_ignores_counts_for_nothing(fisher):
    """Examples that are ignored give what a batch without them gives."""
    case = CASES["cross_entropy"]
    x, y = torch.randn(32, 6).double(), torch.randint(6, (32,))
    ignored = torch.arange(32) % 4 == 0

    def gamma(targets: Tensor, repeats: int) -> Tensor:
        net = kfc_fx.compile(SmallNet(case))
        collector = net.kfc.attach(
            kfc_fx.statistics.request.StatisticsRequest(fisher=fisher, seed=0)  # type: ignore[attr-defined]
        )
        total = 0
        for _ in range(repeats):
            collector.arm()
            F.cross_entropy(net(x), targets).backward()
            sums = collector_of(net).take()
            total = total + sums.blocks["last"]["gamma"][0] / sums.rows["last"][0]
        return total / repeats

    masked = torch.where(ignored, -100, y)
    found = gamma(masked, 1 if fisher == "empirical" else 400)
    net = SmallNet(case)
    z = net(x)[~ignored].detach()
    p = z.softmax(1)
    if fisher == "empirical":
        rows = p - F.one_hot(y[~ignored], 6)
        expected = rows.T @ rows / len(rows)
    else:
        expected = torch.diag(p.mean(0)) - p.T @ p / len(p)
    torch.testing.assert_close(
        found,
        expected,
        rtol=0.1 if fisher == "sampled" else 1e-6,
        atol=1e-2 if fisher == "sampled" else 1e-9,
    )


# -- outputs that are easily mistaken ----------------------------------------------------------


@pytest.mark.parametrize("masked", [-torch.inf, -1e9])
def test_masked_classes_leave_the_others_as_they_are(masked):
    """As actions that are not allowed: three of ten are left."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(10)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).masked_fill(torch.arange(10) >= 3, masked)

    net = kfc_fx.compile(Masked())
    statistics = kfc_fx.Statistics(fisher="empirical", samples=None)
    opt = kfc_fx.KFC(net, lr=0.0, scaling="eigen", statistics=statistics)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    z = net(x)
    F.cross_entropy(z, y).backward()
    opt.step()
    assert net.kfc.likelihood == kfc_fx.Categorical(dim=-1)
    rows = z.detach().softmax(1) - F.one_hot(y, 10)
    torch.testing.assert_close(opt.factors["net.2"].gamma, rows.T @ rows / 16)


@pytest.mark.parametrize("shape", [(1, 2), (1, 3), (2,), (3,), (4,), (2, 2)])
def test_a_few_residuals_are_no_classes(shape):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        z = torch.randn(shape, generator=generator).requires_grad_()
        F.mse_loss(z, torch.randn(shape, generator=generator)).backward()
        found = find_likelihood(z.detach(), z.grad, shape[0])
        assert isinstance(found.likelihood, kfc_fx.Gaussian)


def test_a_penalty_on_another_output_does_not_hide_the_loss_within_the_model():
    class WithHidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            hidden = self.net[1](self.net[0](x))
            logits = self.net[2](hidden)
            return {"loss": F.cross_entropy(logits, y), "logits": logits, "hidden": hidden}

    net = kfc_fx.compile(WithHidden())
    opt = kfc_fx.KFC(net)
    out = net(torch.randn(16, 6), torch.randint(3, (16,)))
    (out["loss"] + 10 * out["hidden"].square().mean()).backward()
    opt.step()
    (line,) = net.kfc.plan.likelihood
    assert line.startswith("Categorical(dim=-1) of output 'logits'")
    assert set(opt.factors) == {"net.0", "net.2"}


def test_an_output_may_have_another_form_in_evaluation():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.aux = mlp(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return (self.net(x), self.aux(x)) if self.training else self.net(x)

    net = kfc_fx.compile(Auxiliary())
    opt = kfc_fx.KFC(net)
    y = torch.randint(3, (16,))
    train(net, opt, 1, lambda out: F.cross_entropy(out[0], y) + 0.3 * F.cross_entropy(out[1], y))
    net.eval()
    train(net, opt, 1, lambda out: F.cross_entropy(out, y))
    assert opt.diagnostics.statistics_steps == 2


def test_classes_of_a_compiled_graph_are_where_the_loss_takes_them():
    class Signal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 5, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            z = self.conv(x)
            return {"loss": F.cross_entropy(z, y), "logits": z}

    case = ModelLoss(
        "", "", Signal, lambda m: m(torch.randn(8, 2, 7), torch.randint(5, (8, 7)))["loss"]
    )
    assert found_likelihood(case, "aot_eager") == "Categorical(dim=1) of output 'logits'"
