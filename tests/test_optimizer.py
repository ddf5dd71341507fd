"""KFC as a ``torch.optim.Optimizer``, and its failure policy."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(12, 2, 6, 6, generator=GENERATOR)
Y = torch.randint(5, (12,), generator=GENERATOR)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def make(net: nn.Module | None = None, **options):
    compiled = kfc_fx.compile(net or network())
    return compiled, kfc_fx.KFC(compiled, **{"lr": 0.01, "seed": 3, **options})


def train(compiled, opt, steps: int, scheduler=None) -> list[float]:
    losses = []
    for step in range(steps):
        index = torch.arange(step, step + 8) % 12
        loss = F.cross_entropy(compiled(X[index]), Y[index])
        loss.backward()
        opt.step()
        opt.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(found, expected) -> None:
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


# -- statistics and gradients --------


@pytest.mark.parametrize("scale", ["mean", "sum", "thousandth"])
def test_statistics_do_not_depend_on_the_loss_scale(scale):
    def sums(loss_of):
        compiled, _ = make(fisher="empirical")
        loss_of(compiled(X)).backward()
        return compiled.recorder.statistics.sums

    losses = {
        "mean": lambda z: F.cross_entropy(z, Y),
        "sum": lambda z: F.cross_entropy(z, Y, reduction="sum"),
        "thousandth": lambda z: F.cross_entropy(z, Y) / 1000,
    }
    for block, expected in sums(losses["mean"]).items():
        torch.testing.assert_close(sums(losses[scale])[block], expected)


def test_micro_batches_give_the_factors_and_gradients_of_the_whole_batch():
    def run(parts: int):
        net = network().double().eval()
        compiled, opt = make(net, fisher="empirical")
        for x, y in zip(X.double().chunk(parts), Y.chunk(parts), strict=True):
            F.cross_entropy(compiled(x), y, reduction="sum").backward()
        gradients = [p.grad.clone() for p in net.parameters()]
        opt.step()
        return gradients, opt.factors, parameters(net)

    gradients, factors, stepped = run(1)
    for found, expected in zip(run(3), (gradients, factors, stepped), strict=True):
        if isinstance(expected, dict):
            for name in expected:
                torch.testing.assert_close(found[name].omega, expected[name].omega)
                torch.testing.assert_close(found[name].gamma, expected[name].gamma)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_ordinary_steps_run_the_plain_graph():
    compiled, opt = make(factor_interval=1000, inverse_interval=1000)
    armed = []
    for _ in range(40):
        armed.append(compiled.recorder.armed)
        F.cross_entropy(compiled(X), Y).backward()
        assert bool(compiled.recorder.statistics.sums) == armed[-1]
        opt.step()
        opt.zero_grad()
    assert [step for step, due in enumerate(armed) if due] == [0, 1, 2, 4, 8, 16]
    assert opt.diagnostics.statistics_steps == 6


def test_a_second_backward_pass_collects_nothing_more():
    compiled, _ = make(fisher="empirical")
    loss = F.cross_entropy(compiled(X), Y)
    loss.backward(retain_graph=True)
    before = copy.deepcopy(compiled.recorder.statistics.sums)
    loss.backward()
    torch.testing.assert_close(compiled.recorder.statistics.sums, before, rtol=0, atol=0)
    assert compiled.recorder.statistics.examples == 12


def test_frozen_parameters_stay_and_can_be_unfrozen():
    net = network()
    net[0].weight.requires_grad_(False)
    net[6].bias.requires_grad_(False)
    compiled, opt = make(net)
    before = parameters(net)
    train(compiled, opt, 2)
    assert set(opt.factors) == {"3", "6"}
    assert opt.factors["6"].omega.shape == (64, 64)
    assert compiled.plan.frozen == ("0.weight", "6.bias")
    assert torch.equal(net[0].weight, before[0])
    net[0].weight.requires_grad_(True)
    train(compiled, opt, 4)
    assert set(opt.factors) == {"0", "3", "6"}
    assert not torch.equal(net[0].weight, before[0])


# -- torch.optim.Optimizer --------


@pytest.mark.parametrize("scaling", ["adam", "inverse"])
def test_it_trains(scaling):
    compiled, opt = make(scaling=scaling, lr=0.01 if scaling == "adam" else 0.1)
    losses = train(compiled, opt, 40)
    assert losses[-1] < 0.1 * losses[0]


def test_schedulers_change_the_rate_between_steps():
    compiled, opt = make(lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.0 if step else 1.0)
    train(compiled, opt, 1, scheduler)
    assert opt.param_groups[0]["lr"] == 0.0
    before = parameters(compiled)
    train(compiled, opt, 2, scheduler)
    assert_equal(parameters(compiled), before)


def test_groups_have_their_own_rates():
    net = network()
    groups = [{"params": [*net[:6].parameters()]}, {"params": [*net[6].parameters()], "lr": 0.0}]
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(compiled, groups, lr=0.01)
    before = parameters(net)
    train(compiled, opt, 1)
    changed = [not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)]
    assert changed == [True] * 6 + [False] * 2


def test_one_layer_has_one_rate():
    net = network()
    rest = [p for name, p in net.named_parameters() if name != "6.bias"]
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(compiled, [{"params": rest}, {"params": [net[6].bias], "lr": 0.5}], lr=0.1)
    with pytest.raises(kfc_fx.OptionError, match="'6': weight and bias have different"):
        train(compiled, opt, 1)


def test_a_subset_of_parameters_is_updated_alone():
    net = network()
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(compiled, net[6].parameters(), lr=0.1)
    before = parameters(net)
    train(compiled, opt, 2)
    assert_equal(parameters(net)[:6], before[:6])
    assert set(opt.factors) == {"6"}
    with pytest.raises(kfc_fx.OptionError, match="pass both, or freeze the bias"):
        train(compiled, kfc_fx.KFC(compiled, [net[6].weight], lr=0.1), 1)


def test_closure_is_called_with_gradients_enabled():
    compiled, opt = make()
    reference, plain = make()

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(compiled(X), Y)
        loss.backward()
        return loss

    loss = opt.step(closure)
    expected = F.cross_entropy(reference(X), Y)
    expected.backward()
    plain.step()
    assert torch.equal(loss, expected)
    assert_equal(parameters(compiled), parameters(reference))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_gradients_and_their_statistics(set_to_none):
    compiled, opt = make()
    F.cross_entropy(compiled(X), Y).backward()
    opt.zero_grad(set_to_none)
    assert not compiled.recorder.statistics.sums
    assert all(p.grad is None or not p.grad.any() for p in compiled.parameters())


@pytest.mark.parametrize("bound_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"average": 5.0, "weight_decay": 0.1},
        {"input_factor": "separable"},
        {"scaling": "inverse"},
        {"scaling": "inverse", "input_factor": "separable", "generic": "adamw"},
    ],
    ids=str,
)
def test_a_saved_run_resumes_bit_for_bit(options, bound_first):
    compiled, opt = make(factor_interval=3, inverse_interval=6, **options)
    train(compiled, opt, 22)  # in the middle of an interval, past the early steps
    buffer = io.BytesIO()
    torch.save({"model": compiled.state_dict(), "opt": opt.state_dict()}, buffer)
    train(compiled, opt, 8)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, again = make(factor_interval=3, inverse_interval=6, **options)
    if bound_first:
        train(resumed, again, 1)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    train(resumed, again, 8)
    assert_equal(resumed.state_dict().values(), compiled.state_dict().values())
    assert again.diagnostics.steps == 30
    if "average" in options:
        with opt.averaged(), again.averaged():
            assert_equal(parameters(resumed), parameters(compiled))


def test_a_foreign_state_dict_is_refused():
    _, opt = make()
    foreign = torch.optim.SGD(network().parameters(), lr=0.1).state_dict()
    with pytest.raises(kfc_fx.OptionError, match="not of a KFC optimizer"):
        opt.load_state_dict(foreign)


def test_averaged_parameters_are_swapped_in_and_back():
    compiled, opt = make(average=3.0)
    with pytest.raises(kfc_fx.StepError, match="no averaged parameters"), opt.averaged():
        pass
    train(compiled, opt, 3)
    own = parameters(compiled)
    with pytest.raises(ZeroDivisionError), opt.averaged():
        _ = 1 / int(torch.equal(parameters(compiled)[0], own[0]))  # zero: they are others now
    assert_equal(parameters(compiled), own)


def test_initialise_takes_factors_without_a_step():
    compiled, opt = make()
    before = copy.deepcopy(compiled.state_dict())
    opt.initialise([(X[:6], Y[:6]), X[6:]])
    assert_equal(compiled.state_dict().values(), before.values())
    ones = torch.cat([F.unfold(X, 3, padding=1), torch.ones(12, 1, 36)], 1)
    expected = torch.einsum("nit,njt->ij", ones, ones) / 12
    torch.testing.assert_close(opt.factors["0"].omega, expected, rtol=1e-4, atol=1e-4)
    train(compiled, opt, 1)
    with pytest.raises(kfc_fx.StatisticsError, match="no batch"):
        opt.initialise([])


def test_parameters_without_a_gradient_are_left_alone():
    compiled, opt = make(weight_decay=0.1)
    train(compiled, opt, 3)
    before = parameters(compiled)
    saved = opt.state_dict()["kfc"]
    F.cross_entropy(compiled(X), Y).backward()
    net = compiled.original
    net[0].weight.grad = net[0].bias.grad = net[1].weight.grad = None
    opt.step()
    changed = [not torch.equal(p, b) for p, b in zip(compiled.parameters(), before, strict=True)]
    assert changed == [False, False, False, True, True, True, True, True]
    now = opt.state_dict()["kfc"]
    assert torch.equal(now["blocks"]["0"]["m"], saved["blocks"]["0"]["m"])
    assert torch.equal(
        now["generic"]["1.weight"]["generic_v"], saved["generic"]["1.weight"]["generic_v"]
    )


# -- failure policy --------


def test_a_non_finite_gradient_skips_the_step():
    compiled, opt = make()
    train(compiled, opt, 2)
    before, saved = parameters(compiled), copy.deepcopy(opt.state_dict()["kfc"]["blocks"])
    F.cross_entropy(compiled(X), Y).backward()
    compiled.original[3].weight.grad[0, 0, 0, 0] = float("inf")
    with pytest.warns(kfc_fx.KfcWarning, match="step is skipped"):
        opt.step()
    assert_equal(parameters(compiled), before)
    torch.testing.assert_close(opt.state_dict()["kfc"]["blocks"], saved, rtol=0, atol=0)
    assert opt.diagnostics.skipped_steps == 1
    assert opt.diagnostics.steps == 2


def test_a_non_finite_statistic_is_dropped_and_the_last_good_factor_stays():
    compiled, opt = make(factor_interval=1)
    train(compiled, opt, 1)
    good = opt.factors["3"]
    for times in (1, 2):
        F.cross_entropy(compiled(X), Y).backward()
        compiled.recorder.statistics.sums["3"]["omega"][0, 0, 0] = float("nan")
        if times == 1:
            with pytest.warns(kfc_fx.KfcWarning, match="layer '3' has a statistic"):
                opt.step()
        else:
            opt.step()  # warns once
        opt.zero_grad()
    torch.testing.assert_close(opt.factors["3"].omega, good.omega)
    assert opt.diagnostics.dropped_statistics == {"3": 2}
    assert all(p.isfinite().all() for p in compiled.parameters())


def test_a_decomposition_that_fails_falls_back_to_the_identity_visibly(monkeypatch):
    compiled, opt = make()

    def fail(_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    F.cross_entropy(compiled(X), Y).backward()
    with pytest.warns(kfc_fx.KfcWarning, match="cannot be decomposed"):
        opt.step()
    assert opt.diagnostics.inverse_failures == {"0": 1, "3": 1, "6": 1}
    basis = opt.state_dict()["kfc"]["blocks"]["0"]["q_omega"]
    assert torch.equal(basis[0], torch.eye(19))


def test_an_indefinite_factor_is_inverted_with_more_damping_or_not_at_all():
    from kfc_fx.curvature.inverse import damped_inverses

    omega = torch.stack(
        [torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -1.0])), -9e9 * torch.eye(3)]
    )
    gamma = torch.eye(2).repeat(3, 1, 1)
    omega_inverse, gamma_inverse, failed = damped_inverses(omega, gamma, 0.01)
    assert failed.tolist() == [False, False, True]
    assert omega_inverse[:2].isfinite().all()
    assert torch.equal(omega_inverse[2], torch.eye(3))
    assert torch.equal(gamma_inverse[2], torch.eye(2))


@pytest.mark.parametrize("function", ["accumulate", "refresh", "apply"])
def test_a_step_that_raises_leaves_everything_as_it_was(function):
    compiled, opt = make(factor_interval=1, inverse_interval=1)
    train(compiled, opt, 2)
    before, saved = parameters(compiled), copy.deepcopy(opt.state_dict()["kfc"])
    F.cross_entropy(compiled(X), Y).backward()
    functions = opt._bound_engine().program.functions
    own = functions[function]

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    functions[function] = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step()
    functions[function] = own
    assert_equal(parameters(compiled), before)
    now = opt.state_dict()["kfc"]
    saved["generators"] = now["generators"]  # the backward pass drew its targets
    torch.testing.assert_close(now, saved, rtol=0, atol=0)


def test_a_step_before_any_backward_is_an_error():
    _, opt = make()
    with pytest.raises(kfc_fx.StepError, match=r"call loss\.backward\(\) before"):
        opt.step()


def test_a_forward_pass_around_the_compiled_model_is_an_error():
    compiled, opt = make()
    F.cross_entropy(compiled(X), Y)  # captured, but the loss comes from elsewhere
    F.cross_entropy(compiled.original(X), Y).backward()
    with pytest.raises(kfc_fx.StatisticsError, match="not the original"):
        opt.step()


def test_statistics_missed_later_are_counted_and_warned_of():
    compiled, opt = make(factor_interval=1)
    train(compiled, opt, 2)
    F.cross_entropy(compiled.original(X), Y).backward()
    with pytest.warns(kfc_fx.KfcWarning, match="due at step 2"):
        opt.step()
    assert opt.diagnostics.missed_statistics == 1


def test_a_model_with_nothing_to_precondition_is_an_error():
    compiled = kfc_fx.compile(nn.Sequential(nn.Flatten(), nn.LayerNorm(72)))
    opt = kfc_fx.KFC(compiled, lr=0.1)
    compiled(X).sum().backward()
    with pytest.raises(kfc_fx.OptionError, match="nothing to precondition"):
        opt.step()


def test_the_last_optimizer_made_owns_the_model():
    compiled, first = make()
    second = kfc_fx.KFC(compiled, lr=0.01)
    F.cross_entropy(compiled(X), Y).backward()
    with pytest.raises(kfc_fx.StepError, match="another KFC"):
        first.step()
    second.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "shampoo"}, "scaling must be one of adam, inverse"),
        ({"fisher": "true"}, "fisher must be one of sampled, empirical"),
        ({"generic": "lion"}, "generic must be one of adamw, sgd"),
        ({"clip_by": "norm"}, "clip_by must be one of factors, exact"),
        ({"input_factor": "diagonal"}, "input_factor must be one of auto, dense, separable"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"ema_decay": -0.1}, "ema_decay must be in"),
        ({"factor_interval": 0}, "factor_interval must be a whole number"),
        ({"inverse_interval": 2.5}, "inverse_interval must be a whole number"),
        ({"damping": -1.0}, "damping must be positive"),
        ({"clip": 0.0}, "clip must be positive or None"),
        ({"average": -1.0}, "average must be positive or None"),
        ({"lr": -0.1}, "lr must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(kfc_fx.OptionError, match=message):
        make(**options)


def test_it_wants_a_compiled_model_and_its_own_parameters():
    with pytest.raises(kfc_fx.OptionError, match=r"pass kfc_fx\.compile\(model\)"):
        kfc_fx.KFC(network(), lr=0.1)
    compiled = kfc_fx.compile(network())
    with pytest.raises(kfc_fx.OptionError, match="not one of the compiled model"):
        kfc_fx.KFC(compiled, network().parameters(), lr=0.1)
    with pytest.raises(TypeError):
        kfc_fx.KFC(compiled, lr=0.1, learning_rate=0.1)


def test_a_wrong_input_shape_raises_torchs_own_error_and_training_goes_on():
    compiled, opt = make()
    train(compiled, opt, 1)
    with pytest.raises(Exception, match="channels"):
        compiled(torch.randn(4, 3, 6, 6))
    train(compiled, opt, 2)
