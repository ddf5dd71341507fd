"""Options that are values: defaults, checks, and what is refused with the line to write."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import kfc_fx
from tests.models import conv_network, make, train


def test_the_defaults_of_each_value():
    assert kfc_fx.Adam() == kfc_fx.Adam(
        betas=(0.9, 0.95), eps=1e-8, nesterov=True, orthogonalize=0.7
    )
    assert kfc_fx.Spectral() == kfc_fx.Spectral(momentum=0.95, nesterov=True, damping=0.3)
    bound = {"clip": 0.01, "clip_by": "factors", "clip_samples": None}
    vector = {"momentum": 0.7, "nesterov": False, "damping": 0.01, **bound}
    assert kfc_fx.Eigen() == kfc_fx.Eigen(second_moment_decay=0.95, **vector)
    exact = {"quadratic_model": False, "adapt_damping": None}
    assert kfc_fx.Inverse() == kfc_fx.Inverse(**vector, **exact)
    assert kfc_fx.Statistics() == kfc_fx.Statistics(
        fisher=None, every=20, refresh_every=20, samples="auto", decay=0.95,
        input_factor="auto", basis_limit=512,
    )  # fmt: skip
    assert kfc_fx.GenericAdamW() == kfc_fx.GenericAdamW(lr_ratio=None, betas=(0.9, 0.999))
    assert kfc_fx.GenericSGD() == kfc_fx.GenericSGD(lr_ratio=None, momentum=0.9)


@pytest.mark.parametrize(
    ("scaling", "lr", "ratio", "generic"),
    [
        ("adam", 0.01, 1.0, kfc_fx.GenericAdamW()),
        ("spectral", 0.07, 0.1, kfc_fx.GenericAdamW()),
        ("eigen", 0.03, 1.0, kfc_fx.GenericSGD()),
        ("inverse", 0.03, 1.0, kfc_fx.GenericSGD()),
    ],
)
def test_a_name_stands_for_the_defaults_of_its_value(scaling, lr, ratio, generic):
    opt = kfc_fx.KFC(kfc_fx.compile(conv_network()), scaling=scaling)
    value = {"adam": kfc_fx.Adam, "spectral": kfc_fx.Spectral, "eigen": kfc_fx.Eigen}
    assert opt.options.scaling == value.get(scaling, kfc_fx.Inverse)()
    assert opt.defaults["lr"] == lr
    assert (opt.options.generic, opt.options.generic_ratio) == (generic, ratio)


@pytest.mark.parametrize(
    ("kind", "option", "values", "message"),
    [
        (kfc_fx.Adam, "eps", [0, -1.0, True, "1e-8", math.nan, math.inf, None], "Adam: eps must be a positive number, got"),
        (kfc_fx.Adam, "eps", [torch.tensor(1e-8)], "Adam: eps must be a positive number, got tensor"),
        (kfc_fx.Adam, "betas", [0.9, (0.9,), (0.9, 1.0), (0.9, True), "ab"], r"Adam: betas must be two numbers in \[0, 1\)"),
        (kfc_fx.Adam, "orthogonalize", [-0.1, 1.5, math.nan, False], r"Adam: orthogonalize must be a number in \[0, 1\]"),
        (kfc_fx.Adam, "nesterov", [1, None, "yes"], "Adam: nesterov must be True or False"),
        (kfc_fx.Spectral, "momentum", [1.0, -0.1, None], r"Spectral: momentum must be a number in \[0, 1\)"),
        (kfc_fx.Spectral, "damping", [0.0, math.nan], "Spectral: damping must be a positive number"),
        (kfc_fx.Eigen, "damping", [0.0], "Eigen: damping must be a positive number"),
        (kfc_fx.Eigen, "second_moment_decay", [1.0], "Eigen: second_moment_decay must be a number in"),
        (kfc_fx.Eigen, "clip", [0.0, "none", math.inf], "Eigen: clip must be a positive number or None"),
        (kfc_fx.Eigen, "clip_by", ["norm", None, 3], "Eigen: clip_by must be one of 'factors', 'exact', got"),
        (kfc_fx.Eigen, "clip_samples", [0, 2.5, True], "Eigen: clip_samples must be a whole number, at least 1 or None"),
        (kfc_fx.Inverse, "damping", [-1e-3], "Inverse: damping must be a number that is not negative"),
        (kfc_fx.Inverse, "quadratic_model", [1], "Inverse: quadratic_model must be True or False"),
        (kfc_fx.Inverse, "adapt_damping", [0, 2.5, True], "Inverse: adapt_damping must be a whole number"),
        (kfc_fx.Statistics, "fisher", ["true", True], "Statistics: fisher must be one of 'sampled', 'empirical' or None"),
        (kfc_fx.Statistics, "every", [0, 2.5, True, "20"], "Statistics: every must be a whole number, at least 1, got"),
        (kfc_fx.Statistics, "refresh_every", [0], "Statistics: refresh_every must be a whole number"),
        (kfc_fx.Statistics, "samples", [0, 0.5, "all", True], "Statistics: samples must be a whole number, at least 1 or 'auto' or None"),
        (kfc_fx.Statistics, "decay", [1.0, -0.1], "Statistics: decay must be a number in"),
        (kfc_fx.Statistics, "input_factor", ["diagonal"], "Statistics: input_factor must be one of 'auto', 'dense', 'separable'"),
        (kfc_fx.Statistics, "basis_limit", [0, 2.5], "Statistics: basis_limit must be a whole number"),
        (kfc_fx.GenericAdamW, "betas", [(1.0, 0.9)], "GenericAdamW: betas must be two numbers"),
        (kfc_fx.GenericAdamW, "lr_ratio", [-1, "1"], "GenericAdamW: lr_ratio must be a number that is not negative or None"),
        (kfc_fx.GenericSGD, "momentum", [1.0], "GenericSGD: momentum must be a number in"),
    ],
)  # fmt: skip
def test_a_value_refuses_what_does_not_fit(kind, option, values, message):
    for value in values:
        with pytest.raises(kfc_fx.OptionError, match=message):
            kind(**{option: value})


def test_an_option_that_a_scaling_has_no_use_for_cannot_be_written():
    with pytest.raises(TypeError, match="damping"):
        kfc_fx.Adam(damping=0.1)
    with pytest.raises(TypeError, match="eps"):
        kfc_fx.Spectral(eps=1e-8)


def test_nesterov_does_not_go_with_the_quadratic_model():
    with pytest.raises(kfc_fx.OptionError, match="nesterov=True does not go with quadratic_model"):
        kfc_fx.Inverse(quadratic_model=True, nesterov=True)


def test_values_cannot_be_changed_and_a_list_of_betas_becomes_a_tuple():
    value = kfc_fx.Adam(betas=[0.8, 0.9])
    assert value == kfc_fx.Adam(betas=(0.8, 0.9))
    assert hash(value) == hash(kfc_fx.Adam(betas=(0.8, 0.9)))
    with pytest.raises(AttributeError):
        value.eps = 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "shampoo"}, r"scaling must be one of 'adam', 'spectral', 'eigen', 'inverse', or one of kfc_fx\.Adam\(\.\.\.\)"),
        ({"scaling": kfc_fx.Adam}, "scaling must be one of .* got <class"),
        ({"generic": "lion"}, r"generic must be one of 'adamw', 'sgd', or one of kfc_fx\.GenericAdamW"),
        ({"statistics": {"every": 5}}, r"statistics must be a kfc_fx\.Statistics\(\.\.\.\), got"),
        ({"average": -1.0}, "average must be a positive number or None, got -1.0"),
        ({"master_weights": 1}, "master_weights must be True or False, got 1"),
        ({"compile_update": "inductor"}, "compile_update must be True or False"),
        ({"cuda_graph": 0}, "cuda_graph must be True or False or None"),
        ({"maximize": None}, "maximize must be True or False"),
        ({"seed": 1.5}, "seed must be a whole number or None"),
        ({"lr": -0.1}, "lr must be a number that is not negative, got -0.1"),
        ({"lr": math.nan}, "lr must be a number that is not negative, got nan"),
        ({"lr": "0.1"}, "lr must be a number that is not negative, got '0.1'"),
        ({"lr": True}, "lr must be a number that is not negative, got True"),
        ({"lr": torch.ones(2)}, "lr must be a number that is not negative, got tensor"),
        ({"weight_decay": -0.1}, "weight_decay must be a number that is not negative"),
        ({"foreach": True}, "foreach=True: KFC has no such option, .*multi-tensor"),
        ({"fused": True}, "fused=True.*compile_update"),
        ({"capturable": True}, "capturable=True.*cuda_graph"),
        ({"differentiable": True}, "differentiable=True"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(kfc_fx.OptionError, match=message):
        kfc_fx.KFC(kfc_fx.compile(conv_network()), **options)


def test_torch_s_own_flags_are_taken_as_none_or_false():
    flags = ("foreach", "fused", "capturable", "differentiable")
    for value in (None, False):
        kfc_fx.KFC(kfc_fx.compile(conv_network()), **dict.fromkeys(flags, value))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 1e-8}, r"KFC has no option 'eps': write scaling=kfc_fx\.Adam\(eps=\.\.\.\)"),
        ({"betas": (0.9, 0.95)}, r"'betas': write scaling=kfc_fx\.Adam\(betas=\.\.\.\)"),
        ({"scaling": "spectral", "damping": 0.1}, r"'damping': write scaling=kfc_fx\.Spectral\(damping=\.\.\.\)$"),
        ({"damping": 0.1}, r"Adam has none either; scaling=kfc_fx\.Spectral\(damping=\.\.\.\) or scaling=kfc_fx\.Eigen.* has"),
        ({"scaling": "inverse", "eps": 1e-8}, r"Inverse has none either; scaling=kfc_fx\.Adam\(eps=\.\.\.\) has"),
        ({"every": 5}, r"'every': write statistics=kfc_fx\.Statistics\(every=\.\.\.\)"),
        ({"fisher": "sampled"}, r"write statistics=kfc_fx\.Statistics\(fisher=\.\.\.\)"),
        ({"lr_ratio": 2}, r"write generic=kfc_fx\.GenericAdamW\(lr_ratio=\.\.\.\) or generic=kfc_fx\.GenericSGD"),
        ({"wieght_decay": 0.1}, "KFC has no option 'wieght_decay'; the nearest name is 'weight_decay'$"),
        ({"orthogonalise": 1.0}, r"the nearest name is 'orthogonalize', write scaling=kfc_fx\.Adam\(orthogonalize"),
        ({"xyz": 1}, "KFC has no option 'xyz'; it has average, blocks, cautious_decay, compare_every"),
    ],
)  # fmt: skip
def test_a_keyword_that_is_no_option_is_refused_with_the_line_to_write(options, message):
    with pytest.raises(kfc_fx.OptionError, match=message):
        kfc_fx.KFC(kfc_fx.compile(conv_network()), **options)


def test_lr_is_positional_and_parameters_find_their_model_by_keyword():
    net = conv_network()
    compiled = kfc_fx.compile(net)
    assert kfc_fx.KFC(compiled, 0.02).param_groups[0]["lr"] == 0.02
    opt = kfc_fx.KFC(net[3:].parameters(), 0.03, model=compiled)
    assert (opt.param_groups[0]["lr"], len(opt.param_groups[0]["params"])) == (0.03, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda net, compiled: ((3,), {}), "KFC takes a model, or an iterable of parameters.*got int"),
        (lambda net, compiled: ((conv_network().parameters(),), {}), r"KFC\(params, model=model\)"),
        (lambda net, compiled: ((net.parameters(),), {"model": 3}), r"model must be an nn\.Module, got int"),
        (lambda net, compiled: ((compiled,), {"model": compiled}), "two models"),
        (lambda net, compiled: ((net[0].weight,), {"model": compiled}), "an iterable of parameters.*got Parameter"),
        (lambda net, compiled: (([],), {"model": compiled}), "nothing to optimize"),
        (lambda net, compiled: ((conv_network().parameters(),), {"model": compiled}), "none of the parameters belongs to the model"),
    ],
)  # fmt: skip
def test_what_is_no_model_nor_its_parameters_is_refused(arguments, message):
    net = conv_network()
    positional, named = arguments(net, kfc_fx.compile(net))
    with pytest.raises(kfc_fx.OptionError, match=message):
        kfc_fx.KFC(*positional, lr=0.1, **named)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(kfc_fx.OptionError, match="there are no parameters"):
        kfc_fx.KFC(kfc_fx.compile(nn.ReLU()))


def test_the_options_of_vectors_are_one_for_all_blocks():
    compiled = kfc_fx.compile(conv_network())
    with pytest.raises(kfc_fx.OptionError, match=r"clip is one for all.*Eigen has 0\.01, Inverse"):
        kfc_fx.KFC(compiled, scaling="eigen", blocks={"0": kfc_fx.Inverse(clip=1.0)})
    for option in ({"quadratic_model": True}, {"adapt_damping": 5}):
        with pytest.raises(kfc_fx.OptionError, match="needs scaling='inverse' for all blocks"):
            kfc_fx.KFC(compiled, scaling=kfc_fx.Inverse(**option), blocks={"0": "adam"})
    exact = {"clip_by": "exact"}
    with pytest.raises(kfc_fx.OptionError, match=r"one damping for all.* have 0\.1 and 0\.2"):
        kfc_fx.KFC(
            compiled,
            scaling=kfc_fx.Inverse(damping=0.1, **exact),
            blocks={"0": kfc_fx.Inverse(damping=0.2, **exact)},
        )


def test_the_repr_says_what_the_optimizer_does():
    compiled, opt = make(
        blocks={"3": "spectral"}, weight_decay=0.1, average=50.0, maximize=True, every=5
    )
    assert "blocks: known after the first step" in repr(opt)
    train(compiled, opt, 1)
    assert (
        repr(opt)
        == """KFC(
  scaling: Adam(betas=(0.9, 0.95), eps=1e-08, nesterov=True, orthogonalize=0.7, split=1, heads=1)
    '3': scaling Spectral(momentum=0.95, nesterov=True, damping=0.3, split=1, heads=1)
  blocks: 3 by adam, 1 by spectral
  generic: 0 parameters by GenericAdamW(lr_ratio=None, betas=(0.9, 0.999)), lr ratio 1
  statistics: every 5 steps, refreshed every 20
  likelihood: Categorical(dim=-1), empirical
  average: over 50 steps
  maximize: True
  group 0: lr 0.01, betas (0.9, 0.95), weight_decay 0.1, 557 numbers
)"""
    )


def test_diagnostics_are_flat_numbers():
    compiled, opt = make(scaling="eigen")
    before = opt.diagnostics.as_dict()
    assert before["steps"] == 0
    assert "nu" not in before
    train(compiled, opt, 2)
    found = opt.diagnostics.as_dict()
    assert all(type(value) in (int, float) for value in found.values())
    assert (found["steps"], found["statistics_steps"], found["damping"]) == (2, 2, 0.01)
    assert found["nu"] == opt.diagnostics.nu
    assert found["seconds_update"] == opt.diagnostics.seconds["update"] > 0
    assert found["dropped_statistics"] == 0
    assert "damping" not in make()[1].diagnostics.as_dict()
