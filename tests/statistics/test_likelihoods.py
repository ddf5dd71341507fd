"""The likelihood of a model: found once and kept, named and checked, sampled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.tools.losses.check import SmallNet
from kfc_fx.tools.losses.models import ModelLoss, found_likelihood
from kfc_fx.tools.losses.table import loss_cases
from tests.models import collector_of

CASES = {case.name: case for case in loss_cases()}


def mlp(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, outputs))


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


def binary(z: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, torch.rand_like(z).round())


def test_the_decision_stays_and_is_saved_copied_and_shown():
    net = kfc_fx.compile(mlp())
    opt = kfc_fx.KFC(net)
    assert str(net.kfc.likelihood) == "None"
    train(net, opt, 2, binary)
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
    train(net, opt, 1, binary)
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
        train(net, opt, 1, lambda z: value * binary(z))
    assert net.kfc.likelihood is None
    for name, own in net.state_dict().items():
        assert torch.equal(own, before[name])
    train(net, opt, 1, binary)
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
        ("categorical", 3, binary, False),
        ("categorical", 3, lambda z: F.mse_loss(z, torch.randn(16, 3)), False),
        ("bernoulli", 3, binary, True),
        ("gaussian", 3, binary, True),
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


def test_one_logit_has_the_variance_of_its_label():
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
        for number in range(repeats):
            collector.arm(number=number)
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
