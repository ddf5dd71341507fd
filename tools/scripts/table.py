"""The scripts that are known: where they are, how they are run, which lines KFC changes."""

from __future__ import annotations

from dataclasses import dataclass, field

from kfc_fx.tools.scripts.edits import Edit


@dataclass(frozen=True)
class Script:
    """A script of a project that the user has cloned."""

    project: str
    """Folder of the checkout, as ``git clone`` names it."""
    path: str
    """Of the script, in the project."""
    arguments: tuple[str, ...]
    """That both runs get: those of the project's own page where it runs on a CPU."""
    edits: tuple[Edit, ...]
    """By which it trains with KFC."""
    data: tuple[str, ...] = ()
    """Names of what stands in for downloads, see :mod:`kfc_fx.tools.scripts.data`."""
    kfc_arguments: tuple[str, ...] = ()
    """Flags of the script that its run by KFC gets besides."""
    losses: tuple[str, ...] = ("loss",)
    """One for each optimizer, in the order in which they step."""
    by_hand: bool = False
    """Whether it updates parameters without an optimizer."""
    largest_batch: int | None = None
    """Of its loaders, where no flag of it makes a step small enough for a CPU."""
    imports: tuple[str, ...] = field(default=())
    """Folders of the project that have to be importable beside the script's own."""

    @property
    def lines(self) -> int:
        """How many KFC changes."""
        return sum(edit.changed for edit in self.edits)


def two_lines(model: str, start: str, target: str = "optimizer", file: str = "") -> Edit:
    """``compile`` before the line that makes the optimizer, and KFC in its place."""
    return Edit(start, (f"kfc_fx.compile({model})", f"{target} = kfc_fx.KFC({model})"), file)


EXAMPLES = "examples"
NO_ACCELERATOR = ("--no-accel",)

SCRIPTS: dict[str, Script] = {
    "mnist": Script(
        EXAMPLES,
        "mnist/main.py",
        NO_ACCELERATOR,
        (two_lines("model", "optimizer = optim.Adadelta("),),
        ("mnist",),
    ),
    "mnist_rnn": Script(
        EXAMPLES,
        "mnist_rnn/main.py",
        (),
        (two_lines("model", "optimizer = optim.Adadelta("),),
        ("mnist",),
    ),
    "imagenet": Script(
        EXAMPLES,
        "imagenet/main.py",
        (*NO_ACCELERATOR, "-b", "8", "-j", "0", "--seed", "0", "imagenet"),
        (two_lines("model", "optimizer = torch.optim.SGD("),),
        ("image_folder",),
    ),
    "vae": Script(
        EXAMPLES,
        "vae/main.py",
        NO_ACCELERATOR,
        (two_lines("model", "optimizer = optim.Adam("),),
        ("mnist",),
    ),
    "dcgan": Script(
        EXAMPLES,
        "dcgan/main.py",
        (
            *("--dataset=cifar10", "--dataroot=.", "--workers=0", "--manualSeed=1"),
            *("--batchSize=16", "--ngf=32", "--ndf=32"),
        ),
        (
            two_lines("netD", "optimizerD = optim.Adam(", "optimizerD"),
            two_lines("netG", "optimizerG = optim.Adam(", "optimizerG"),
        ),
        ("cifar10",),
        losses=("discriminator", "generator"),
    ),
    "super_resolution": Script(
        EXAMPLES,
        "super_resolution/main.py",
        (
            *("--upscale_factor=3", "--batchSize=4", "--testBatchSize=100", "--nEpochs=30"),
            *("--lr=0.001", "--threads=0"),
        ),
        (two_lines("model", "optimizer = optim.Adam("),),
        ("photographs",),
    ),
    "word_language_model": Script(
        EXAMPLES,
        "word_language_model/main.py",
        ("--data=text",),
        (
            Edit(
                "optimizer = torch.optim.AdamW(",
                ("kfc_fx.compile(model, batch_dim=(1, 0))", "optimizer = kfc_fx.KFC(model)"),
            ),
        ),
        ("words",),
        kfc_arguments=("--use-optimizer",),
        by_hand=True,
    ),
    "word_language_model-transformer": Script(
        EXAMPLES,
        "word_language_model/main.py",
        ("--data=text", "--model=Transformer", "--lr=5"),
        (
            Edit(
                "optimizer = torch.optim.AdamW(",
                ("kfc_fx.compile(model, batch_dim=1)", "optimizer = kfc_fx.KFC(model)"),
            ),
        ),
        ("words",),
        kfc_arguments=("--use-optimizer",),
        by_hand=True,
    ),
    "gcn": Script(
        EXAMPLES,
        "gcn/main.py",
        NO_ACCELERATOR,
        (two_lines("gcn", "optimizer = Adam("),),
        ("citations",),
    ),
    "gat": Script(
        EXAMPLES,
        "gat/main.py",
        (*NO_ACCELERATOR, "--num-heads=2"),
        (two_lines("gat_net", "optimizer = Adam("),),
        ("citations",),
    ),
    "nanoGPT": Script(
        "nanoGPT",
        "train.py",
        (
            *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False"),
            *("--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12"),
            *("--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000"),
            *("--lr_decay_iters=2000", "--dropout=0.0"),
        ),
        (two_lines("model", "optimizer = model.configure_optimizers("),),
        ("characters",),
        kfc_arguments=("--learning_rate=0.01", "--min_lr=0.001"),
    ),
    "pytorch-cifar": Script(
        "pytorch-cifar",
        "main.py",
        (),
        (two_lines("net", "optimizer = optim.SGD("),),
        ("cifar10",),
        largest_batch=16,
    ),
    "minGPT-adder": Script(
        "minGPT",
        "projects/adder/adder.py",
        ("--trainer.num_workers=0",),
        (
            two_lines(
                "model",
                "self.optimizer = model.configure_optimizers(",
                "self.optimizer",
                "mingpt/trainer.py",
            ),
        ),
        imports=(".",),
    ),
    "minGPT-chargpt": Script(
        "minGPT",
        "projects/chargpt/chargpt.py",
        ("--trainer.num_workers=0", "--trainer.batch_size=8"),
        (
            two_lines(
                "model",
                "self.optimizer = model.configure_optimizers(",
                "self.optimizer",
                "mingpt/trainer.py",
            ),
        ),
        ("input_text",),
        imports=(".",),
    ),
}
"""By the name that ``--only`` takes."""
