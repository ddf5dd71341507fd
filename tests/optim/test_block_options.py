"""``blocks=``: scalings and forms by block."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import kfc_fx
from tests.models import LABELS, assert_equal, conv_network, make, parameters, train
from tests.written_out import LAYERS, assert_same, batches, network, run_kfc


def test_each_block_takes_its_own_scaling():
    """Every layer moves exactly as where all have its scaling."""
    chosen = {"0": "spectral", "4": "eigen", "7": "inverse"}
    data = batches(3)
    mixed = network()
    blocks = {name: {"scaling": scaling} for name, scaling in chosen.items()}
    opt = run_kfc(mixed, data[:1], lr=0.02, blocks=blocks, clip=None)
    for scaling in ("spectral", "eigen", "inverse", "adam"):
        alone = network()
        run_kfc(alone, data[:1], lr=0.02, scaling=scaling, clip=None)
        for name in [n for n in LAYERS if chosen.get(n, "adam") == scaling]:
            torch.testing.assert_close(mixed[int(name)].weight, alone[int(name)].weight)
    source = opt.update_source
    for argument in ("momentum_adam", "momentum_spectral", "damping_eigen", "eps_adam"):
        assert argument in source
    assert {stack.scaling.name for stack in opt._engine.spec.stacks} == {*chosen.values(), "adam"}


@pytest.mark.parametrize("vector", ["eigen", "inverse"])
@pytest.mark.parametrize("other", ["adam", "spectral"])
def test_a_step_that_pauses_for_some_blocks_takes_the_others_too(vector, other):
    """The exact ν is of the former alone; a bound far above it changes nothing."""
    blocks = {"2": {"scaling": vector}, "4": {"scaling": vector}}
    options = {"lr": 0.02, "scaling": other, "blocks": blocks, "clip": 1e9}
    found, expected, data = network(), network(), batches(3)
    opt = run_kfc(found, data, clip_by="exact", **options)
    run_kfc(expected, data, clip_by="factors", **options)
    assert opt._engine.spec.pauses
    assert_same(found, expected)


def test_a_block_takes_a_name_a_value_or_a_dict():
    """All say the same."""
    data, found = batches(3), []
    general = kfc_fx.Adam(orthogonalize=0.0)
    for chosen in ("spectral", kfc_fx.Spectral(), {"scaling": "spectral"}):
        net = network()
        compiled = kfc_fx.compile(net)
        opt = kfc_fx.KFC(compiled, 0.02, scaling=general, blocks={"[04]": chosen}, seed=0)
        for x, y in data:
            F.cross_entropy(compiled(x), y).backward()
            opt.step()
            opt.zero_grad()
        found.append(parameters(net))
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (kfc_fx.Spectral(damping=0.3, momentum=0.5), kfc_fx.Spectral(damping=0.1, nesterov=False)),
        (kfc_fx.Adam(), kfc_fx.Adam(betas=(0.0, 0.9), orthogonalize=0.0)),
        (kfc_fx.Eigen(clip=None), kfc_fx.Eigen(damping=0.1, momentum=0.0, clip=None)),
        (kfc_fx.Inverse(clip=None), kfc_fx.Inverse(damping=0.1, nesterov=True, clip=None)),
    ],
    ids=lambda value: value.name,
)
def test_two_values_of_one_scaling_step_as_each_does_alone(one, other):
    data = batches(1)
    mixed = network()
    opt = run_kfc(mixed, data, lr=0.02, scaling=one, blocks={"[04]": other})
    for value, names in ((one, ("2", "7")), (other, ("0", "4"))):
        alone = network()
        run_kfc(alone, data, lr=0.02, scaling=value)
        for name in names:
            torch.testing.assert_close(mixed[int(name)].weight, alone[int(name)].weight)
    assert {s.scaling.name for s in opt._engine.spec.stacks} == {one.name, f"{one.name}_2"}
    assert f'"{one.name}_2"' in opt.update_source


def test_input_factor_by_block():
    net = network()
    opt = run_kfc(net, batches(1), lr=0.01, blocks={"[02]": {"input_factor": "separable"}})
    forms = {s.first.name: s.forms.input for s in opt._engine.spec.stacks}
    assert forms == {"0": "separable", "2": "separable", "4": "dense", "7": "dense"}


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"0": {"scaling": "muon"}}, r"scaling in blocks\['0'\] must be one of 'adam'"),
        (
            {"0": {"lr": 0.1}},
            r"an option in blocks\['0'\] must be one of 'scaling', 'input_factor'",
        ),
        ({"0": {"input_factor": "diagonal"}}, r"input_factor in blocks\['0'\] must be one of"),
        ({"0": "muon"}, r"blocks\['0'\] must be one of 'adam', .*; got 'muon'"),
        ({"0": 0.3}, r"blocks\['0'\] must be one of 'adam', .*; got 0\.3"),
        ({0: {"scaling": "spectral"}}, "globs on block names.*got 0: "),
        ([("0", {"scaling": "spectral"})], "blocks must be a dict of options by pattern"),
    ],
)
def test_bad_block_options_are_refused(blocks, message):
    with pytest.raises(kfc_fx.OptionError, match=message):
        kfc_fx.KFC(kfc_fx.compile(conv_network()), blocks=blocks)


def test_a_pattern_that_no_block_matches_is_refused_with_the_nearest_name():
    compiled, opt = make(network().float(), blocks={"layer4.*": {"scaling": "spectral"}})
    F.cross_entropy(compiled(torch.randn(4, 2, 7, 7)), LABELS[:4]).backward()
    with pytest.raises(kfc_fx.OptionError, match=r"no block matches 'layer4\.\*'; the nearest"):
        opt.step()


def test_a_pattern_may_name_a_layer_that_is_frozen_for_now():
    net = conv_network()
    net[0].requires_grad_(False)
    compiled, opt = make(net, blocks={"0": {"scaling": "spectral"}})
    train(compiled, opt, 2)
    net[0].requires_grad_(True)
    train(compiled, opt, 2)
    scalings = {stack.first.name: stack.scaling.name for stack in opt._engine.spec.stacks}
    assert scalings == {"0": "spectral", "1": "adam", "3": "adam", "6": "adam"}
    net[0].requires_grad_(False)
    train(compiled, opt, 12)  # for some steps it keeps its place
    assert {stack.scaling.name for stack in opt._engine.spec.stacks} == {"adam"}
