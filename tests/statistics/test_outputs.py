"""What a model may return, and what a likelihood may be."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from tests.models import collector_of
from tests.options import kfc

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(8, 4, generator=GENERATOR).double()
Y = torch.randint(3, (8,), generator=GENERATOR)


class Pair(NamedTuple):
    scores: Tensor
    hidden: Tensor


class Opaque:
    def __init__(self, logits: Tensor, hidden: Tensor, loss: Tensor) -> None:
        self.logits, self.hidden, self.loss = logits, hidden, loss


@dataclass
class Record:
    loss: Tensor
    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class FrozenRecord:
    logits: Tensor
    hidden: Tensor
    loss: Tensor


class ModelOutput(OrderedDict):
    """As in transformers: entries that are attributes as well."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __setattr__(self, name: str, value: Tensor) -> None:
        self[name] = value


FORMS = {
    "tensor": (lambda z, h, loss: z, lambda out: out),
    "tuple": (lambda z, h, loss: (z, h, loss), lambda out: out[0]),
    "list": (lambda z, h, loss: [None, "name", z, h], lambda out: out[2]),
    "dict-logits": (lambda z, h, loss: {"loss": loss, "logits": z}, lambda out: out["logits"]),
    "dict-out": (lambda z, h, loss: {"aux": h, "out": z}, lambda out: out["out"]),
    "dict-first": (lambda z, h, loss: {"score": z, "aux": h}, lambda out: out["score"]),
    "nested": (lambda z, h, loss: {"out": z, "more": [(h,)]}, lambda out: out["out"]),
    "namedtuple": (lambda z, h, loss: Pair(z, h), lambda out: out.scores),
    "dataclass": (lambda z, h, loss: Record(loss, z, h), lambda out: out.logits),
    "frozen-dataclass": (lambda z, h, loss: FrozenRecord(z, h, loss), lambda out: out.logits),
    "opaque": (lambda z, h, loss: Opaque(z, h, loss), lambda out: out.logits),
    "model-output": (
        lambda z, h, loss: ModelOutput(loss=loss, logits=z, hidden=h),
        lambda out: out.logits,
    ),
}


class Net(nn.Module):
    def __init__(self, form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)
        self.form = form

    def forward(self, x, y=None):
        hidden = torch.tanh(self.body(x))
        scores = self.head(hidden)
        loss = F.cross_entropy(scores, Y if y is None else y)
        return self.form(scores, hidden, loss)


def make(form, likelihood="categorical", **options):
    compiled = kfc_fx.compile(Net(form).double(), likelihood=likelihood)
    return compiled, kfc(compiled, **{"lr": 0.01, "seed": 3, "fisher": "sampled", **options})


def factors_of(compiled, opt) -> dict[str, tuple[Tensor, Tensor]]:
    opt.step()
    assert opt.diagnostics.statistics_steps == 1
    return {name: (f.omega, f.gamma) for name, f in opt.factors.items()}


def expected_factors(**options) -> dict[str, tuple[Tensor, Tensor]]:
    compiled, opt = make(FORMS["tensor"][0], **options)
    F.cross_entropy(compiled(X), Y).backward()
    return factors_of(compiled, opt)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("form", FORMS)
def test_the_prediction_is_found_in_every_form_of_output(form, fisher):
    build, read = FORMS[form]
    compiled, opt = make(build, fisher=fisher)
    output = compiled(X)
    plain = compiled._call_impl(X)
    assert type(output) is type(plain)
    assert torch.equal(read(output), read(plain))
    F.cross_entropy(read(output), Y).backward()
    torch.testing.assert_close(factors_of(compiled, opt), expected_factors(fisher=fisher))


@pytest.mark.parametrize(
    ("form", "read"),
    [
        ("dict-logits", lambda out: out["loss"]),
        ("tuple", lambda out: out[2]),
        ("dataclass", lambda out: out.loss),
        ("model-output", lambda out: out.loss),
    ],
)
def test_a_loss_that_the_output_holds_gives_statistics(form, read):
    compiled, opt = make(FORMS[form][0])
    read(compiled(X)).backward()
    torch.testing.assert_close(factors_of(compiled, opt), expected_factors())


@pytest.mark.parametrize(
    ("form", "read", "path"),
    [
        ("dict-out", lambda out: out["aux"], "aux"),
        ("namedtuple", lambda out: out.hidden, "hidden"),
        ("opaque", lambda out: out.hidden, "hidden"),
        ("tuple", lambda out: out[1], "1"),
    ],
)
def test_the_prediction_is_what_the_loss_differentiates_most(form, read, path):
    compiled, opt = make(FORMS[form][0], likelihood="auto")
    F.mse_loss(read(compiled(X)), torch.randn(8, 5).double()).backward()
    opt.step()
    (line,) = compiled.kfc.plan.likelihood
    assert line.startswith(f"Gaussian() of output '{path}': ")
    assert "head" not in collector_of(compiled).sums.blocks


def test_an_output_that_is_named_is_the_prediction():
    """The loss differentiates another one, and no error of the likelihood's is found."""
    compiled, opt = make(FORMS["tuple"][0], likelihood=kfc_fx.Categorical(output=0))
    scores, hidden, _ = compiled(X)
    (F.cross_entropy(scores, Y) + 100 * hidden.square().sum()).backward()
    torch.testing.assert_close(factors_of(compiled, opt), expected_factors())
    compiled, _opt = make(FORMS["tuple"][0], likelihood=kfc_fx.Categorical(output="second"))
    with pytest.raises(kfc_fx.OutputError, match=r"no tensor 'second'; its tensors are: '0', '1'"):
        compiled(X)


def test_a_loss_from_several_outputs_collects_once():
    compiled, opt = make(FORMS["tuple"][0])
    scores, hidden, loss = compiled(X)
    (loss + F.cross_entropy(scores, Y) + 1e-3 * hidden.square().sum()).backward()
    assert collector_of(compiled).sums.examples == len(X)
    torch.testing.assert_close(factors_of(compiled, opt), expected_factors())


@pytest.mark.parametrize(
    "change",
    [lambda z: z.div_(10), lambda z: z.add_(3 * torch.eye(8, 3).double())],
    ids=["div_", "add_"],
)
def test_an_in_place_op_on_the_output_does_not_touch_the_statistics(change):
    compiled, opt = make(FORMS["tensor"][0])
    output = compiled(X)
    change(output)
    F.cross_entropy(output, Y).backward()
    torch.testing.assert_close(factors_of(compiled, opt), expected_factors())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda z, h, loss: "scores", "output of type str: return a floating-point tensor"),
        (lambda z, h, loss: None, "output of type NoneType"),
        (lambda z, h, loss: [z.argmax(1)], "output of type list"),
        (lambda z, h, loss: {"logits": z.detach(), "aux": h}, "check that it is not detached"),
    ],
    ids=["string", "none", "integers", "detached"],
)
def test_an_output_without_a_prediction_is_refused_with_what_to_return(form, message):
    compiled, _ = make(form)
    with pytest.raises(kfc_fx.OutputError, match=message):
        compiled(X)
    with torch.no_grad():
        compiled(X)  # only statistics need a prediction
    collector_of(compiled).arm(False)
    compiled(X)


@pytest.mark.filterwarnings("ignore:likelihood=.* does not fit the loss:kfc_fx.KfcWarning")
@pytest.mark.parametrize(
    ("named", "built"),
    [
        ("categorical", kfc_fx.Categorical()),
        ("categorical", kfc_fx.Categorical(dim=1)),
        ("gaussian", kfc_fx.Gaussian()),
        ("bernoulli", kfc_fx.Bernoulli()),
    ],
    ids=str,
)
def test_a_likelihood_by_name_and_as_an_object_are_the_same(named, built):
    torch.testing.assert_close(
        expected_factors(likelihood=built), expected_factors(likelihood=named), rtol=0, atol=0
    )
    others = {"categorical", "gaussian", "bernoulli"} - {named}
    for other in others:
        gamma = expected_factors(likelihood=other)["head"][1]
        assert not torch.allclose(gamma, expected_factors(likelihood=named)["head"][1])


def test_a_likelihood_function_gives_the_cotangents():
    signs = torch.tensor([[1.0, -2.0, 1.0]]).double()
    factors = expected_factors(likelihood=lambda z: signs.expand_as(z))
    torch.testing.assert_close(factors["head"][1], signs.T @ signs)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda z: z.sum(1), r"\(8,\)"),
        (lambda z: z[:, :2], r"\(8, 2\)"),
        (lambda z: 1.0, "float"),
    ],
    ids=["vector", "narrow", "number"],
)
def test_a_likelihood_function_of_the_wrong_shape_is_refused(function, found):
    compiled, _ = make(FORMS["tensor"][0], likelihood=function)
    with pytest.raises(kfc_fx.OptionError, match=rf"shape \(8, 3\); it returned .*{found}"):
        compiled(X).sum().backward()


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [(torch.zeros_like, "knows no targets")],
)
def test_empirical_targets_are_refused_where_they_cannot_be_read_off(likelihood, message):
    compiled, _ = make(FORMS["tensor"][0], likelihood=likelihood, fisher="empirical")
    with pytest.raises(kfc_fx.OptionError, match=message):
        compiled(X).sum().backward()


def test_a_loss_before_the_prediction_in_a_tuple_is_not_taken_for_it():
    compiled, opt = make(lambda z, h, loss: (loss, z))
    compiled(X)[0].backward()
    torch.testing.assert_close(factors_of(compiled, opt)["head"][0].shape, torch.Size([6, 6]))
