"""The package and `reference` side by side on copies of one model, and small networks for it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import reference
import tekfac

# For matrices this small a second thread costs more than it gives.
torch.set_num_threads(1)

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

METHODS = ["KFAC", "EKFAC", "TKFAC", "TEKFAC"]
RESCALED = ["EKFAC", "TEKFAC"]
TRACED = ["TKFAC", "TEKFAC"]
TOLERANCE = 1e-6


# Operators whose result, or its size, the host has to read from the device.
WAITING = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "unique_dim", "_unique2", "equal",
    "is_nonzero", "multinomial",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = [i for i in indices if isinstance(i, Tensor) and i.dtype == torch.bool]
        if name in WAITING or masks:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def relative(found: Tensor, expected: Tensor) -> float:
    """The distance in units of the expected norm."""
    found, expected = found.detach().to(expected.device), expected.detach()
    return float((found - expected).norm() / expected.norm())


# The package's rules by the reference's, which have fields of the same names.
DAMPING_RULES: dict[type, Callable[..., tekfac.curvature.damping.Damping]] = {
    reference.Trace: tekfac.TraceDamping,
    reference.Mean: tekfac.MeanDamping,
    reference.Factored: tekfac.FactoredDamping,
    reference.Relative: tekfac.RelativeDamping,
}


class SideBySide:
    """A model trained by the package, and a copy of it trained by the reference.

    Args:
        model: the package's; the reference takes a copy of ``twin`` or else of it.
        method: name of the method.
        fisher: ``"exact"`` or ``"empirical"``.
        loss: the user's, a mean over examples.
        draws: the labels of ``"exact"``.
        twin: a model with the same parameters that computes the same, for the reference.
        likelihood: the package's name of ``draws``.
        options: what both take under the same name.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        *,
        fisher: str = "exact",
        loss: reference.Loss = F.cross_entropy,
        draws: reference.Draws = reference.categorical,
        twin: nn.Module | None = None,
        likelihood: Any = "categorical",
        **options: Any,
    ) -> None:
        self.model, self.loss = model, loss
        self.draws = draws if fisher == "exact" else reference.empirical(loss)
        unbounded = {"power": 1.0, "rms_clip": None, "nesterov": False}
        options = {"lr": 0.5, "damping": 1e-2, "momentum": 0.0, **unbounded, **options}
        self.slow = reference.Optimizer(copy.deepcopy(twin or model), method, **options)
        rule = DAMPING_RULES.get(type(options["damping"]))
        if rule is not None:
            options["damping"] = rule(**vars(options["damping"]))
        every = {"factor_every": 1, "basis_every": 1}
        if method in RESCALED:
            every["scale_every"] = 1
        if method in TRACED:
            every["fc_scale"] = 1.0
        self.fast = getattr(tekfac, method)(
            model, fisher=fisher, likelihood=likelihood, **{**every, **options}
        )
        self.start = {name: p.detach().clone() for name, p in self.slow.model.named_parameters()}

    def step(
        self, x: Tensor, y: Tensor, measured: dict[str, list[reference.Batch]] | None = None
    ) -> SideBySide:
        """One step of both on the same batch; the reference need not measure it once more."""
        self.fast.zero_grad()
        device = next(self.model.parameters()).device
        self.loss(self.model(x.to(device)), y.to(device)).backward()
        self.fast.step()
        self.slow.step(x, y, self.loss, self.draws, measured)
        return self

    def check_parameters(self) -> None:
        """Each parameter's change since the start agrees to 1e-6 of the change's norm."""
        for name, p in self.slow.model.named_parameters():
            expected = p.detach() - self.start[name]
            found = self.model.get_parameter(name).detach().to(p.device) - self.start[name]
            assert relative(found, expected) < TOLERANCE, name

    def check_blocks(self) -> None:
        """Every block, as the package shows it, is the reference's."""
        assert set(self.fast.blocks) == set(self.slow.blocks)
        for name, block in self.fast.blocks.items():
            dense = self.slow.dense(name)
            assert relative(block.dense(), dense) < TOLERANCE, name
            assert abs(block.trace / self.slow.trace(name) - 1) < TOLERANCE, name
            assert abs(block.damping / self.slow.damping_of(name) - 1) < TOLERANCE, name
            damped = torch.block_diag(*self.slow.damped(name))
            assert relative(block.dense(damped=True), damped) < TOLERANCE, name


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.Linear(4, 4, bias=bias), nn.Tanh(),
        nn.Linear(4, 3, bias=bias),
    ).double()  # fmt: skip


def flattened(bias: bool = True) -> nn.Sequential:
    """Stride, padding and a grouped convolution, then two fully-connected layers."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=bias), nn.Tanh(),
        nn.Conv2d(4, 4, (2, 3), padding="same", groups=2, bias=bias), nn.Tanh(),
        nn.Flatten(), nn.Linear(36, 3, bias=bias), nn.Tanh(), nn.Linear(3, 3, bias=bias),
    ).double()  # fmt: skip


def pooled(bias: bool = True) -> nn.Sequential:
    """Unpadded and strided convolutions, max-pooling, a mean over positions."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=bias), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2, padding=1, stride=(1, 2), bias=bias), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=bias),
    ).double()  # fmt: skip


NETWORKS = {"mlp": mlp, "flattened": flattened, "pooled": pooled}
CONVOLUTIONAL = ["flattened", "pooled"]


def batch(network: str, examples: int) -> tuple[Tensor, Tensor]:
    shape = (5,) if network == "mlp" else (2, 6, 6)
    return torch.randn(examples, *shape, dtype=torch.float64), torch.randint(3, (examples,))
