"""Steps of the optimizer against the algorithms written out per layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.linalg.polar import orthogonalizers
from tests.options import kfc
from tests.oracle import parameters_of
from tests.written_out import (
    LAYERS,
    WrittenOut,
    assert_same,
    batches,
    gradients,
    network,
    run_kfc,
)


def written_inverse(net, data, *, lr, damping, clip, momentum, separable, nesterov=False):
    plain = WrittenOut(net, separable)
    p: dict[str, torch.Tensor] = {}
    for x, y in data:
        grads = gradients(net, x, y)
        plain.accumulate(x, y)
        v, nu = {}, 0.0
        for name in LAYERS:
            omega, gamma = plain.factors(name)
            eye_d, eye_r = torch.eye(omega.shape[1]), torch.eye(gamma.shape[1])
            mean = lambda f: f.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]  # noqa: E731
            pi = (mean(omega) / mean(gamma)).sqrt()
            left = torch.linalg.inv(gamma + math.sqrt(damping) / pi * eye_r)
            right = torch.linalg.inv(omega + math.sqrt(damping) * pi * eye_d)
            g = plain.gradient(grads, name)
            v[name] = -lr * left @ g @ right
            nu += float(-lr * (g * v[name]).sum())
        scale = min(1.0, math.sqrt(clip / nu)) if clip else 1.0
        for name in LAYERS:
            step = scale * v[name]
            p[name] = momentum * p.get(name, 0) + step
            plain.add(name, momentum * p[name] + step if nesterov else p[name])
    return nu, scale


def towards_polar(matrix: torch.Tensor, share: float) -> torch.Tensor:
    """By what the polynomials make of each singular value."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    norm = s.square().sum(1, keepdim=True).sqrt()
    own, polar = s / norm, s / norm
    for _ in range(3):
        polar = 3.4445 * polar - 4.7750 * polar**3 + 2.0315 * polar**5
    polar = polar / polar.square().sum(1, keepdim=True).sqrt()
    mixed = share * polar + (1 - share) * own
    mixed = mixed * norm / mixed.square().sum(1, keepdim=True).sqrt()
    return u * mixed[:, None, :] @ vh


def written_adam(
    net, data, *, lr, momentum, beta2, eps, refresh_at, separable, nesterov=True, share=0.7
):
    """Adam in the eigenbasis; m in the original coordinates, v turned with the basis."""
    plain = WrittenOut(net, separable)
    m, v, basis = {}, {}, {}
    for step, (x, y) in enumerate(data):
        grads = gradients(net, x, y)
        plain.accumulate(x, y)
        for name in LAYERS:
            omega, gamma = plain.factors(name)
            if step in refresh_at:
                new = (torch.linalg.eigh(omega)[1], torch.linalg.eigh(gamma)[1])
                if name in basis:
                    turn = [(o.mT @ n) ** 2 for o, n in zip(basis[name], new, strict=True)]
                    v[name] = turn[1].mT @ v[name] @ turn[0]
                basis[name] = new
            q_omega, q_gamma = basis[name]
            g = plain.gradient(grads, name)
            m[name] = momentum * m.get(name, 0) + (1 - momentum) * g
            rotated = q_gamma.mT @ g @ q_omega
            v[name] = beta2 * v.get(name, 0) + (1 - beta2) * rotated**2
            if nesterov:
                ahead = (momentum * m[name] + (1 - momentum) * g) / (1 - momentum ** (step + 2))
            else:
                ahead = m[name] / (1 - momentum ** (step + 1))
            scaled = (
                q_gamma.mT @ ahead @ q_omega / ((v[name] / (1 - beta2 ** (step + 1))).sqrt() + eps)
            )
            if min(scaled.shape[1:]) > 1:
                scaled = towards_polar(scaled, share)
            plain.add(name, -lr * q_gamma @ scaled @ q_omega.mT)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("input_factor", ["dense", "separable"])
def test_inverse_steps_equal_the_algorithm_written_out(steps, clip, input_factor):
    found, expected, data = network(), network(), batches(steps)
    opt = run_kfc(
        found, data, lr=0.05, scaling="inverse", damping=0.01, clip=clip, input_factor=input_factor
    )
    nu, scale = written_inverse(
        expected, data, lr=0.05, damping=0.01, clip=clip, momentum=0.7,
        separable=input_factor == "separable",
    )  # fmt: skip
    assert_same(found, expected)
    if clip:
        assert opt.diagnostics.nu == pytest.approx(nu)
        assert opt.diagnostics.clip_scale == pytest.approx(scale)
        assert scale < 1


@pytest.mark.parametrize("steps", [1, 11])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_adam_steps_equal_the_algorithm_written_out(steps, momentum, share):
    found, expected, data = network(), network(), batches(steps)
    run_kfc(
        found, data, lr=0.01, momentum=momentum, every=1, refresh_every=10,
        orthogonalize=share,
    )  # fmt: skip
    written_adam(
        expected, data, lr=0.01, momentum=momentum, beta2=0.95, eps=1e-8,
        refresh_at=(*range(9), 10), separable=False, share=share,
    )  # fmt: skip
    assert_same(found, expected, 1e-6)


def test_factors_kept_in_their_bases_change_nothing_where_these_are_decomposed():
    """Equal intervals: an EMA is Q and the diagonal of Qᵀ F Q between two statistics."""
    found, expected, data = network(), network(), batches(6)
    opt = run_kfc(found, data, lr=0.01, every=1, refresh_every=1)
    assert all({"omega", "gamma"}.isdisjoint(own) for own in opt._engine.state.values())
    written_adam(
        expected, data, lr=0.01, momentum=0.9, beta2=0.95, eps=1e-8,
        refresh_at=range(6), separable=False,
    )  # fmt: skip
    assert_same(found, expected, 1e-6)


def test_adam_steps_without_nesterov_s_step_ahead():
    found, expected, data = network(), network(), batches(3)
    run_kfc(found, data, lr=0.01, nesterov=False, every=1, refresh_every=1)
    written_adam(
        expected, data, lr=0.01, momentum=0.9, beta2=0.95, eps=1e-8,
        refresh_at=(0, 1, 2), separable=False, nesterov=False,
    )  # fmt: skip
    assert_same(found, expected, 1e-6)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_inverse_steps_with_nesterov_s_step_ahead(clip):
    found, expected, data = network(), network(), batches(3)
    options = {"lr": 0.05, "damping": 0.01, "clip": clip}
    run_kfc(found, data, scaling="inverse", nesterov=True, input_factor="dense", **options)
    written_inverse(expected, data, momentum=0.7, separable=False, nesterov=True, **options)
    assert_same(found, expected)


@pytest.mark.parametrize("steps", [1, 11])
@pytest.mark.parametrize("refresh_every", [1, 10])
def test_separable_adam_steps_equal_the_algorithm_written_out(steps, refresh_every):
    """Eigenvectors of the written-out product, up to order and sign, which Adam does not see."""
    found, expected, data = network(), network(), batches(steps)
    intervals = {"every": 1, "refresh_every": refresh_every}
    run_kfc(found, data, lr=0.01, input_factor="separable", **intervals)
    written_adam(
        expected, data, lr=0.01, momentum=0.9, beta2=0.95, eps=1e-8, separable=True,
        refresh_at=range(11) if refresh_every == 1 else (*range(9), 10),
    )  # fmt: skip
    assert_same(found, expected, 1e-6)


def test_preconditioned_gradient_is_the_dense_damped_solve():
    """``(F̂ + factored damping)⁻¹ vec(∇)`` with the Kronecker product written out."""
    net, data = network(), batches(1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    grads = gradients(net, *data[0])
    plain = WrittenOut(network(), separable=False)
    plain.accumulate(*data[0])
    run_kfc(net, data, lr=1.0, scaling="inverse", damping=0.1, clip=None, momentum=0.0)
    for name in ("0", "2", "7"):
        omega, gamma = (f[0] for f in plain.factors(name))
        pi = math.sqrt(omega.diagonal().mean() / gamma.diagonal().mean())
        omega = omega + pi * math.sqrt(0.1) * torch.eye(len(omega))
        gamma = gamma + math.sqrt(0.1) / pi * torch.eye(len(gamma))
        fisher = torch.kron(gamma, omega)  # row-major vec
        solved = torch.linalg.solve(fisher, plain.gradient(grads, name)[0].flatten())
        weight, bias = parameters_of(net[int(name)], solved.reshape(1, len(gamma), len(omega)))
        torch.testing.assert_close(before[f"{name}.weight"] - net[int(name)].weight, weight)
        if bias is not None:
            torch.testing.assert_close(before[f"{name}.bias"] - net[int(name)].bias, bias)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_generic_parameters_follow_torch_optim(rule):
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()

    torch.manual_seed(3)
    data = [(torch.randn(8, 4).double(), torch.randint(3, (8,))) for _ in range(3)]
    found, expected = net(), net()
    compiled = kfc_fx.compile(found, norm_layers=False)
    lr_of_blocks = [
        {"params": [p for n, p in found.named_parameters() if not n.startswith("1.")], "lr": 0.0},
        {"params": list(found[1].parameters()), "lr": 0.01},
    ]
    opt = kfc_fx.KFC(lr_of_blocks, model=compiled, lr=0.1, generic=rule)
    options = {"momentum": 0.9} if rule == "sgd" else {"weight_decay": 0.0, "betas": (0.9, 0.999)}
    kind = torch.optim.SGD if rule == "sgd" else torch.optim.AdamW
    reference = kind(expected[1].parameters(), lr=0.01, **options)
    for x, y in data:
        for model, optimizer in ((compiled, opt), (expected, reference)):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            model.zero_grad()
    assert_same(found, expected)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_a_generic_parameter_that_joins_late_begins_as_with_torch_optim(rule):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    net[1].requires_grad_(False)
    compiled = kfc_fx.compile(net, norm_layers=False)
    opt = kfc_fx.KFC(compiled, lr=0.01, generic=rule)
    options = {"momentum": 0.9} if rule == "sgd" else {"weight_decay": 0.0}
    kind = torch.optim.SGD if rule == "sgd" else torch.optim.AdamW
    own = [p.detach().clone().requires_grad_() for p in net[1].parameters()]
    reference = kind(own, lr=0.01, **options)
    x, y = torch.randn(16, 4).double(), torch.arange(16) % 3
    for step in range(13):
        net[1].requires_grad_(step >= 12)
        F.cross_entropy(compiled(x), y).backward()
        for mine, theirs in zip(own, net[1].parameters(), strict=True):
            mine.grad = theirs.grad
        opt.step()
        opt.zero_grad()
    reference.step()
    for mine, theirs in zip(own, net[1].parameters(), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-9)


def test_weight_decay_is_decoupled_and_averages_are_polyak():
    plain, decayed, data = network(), network(), batches(1)
    run_kfc(plain, data, lr=0.1)
    opt = run_kfc(decayed, data, lr=0.1, weight_decay=0.5, average=4.0)
    start = network()
    shrunk = [
        p - 0.1 * 0.5 * s for p, s in zip(plain.parameters(), start.parameters(), strict=True)
    ]
    for found, expected in zip(decayed.parameters(), shrunk, strict=True):
        torch.testing.assert_close(found, expected)
    xi = math.exp(-1 / 4)
    with opt.averaged():
        for found, now, old in zip(decayed.parameters(), shrunk, start.parameters(), strict=True):
            torch.testing.assert_close(found, xi * old + (1 - xi) * now)


def test_exact_nu_equals_the_quadratic_form_of_the_dense_fisher():
    net, (data,) = network(), batches(1)
    x, y = data
    start = network()
    compiled = kfc_fx.compile(net)
    opt = kfc(
        compiled, lr=0.05, scaling="inverse", clip=1e9, clip_by="exact", damping=0.01, momentum=0.0
    )
    F.cross_entropy(compiled(x), y).backward()
    opt.step()
    names = [name for name, _ in start.named_parameters()]
    v = torch.cat(
        [(n - o).flatten() for n, o in zip(net.parameters(), start.parameters(), strict=True)]
    ).detach()
    parameters = {name: p.detach() for name, p in start.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(start, p, (x,)))(parameters)
    stacked = torch.cat([jacobian[name].flatten(2) for name in names], 2)
    p = start(x).softmax(1).detach()
    output_fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = torch.einsum("nap,nab,nbq->pq", stacked, output_fisher, stacked) / len(x)
    expected = v @ fisher @ v + 0.01 * v @ v
    assert opt.diagnostics.nu == pytest.approx(float(expected))


def test_matrices_of_nearly_one_side_share_their_products():
    """Narrower ones are padded, and many small ones stay apart; each moves as by itself."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(33, 40),
        nn.Linear(40, 32, bias=False),
        nn.Linear(32, 9),
        nn.Linear(9, 2048, bias=False),
        nn.Unflatten(1, (2048, 1, 1)),
        nn.Conv2d(2048, 4096, 1, groups=512, bias=False),
        nn.Flatten(),
        nn.Linear(4096, 8, bias=False),
    ).double()
    models = []
    for share in (0.7, 0.0):
        model = kfc_fx.compile(copy.deepcopy(net))
        opt = kfc_fx.KFC(model, scaling=kfc_fx.Adam(orthogonalize=share), seed=0)
        x = torch.randn(16, 33, generator=torch.Generator().manual_seed(1)).double()
        F.cross_entropy(model(x), torch.arange(16) % 8).backward()
        opt.step()
        models.append((model, opt))
    (model, opt), (plain, _) = models
    text = opt.update_source
    assert text.count("pad(scaled") == 2, text  # 32 to 34 and 8 to 9, and not 4 to 9
    for place in (1, 5, 7):
        before = net[place].weight.detach()
        rows = before.shape[0] // getattr(net[place], "groups", 1)
        own, scaled = (
            (m[place].weight.detach() - before).reshape(-1, rows, before.shape[1])
            for m in (model, plain)
        )
        tall = own.shape[1] > own.shape[2]
        own, scaled = (x.mT if tall else x for x in (own, scaled))
        (towards,) = orthogonalizers([scaled @ scaled.mT], 0.7)
        torch.testing.assert_close(own, towards @ scaled, rtol=1e-6, atol=1e-12)
