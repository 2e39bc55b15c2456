"""The scripts in ``examples/``: frameworks' own loops give what a plain loop gives, bit for bit."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from tekfac.curvature import blocks

torch.set_num_threads(1)

FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str, *packages: str) -> ModuleType:
    """A script as a module; the test is skipped where a package that it needs is missing."""
    for package in packages:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A warning of ours is an error, frameworks' are their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", category=RuntimeWarning, message=".*(curvature|tekfac)")
        yield


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def far(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)


def not_measured(optimizer: tekfac.NaturalGradient) -> list[str]:
    """Of matrices that are trained, and no tables or tokens, those without curvature."""
    return [
        entry.name
        for entry in optimizer.summary().entries
        if len(entry.shape) > 1
        and not entry.measured
        and "mbedding" not in entry.treatment
        and not entry.treatment.startswith("not trained")
        and entry.name not in ("cls_token", "pos_embed")
    ]


def test_every_script_is_on_the_page() -> None:
    page = (FOLDER / "README.md").read_text()
    for script in FOLDER.glob("*.py"):
        assert f"`{script.name}`" in page


# -- Hugging Face's Trainer ------------------------------------------------------------------------

FAMILIES = ["gpt2", "llama", "bert", "vit", "t5"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bf16": True, "gradient_accumulation_steps": 2},
    {"gradient_checkpointing": True},
]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    module = load("huggingface_trainer", "transformers", "accelerate")
    import transformers
    from accelerate.state import AcceleratorState

    transformers.logging.set_verbosity_error()
    AcceleratorState._reset_state(reset_partial_state=True)
    # What the Trainer sets for a compiler it leaves there.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    yield module
    AcceleratorState._reset_state(reset_partial_state=True)


def plain_trainer(module: ModuleType, family: str, folder: str, steps: int, **given: Any) -> Any:
    """The model as a loop without the Trainer leaves it, with the Trainer's batches."""
    import transformers

    trainer = module.make_trainer(family, folder, steps, logging_strategy="no", **given)
    accumulate = given.get("gradient_accumulation_steps", 1)
    seen: list[dict[str, Tensor]] = []
    forward = trainer.compute_loss

    def listen(model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append({name: value.clone() for name, value in inputs.items()})
        return forward(model, inputs, *args, **kwargs)

    trainer.compute_loss = listen
    trainer.train()

    transformers.set_seed(0)
    model = module.MODELS[family]().train()
    optimizer = tekfac.TEKFAC(model, lr=3e-3)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, steps)
    batches = iter(seen)
    for _ in range(steps):
        group = list(itertools.islice(batches, accumulate))
        labels = [
            batch["labels"][:, 1:] if family == "gpt2" else batch["labels"] for batch in group
        ]
        count = sum(int((each != -100).sum()) for each in labels)
        for batch in group:
            with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in given):
                extra = {"num_items_in_batch": count} if family == "gpt2" else {}
                loss = model(**batch, **extra).loss
            (loss if family == "gpt2" else loss / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return trainer, model


# Without options: in the tests below.
@pytest.mark.parametrize("options", OPTIONS[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_measures_everything(
    trainer: ModuleType, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    run = trainer.make_trainer(family, str(tmp_path), 4, logging_strategy="no", **options)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train()
    optimizer = run.optimizer.optimizer
    assert not_measured(optimizer) == []
    assert optimizer.counters["steps"] == 4
    assert not any(map(torch.equal, before, run.model.parameters()))
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


# GPT-2 in bfloat16 gets gradients from the Trainer that are rounded at another place.
@pytest.mark.parametrize(
    ("family", "options"),
    [("gpt2", {}), ("gpt2", {"gradient_accumulation_steps": 2}), ("vit", {}), ("vit", OPTIONS[1])],
)
def test_trainer_does_what_a_plain_loop_does(
    trainer: ModuleType,
    tmp_path: Path,
    family: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In low precision: rounding, which is not the same in both, would grow to a thousandth.
    monkeypatch.setattr(blocks, "ORTHOGONAL_SHARE", 0.0)
    make = trainer.MODELS[family]

    def without_dropout() -> nn.Module:  # which would draw in another order
        model = make()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    trainer.MODELS[family] = without_dropout
    run, model = plain_trainer(trainer, family, str(tmp_path), 6, **options)
    assert not_measured(run.optimizer.optimizer) == []
    assert far(run.model, model) < 1e-5


def test_trainer_with_checkpointing_does_what_it_does_without(
    trainer: ModuleType, tmp_path: Path
) -> None:
    models = []
    for how in (False, True):
        run = trainer.make_trainer(
            "llama", str(tmp_path), 6, logging_strategy="no", gradient_checkpointing=how
        )
        run.train()
        assert not_measured(run.optimizer.optimizer) == []
        models.append(run.model)
    assert far(*models) < 1e-6


def test_trainer_makes_the_optimizer(trainer: ModuleType, tmp_path: Path) -> None:
    models = []
    for by_class in (False, True):
        run = trainer.make_trainer("bert", str(tmp_path), 6, by_class, logging_strategy="no")
        run.train()
        assert not_measured(run.optimizer.optimizer) == []
        models.append(run.model)
    assert isinstance(run.optimizer.optimizer, tekfac.TEKFAC)
    assert equal(*models)


# Not "vit": transformers 5.24 does not find all weights of its checkpoints, with any optimizer.
@pytest.mark.parametrize(
    ("family", "options"),
    [("gpt2", OPTIONS[0]), ("llama", OPTIONS[1]), ("bert", OPTIONS[1]), ("t5", OPTIONS[0])],
)
def test_trainer_goes_on_from_a_checkpoint(
    trainer: ModuleType, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    options = {"logging_strategy": "no", **options}
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer.make_trainer(family, str(tmp_path), 9, **saving, **options)
    whole.train()
    assert not_measured(whole.optimizer.optimizer) == []
    resumed = trainer.make_trainer(family, str(tmp_path), 9, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert equal(whole.model, resumed.model)


# In the first 16 steps, which all measure, compilers stand aside.
def test_trainer_compiles(trainer: ModuleType, tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    models = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = trainer.make_trainer("vit", str(tmp_path), 24, logging_strategy="no", **options)
        run.train()
        models.append(run.model)
    assert isinstance(run.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not_measured(run.optimizer.optimizer) == []
    assert far(*models) < 1e-5


# -- Lightning -------------------------------------------------------------------------------------


def plain_lightning(
    module: ModuleType,
    steps: int,
    accumulate: int = 1,
    clip: float | None = None,
    bf16: bool = False,
) -> nn.Module:
    torch.manual_seed(0)
    model = module.Classifier()
    network = nn.Sequential(model.net, model.head)
    optimizer = tekfac.TEKFAC(network, lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    batches = itertools.cycle(torch.utils.data.DataLoader(module.points(), batch_size=32))
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in itertools.islice(batches, accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(network(x), y)
            (loss / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        scheduler.step()
    return model


@pytest.fixture
def lightning_module() -> ModuleType:
    return load("lightning_module", "lightning")


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
        ({"precision": "bf16-mixed"}, {"bf16": True}),
    ],
)
def test_lightning_does_what_a_plain_loop_does(
    lightning_module: ModuleType, arguments: dict[str, Any], plain: dict[str, Any]
) -> None:
    trainer = lightning_module.fit(20, **arguments)
    assert not_measured(trainer.optimizers[0]) == []
    assert equal(trainer.lightning_module, plain_lightning(lightning_module, 20, **plain))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_lightning_goes_on_from_a_checkpoint(
    lightning_module: ModuleType, tmp_path: Path, precision: str
) -> None:
    options = {"precision": precision, "enable_checkpointing": True, "default_root_dir": tmp_path}
    whole = lightning_module.fit(24, **options)
    half = lightning_module.fit(16, **options)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = lightning_module.fit(24, str(tmp_path / "half.ckpt"), **options)
    assert not_measured(resumed.optimizers[0]) == []
    assert equal(whole.lightning_module, resumed.lightning_module)


# -- Accelerate ------------------------------------------------------------------------------------


@pytest.fixture
def accelerate_loop() -> Iterator[ModuleType]:
    module = load("accelerate_loop", "accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield module
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("precision", "accumulate"), [("no", 1), ("bf16", 2)])
def test_accelerate_does_what_a_plain_loop_does(
    accelerate_loop: ModuleType, precision: str, accumulate: int
) -> None:
    model, optimizer = accelerate_loop.train(3, precision, accumulate)
    assert not_measured(optimizer) == []
    torch.manual_seed(0)
    other = accelerate_loop.Network()
    plain = tekfac.TEKFAC(other, lr=3e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(plain, step_size=8, gamma=0.8)
    loader = torch.utils.data.DataLoader(accelerate_loop.pictures(), batch_size=16)
    for _ in range(3):
        for number, (x, y) in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = other(x)
            (F.cross_entropy(logits.float(), y) / accumulate).backward()
            if (number + 1) % accumulate == 0:
                nn.utils.clip_grad_norm_(other.parameters(), 5.0)
                plain.step()
                scheduler.step()
                plain.zero_grad()
    assert far(model, other) < 1e-6


def test_accelerate_goes_on_from_a_state(accelerate_loop: ModuleType, tmp_path: Path) -> None:
    whole, optimizer = accelerate_loop.train(3, save=tmp_path / "state")
    resumed, other = accelerate_loop.train(3, resume=tmp_path / "state")
    assert equal(whole, resumed)
    assert optimizer.counters == other.counters


# -- timm, peft ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_timm(name: str) -> None:
    module = load("timm_training", "timm")
    model, averaged, optimizer = module.train(name, steps=6, size=None)
    assert not_measured(optimizer) == []
    assert not equal(model, averaged)
    assert optimizer.param_groups[0]["lr"] < 3e-3


def test_peft_adapters_are_matrices() -> None:
    module = load("peft_lora", "peft", "transformers")
    frozen = {
        n: p.clone() for n, p in module.make_model().named_parameters() if not p.requires_grad
    }
    model, optimizer, losses = module.train(12)
    assert losses[-1] < losses[0] - 0.5
    assert len(optimizer.blocks) == 13  # two for each of six adapters, and the head
    assert not_measured(optimizer) == []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, frozen[name])


# -- adversaries -----------------------------------------------------------------------------------


def test_dcgan_leaves_nothing_of_the_generators_pass_in_the_discriminator() -> None:
    module = load("dcgan")
    generator, discriminator, of_generator, of_discriminator = module.train(12, fisher="exact")
    assert not_measured(of_generator) == not_measured(of_discriminator) == []

    torch.manual_seed(0)
    other, critic = module.make_generator(), module.make_discriminator()
    of_other = tekfac.TEKFAC(other, lr=1e-3, likelihood="gaussian")
    of_critic = tekfac.TEKFAC(critic, lr=1e-3, likelihood="bernoulli", fisher="exact")
    draws = torch.Generator().manual_seed(1)
    ones = torch.ones(16)
    for _ in range(12):
        of_critic.zero_grad()
        loss = F.binary_cross_entropy_with_logits
        loss(critic(module.discs(16, draws)), ones).backward()
        fake = other(torch.randn(16, module.NOISE, 1, 1, generator=draws))
        loss(critic(fake.detach()), 0 * ones).backward()
        of_critic.step()
        # Through the discriminator without any of its gradients.
        of_other.zero_grad()
        critic.requires_grad_(False)
        loss(critic(fake), ones).backward()
        critic.requires_grad_(True)
        of_other.step()
    assert equal(generator, other)
    assert equal(discriminator, critic)


def test_wgan_penalty_has_no_part_in_the_curvature() -> None:
    module = load("wgan_gp")
    options: dict[str, Any] = {"fisher": "exact", "likelihood": "gaussian", "factor_rows": None}
    torch.manual_seed(0)
    critic, draws = module.make_critic().double(), torch.Generator().manual_seed(1)
    real, fake = module.ring(8, draws).double(), torch.randn(8, 2, generator=draws).double()
    optimizer = tekfac.EKFAC(critic, lr=0.0, scale_every=1, scale_examples=None, **options)
    loss = critic(fake).mean() - critic(real).mean()
    loss = loss + 10 * module.penalty(critic, real, fake, draws)
    loss.backward()
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    optimizer.close()
    torch.manual_seed(0)
    before = module.make_critic().double()
    for name, block in optimizer.blocks.items():
        layer = before.get_submodule(name)
        total = 0.0
        for score in before(torch.cat([fake, real])).flatten():
            found = torch.autograd.grad(score, list(layer.parameters()), retain_graph=True)
            total += sum(float(g.square().sum()) for g in found)
        assert block.trace == pytest.approx(total / 16, rel=1e-8)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_wgan_trains(fisher: str) -> None:
    module = load("wgan_gp")
    generator, _, optimizer = module.train(20, fisher=fisher)
    assert not_measured(optimizer) == []
    points = generator(torch.randn(64, module.NOISE))
    assert bool(points.isfinite().all())
