"""Finding, building and loading what a target names, and what is said where that fails."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from kfc_fx.errors import CaptureError, TargetError
from kfc_fx.inspect.document import build_document
from kfc_fx.inspect.graph_text import print_graph
from kfc_fx.inspect.inputs import InputSpec, guess_inputs, parse_input
from kfc_fx.inspect.inspection import InspectionOptions, inspect_model
from kfc_fx.inspect.target import Subject, load_checkpoint, parse_arguments, resolve_target
from tests.inspect.small_networks import Branching, ConvNet, TokenNet

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, 2)
    def forward(self, x):
        return self.layer(x)

class Holder:
    inner = Net

instance = Net(3)

def builder(width, bias=True):
    return nn.Linear(width, 2, bias=bias)

def number():
    return 3

def failing():
    raise ValueError("no weights\\nat all")

constant = 7
"""


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "own_nets.py"
    path.write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.delitem(__import__("sys").modules, "own_nets", raising=False)
    return path


@pytest.mark.parametrize("module", ["own_nets", "./own_nets.py"])
@pytest.mark.parametrize(
    ("attribute", "arguments", "features"),
    [
        ("Net", {}, 4),
        ("Net", {"width": 6}, 6),
        ("Holder.inner", {}, 4),
        ("instance", {}, 3),
        ("builder", {"width": 5, "bias": False}, 5),
    ],
)
def test_classes_functions_and_instances(own_file, module, attribute, arguments, features):
    subject = resolve_target(f"{module}:{attribute}", arguments)
    (linear,) = [m for m in subject.model.modules() if isinstance(m, nn.Linear)]
    assert linear.in_features == features


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("resnet18", {}, "names no model: write module:attribute"),
        (":Net", {}, "names no model"),
        ("own_nets:Nett", {}, r"own_nets has no 'Nett' \(did you mean 'Net'\?\)"),
        ("own_nets:Holder.iner", {}, r"did you mean 'inner'"),
        ("own_nests:Net", {}, "there is no module 'own_nests'"),
        ("torchvison.models:resnet18", {}, r"did you mean 'torchvision'\?"),
        ("torch.nn.modulse:Linear", {}, r"did you mean 'torch.nn.modules'\?"),
        ("./own_net.py:Net", {}, r"no file 'own_net.py' \(did you mean 'own_nets.py'\?\)"),
        ("own_nets:number", {}, "returned a int, not an nn.Module"),
        ("own_nets:constant", {}, "is a int, neither a model nor callable"),
        ("own_nets:failing", {}, "calling own_nets:failing fails: ValueError: no weights$"),
        ("own_nets:builder", {}, "missing 1 required positional argument: 'width'.*--model-arg"),
        ("own_nets:builder", None, "missing 1 required positional argument: 'width'$"),
        ("own_nets:Net", {"widht": 3}, "unexpected keyword argument 'widht'"),
        ("own_nets:instance", {"width": 3}, "is a model already"),
        ("nothing.pt2", {}, "there is no file 'nothing.pt2'"),
        ("own.pt2", {"width": 3}, "takes no model arguments"),
    ],
)
def test_what_cannot_be_found_or_built(own_file, target, arguments, message):
    with pytest.raises(TargetError, match=message):
        resolve_target(target, arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nonexistent_package", "importing 'broken' fails: No module named"),
        ("1 / 0", "importing 'broken' fails: ZeroDivisionError: division by zero"),
        ("def f(:", "importing 'broken' fails: SyntaxError"),
    ],
)
def test_a_module_that_does_not_import(own_file, text, message):
    Path("broken.py").write_text(textwrap.dedent(text))
    with pytest.raises(TargetError, match=message):
        resolve_target("broken:Net")
    with pytest.raises(TargetError, match=r"importing 'broken.py' fails"):
        resolve_target("./broken.py:Net")


def test_arguments_are_literals_or_strings():
    found = parse_arguments(["a=3", "b=[1, 2]", "c=None", "name=resnet18", "d=x=y"])
    assert found == {"a": 3, "b": [1, 2], "c": None, "name": "resnet18", "d": "x=y"}
    with pytest.raises(TargetError, match="must be name=value"):
        parse_arguments(["width"])


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("1x3x8x8", (1, 3, 8, 8), "float32"),
        ("2x16:int64", (2, 16), "int64"),
        ("5", (5,), "float32"),
    ],
)
def test_inputs_from_text(text, shape, dtype):
    spec = parse_input(text)
    assert spec == InputSpec(shape, dtype)
    assert str(spec) == text
    example = spec.example()
    assert example.shape == shape
    assert str(example.dtype) == f"torch.{dtype}"
    assert torch.equal(example, spec.example())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1x3xA", "a shape is sizes joined by x"),
        ("0x3", "a shape is sizes joined by x"),
        ("", "a shape is sizes joined by x"),
        ("1x3:flaot32", r"unknown dtype 'flaot32' \(did you mean 'float32'\?\)"),
    ],
)
def test_inputs_that_are_none(text, message):
    with pytest.raises(TargetError, match=message):
        parse_input(text)


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ("torchvision.models:resnet18", (1, 3, 224, 224)),
        ("torchvision.models:inception_v3", (1, 3, 299, 299)),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of inception_v3")
def test_torchvision_names_its_crops(target, shape):
    pytest.importorskip("torchvision")
    assert guess_inputs(resolve_target(target)) == (InputSpec(shape),)


def test_other_models_are_guessed_from_their_first_layer():
    def guessed(model: nn.Module) -> str:
        return " ".join(map(str, guess_inputs(Subject("own:net", model))))

    assert guessed(ConvNet()) == "1x2x6x6"  # no other size of a map fits its head
    assert guessed(TokenNet()) == "1x16:int64"
    assert guessed(nn.Sequential(nn.Linear(7, 2))) == "1x7"
    timm_like = nn.Conv2d(3, 4, 3)
    timm_like.pretrained_cfg = {"input_size": (3, 160, 160)}
    assert guessed(timm_like) == "1x3x160x160"


def test_what_cannot_be_guessed_names_the_flag():
    with pytest.raises(TargetError, match="--input 1x3x224x224"):
        guess_inputs(Subject("own:net", nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(1001, 2))))
    with pytest.raises(TargetError, match="--input"):
        guess_inputs(Subject("own:net", nn.Sequential(nn.ReLU())))


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_checkpoints(tmp_path, key):
    saved = ConvNet().state_dict()
    torch.save(saved if key is None else {key: saved, "epoch": 3}, tmp_path / "saved.pt")
    model = ConvNet()
    load_checkpoint(model, tmp_path / "saved.pt")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([1, 2], "holds a list, not a state_dict"),
        ({"haed.weight": 0}, r"no 'haed.weight' \(did you mean 'head.weight'\?\)"),
        ({"head.weight": torch.ones(5, 144)}, "lacks 12 entries, 'first.weight' first"),
        ({**ConvNet().state_dict(), "head.bias": torch.ones(4)}, "size mismatch for head.bias"),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path, saved, message):
    torch.save(saved, tmp_path / "saved.pt")
    with pytest.raises(TargetError, match=message):
        load_checkpoint(ConvNet(), tmp_path / "saved.pt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save(ConvNet(), tmp_path / "whole.pt")
    with pytest.raises(TargetError, match=r"whole.pt: Weights only load failed"):
        load_checkpoint(ConvNet(), tmp_path / "whole.pt")
    with pytest.raises(TargetError, match="No such file"):
        load_checkpoint(ConvNet(), tmp_path / "nothing.pt")


class Exportable(nn.Module):
    """Every layer whose aten call has arguments of another order."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.batch = nn.BatchNorm1d(8)
        self.layer = nn.LayerNorm(16)
        self.group = nn.GroupNorm(2, 8)
        self.transposed = nn.ConvTranspose1d(8, 4, 2, stride=2)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens):
        x = self.batch(self.conv(self.embedding(tokens).transpose(1, 2)))
        return self.head(self.transposed(self.group(self.layer(x))))


def test_a_saved_program_has_the_blocks_and_outputs_of_its_model(tmp_path):
    torch.manual_seed(0)
    model, tokens = Exportable().eval(), torch.randint(11, (4, 16))
    torch.export.save(torch.export.export(model, (tokens,)), tmp_path / "net.pt2")
    subject = resolve_target(str(tmp_path / "net.pt2"))
    assert torch.equal(subject.model(tokens), model(tokens))
    inputs = guess_inputs(subject)
    assert inputs == (InputSpec((4, 16), "int64"),)
    found = build_document(inspect_model(subject.model, "net.pt2", inputs))
    expected = build_document(inspect_model(model, "net", inputs))
    assert found["blocks"] == expected["blocks"]
    assert len(found["blocks"]) == 7


def test_a_file_that_is_no_program(tmp_path):
    (tmp_path / "junk.pt2").write_text("junk")
    with pytest.raises(TargetError, match=r"is no program of torch.export"):
        resolve_target(str(tmp_path / "junk.pt2"))


@pytest.mark.parametrize("capture", ["dynamo", "symbolic"])
def test_inputs_that_the_model_does_not_take(capture):
    with pytest.raises((TargetError, CaptureError), match=r"1, 3, 6, 6|1x3x6x6") as raised:
        inspect_model(ConvNet(), "ConvNet", [parse_input("1x3x6x6")], InspectionOptions(capture))
    assert "channels" in str(raised.value)


def test_a_batch_of_one_that_a_norm_refuses():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(TargetError, match=r"larger batch \(--input 2x4\), or --eval"):
        inspect_model(model, "net", [parse_input("1x4")])


def test_a_branch_on_a_value_is_refused_by_symbolic_capture_alone():
    inputs = [parse_input("2x4")]
    with pytest.raises(CaptureError, match="capture by dynamo takes any Python"):
        inspect_model(Branching(), "Branching", inputs, InspectionOptions("symbolic"))
    assert inspect_model(Branching(), "Branching", inputs).plan.blocks


class Hidden(nn.Module):
    """Layers whose modules ``symbolic_trace`` does not enter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.recurrent = nn.LSTM(4, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.recurrent(self.conv(x).flatten(2).transpose(1, 2))[0]
        return self.head(self.attention(x, x, x)[0])


def test_a_symbolic_capture_hides_no_use_of_a_parameter():
    inputs = [parse_input("2x2x4x4")]
    found = inspect_model(Hidden(), "Hidden", inputs, InspectionOptions("symbolic"))
    assert [block.name for block in found.plan.blocks] == ["conv", "head"]
    reasons = {generic.name: generic.reason for generic in found.plan.generic}
    assert len(reasons) == 8
    assert all("functional_call" in reason for reason in reasons.values())
    assert "at recurrent (LSTM)" in reasons["recurrent.weight_ih_l0"]
    namespace = {}
    exec(print_graph(found.graphs[0].stages[0].module, "captured"), namespace)
    model, x = found.compiled, inputs[0].example()
    assert torch.equal(namespace["forward"](model, x), model._call_impl(x))
