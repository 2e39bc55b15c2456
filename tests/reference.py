"""The four methods once more, slowly: dense matrices from per-example gradients, in float64.

Nothing here uses the package. Every example goes through the model alone, autograd differentiates
each of its log-likelihoods, the Fisher block is the explicit mean of outer products, and a
preconditioned gradient is a dense solve, or a product with a dense matrix's power. Vectors are in
the order ``torch.cat([weight.flatten(1), bias[:, None]], 1).flatten()``, in which the matrix of
``V ↦ G V A`` is ``kron(G, A)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Draw(NamedTuple):
    """One label's negative log-likelihood for one example, and the weight of that label.

    ``term`` numbers the label's term among those of the example; the expectation, and the user's
    loss, are means over all examples' terms. ``terms`` is for a draw that is several at once.
    """

    nll: Tensor
    weight: float
    term: int = 0
    terms: int = 1


Loss = Callable[[Any, Tensor], Tensor]
Draws = Callable[[Any, Tensor], list[Draw]]
"""From the output for one example and its target to the labels the Fisher matrix averages over."""


def empirical(loss: Loss) -> Draws:
    """The data's own label: the user's loss of the example alone."""

    def draw(output: Any, target: Tensor) -> list[Draw]:
        # What PyTorch's mean was taken over: one entry of the target each, if not left out.
        terms = int((target != -100).sum())
        return [Draw(loss(output, target) * terms, 1.0, terms=terms)] if terms else []

    return draw


def categorical(output: Tensor, target: Tensor) -> list[Draw]:
    """All classes at all positions of a ``(1, C, ...)`` output, but for positions labelled -100.

    Scores of independent positions have mean zero, so the cross terms vanish and the expectation
    over all labellings is the sum over positions of the expectation over that position's classes.
    """
    log_p = output.log_softmax(1)[0].reshape(output.shape[1], -1)
    kept = (target.reshape(-1) != -100).nonzero().flatten().tolist()
    return [Draw(-lp, lp.exp().item(), place) for place in kept for lp in log_p[:, place]]


def bernoulli(output: Tensor, target: Tensor) -> list[Draw]:
    """Both values of every logit."""
    log_p = F.logsigmoid(torch.stack([output.flatten(), -output.flatten()]))
    return [Draw(-lp, lp.exp().item(), i) for side in log_p for i, lp in enumerate(side)]


def gaussian(variance: float = 1.0) -> Draws:
    """Unit-score directions: ``E[g gᵀ] = I / variance`` for the mean of a normal distribution."""
    return lambda output, target: [
        Draw(m / math.sqrt(variance), 1.0, i) for i, m in enumerate(output.flatten())
    ]


# -- what one batch says about a layer -------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Everything one batch says about one layer (one group of it, for a grouped convolution).

    Shapes, for ``N`` examples, ``M`` draws in all and ``T`` positions: ``inputs (N, T, d_in)``,
    ``cotangents (M, T, d_out)``, ``gradients (M, d_out, d_in)``; ``owner (M,)`` is each draw's
    example. ``terms`` of the likelihood are in it, and ``(N, T)`` positions are ``live``: padding,
    which no term looks at, is not.
    """

    inputs: Tensor
    cotangents: Tensor
    gradients: Tensor
    owner: Tensor
    weight: Tensor
    terms: int
    live: Tensor
    lookups: bool = False

    @property
    def active(self) -> Tensor:
        """Columns of W in which the batch has gradients: an embedding's entries that it saw."""
        if not self.lookups:
            return torch.tensor(self.inputs.shape[2])
        return (self.inputs * self.live[:, :, None]).flatten(0, 1).any(0).sum()

    @property
    def examples(self) -> int:
        return int(self.live.any(1).sum())

    @property
    def omega(self) -> Tensor:
        live = self.live.to(self.inputs.dtype)
        return torch.einsum("nt,nti,ntj->nij", live, self.inputs, self.inputs)

    @property
    def gamma(self) -> Tensor:
        g = self.cotangents
        counts = self.live.sum(1).clamp_min(1)[self.owner]
        each = torch.einsum("m,mti,mtj->mij", self.weight / counts, g, g)
        empty = g.new_zeros(len(self.inputs), g.shape[2], g.shape[2])
        return empty.index_add(0, self.owner, each)

    @property
    def fisher(self) -> Tensor:
        """``E[vec(D) vec(D)ᵀ]``."""
        d = self.gradients.flatten(1)
        return torch.einsum("m,mi,mj->ij", self.weight, d, d) / self.terms


def curvature_layers(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS))
        and any(p.requires_grad for p in module.parameters())
        and name not in set(exclude)
    }


def groups_of(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, CONVOLUTIONS) else 1


def parts(layer: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of a layer, weight first."""
    own = (layer.weight, getattr(layer, "bias", None))
    return [p for p in own if p is not None and p.requires_grad]


def matrix(layer: nn.Module, values: Sequence[Tensor]) -> Tensor:
    """Tensors shaped as `parts` as one ``(groups, d_out, d_in)`` matrix per group."""
    if isinstance(layer, nn.Embedding):
        return values[0].T[None]  # a row for each entry, which is a column of W
    columns = torch.cat([v.reshape(len(v), -1) for v in values], 1)
    return columns.reshape(groups_of(layer), -1, columns.shape[1])


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies its weight with, ``(groups, N, T, d_in)``, no entry for the bias."""
    if isinstance(layer, nn.Embedding):
        rows = torch.eye(layer.num_embeddings, dtype=layer.weight.dtype)
        if layer.padding_idx is not None:
            rows[layer.padding_idx] = 0
        return rows[x.reshape(len(x), -1)][None]
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])[None]
    kernel, dilation = layer.kernel_size, layer.dilation
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    elif layer.padding == "valid":
        sides = [(0, 0) for _ in kernel]
    else:
        sides = [(p, p) for p in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, [p for side in reversed(sides) for p in side], mode=mode)
    # A convolution with one-hot kernels copies the patches out.
    size = layer.in_channels // layer.groups * math.prod(kernel)
    one_hot = torch.eye(size, dtype=x.dtype).reshape(size, -1, *kernel)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    return torch.stack(
        [
            convolve(part, one_hot, stride=layer.stride, dilation=dilation).flatten(2).mT
            for part in x.chunk(layer.groups, 1)
        ]
    )


def positions(layer: nn.Module, g: Tensor) -> Tensor:
    """A layer's output gradient as ``(groups, N, T, d_out)``."""
    if isinstance(layer, (nn.Linear, nn.Embedding)):
        return g.reshape(len(g), -1, g.shape[-1])[None]
    return torch.stack([part.flatten(2).mT for part in g.chunk(layer.groups, 1)])


def measure(
    model: nn.Module, x: Tensor, y: Tensor, draws: Draws, exclude: Iterable[str] = ()
) -> dict[str, list[Batch]]:
    """Pass a batch through the model example by example; one `Batch` per layer and group."""
    layers = curvature_layers(model, exclude)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, args, output, name=name: calls[name].append((args[0].detach(), output))
        )
        for name, layer in layers.items()
    ]
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    cotangents: dict[str, list[Tensor]] = {name: [] for name in layers}
    gradients: dict[str, list[Tensor]] = {name: [] for name in layers}
    owner, weight, terms = [], [], 0
    kept: list[set[int]] = []
    for n in range(len(x)):
        calls.update({name: [] for name in layers})
        output = model(x[n : n + 1])
        for name, layer in layers.items():
            a = torch.cat([patches(layer, arg) for arg, _ in calls[name]], 2)
            one = torch.ones_like(a[..., :1])
            trained = [
                a_part
                for p, a_part in ((layer.weight, a), (getattr(layer, "bias", None), one))
                if p is not None and p.requires_grad
            ]
            inputs[name].append(torch.cat(trained, -1))
        wanted: list[Tensor] = []
        for name, layer in layers.items():
            wanted += [*(out for _, out in calls[name]), *parts(layer)]
        drawn = draws(output, y[n : n + 1])
        kept.append({draw.term for draw in drawn})
        terms += sum({draw.term: draw.terms for draw in drawn}.values())
        for draw in drawn:
            owner.append(n)
            weight.append(draw.weight)
            found = iter(
                torch.autograd.grad(draw.nll, wanted, retain_graph=True, materialize_grads=True)
            )
            for name, layer in layers.items():
                g = [positions(layer, next(found)) for _ in calls[name]]
                cotangents[name].append(torch.cat(g, 2))
                gradients[name].append(matrix(layer, [next(found) for _ in parts(layer)]))
    for hook in hooks:
        hook.remove()
    index = torch.tensor(owner)

    def live(name: str, group: int) -> Tensor:
        """Positions with a gradient, or a term where there are as many positions as targets."""
        a = torch.cat([each[group] for each in inputs[name]])
        reached = torch.zeros(len(x), a.shape[1])
        if owner:
            g = torch.cat([each[group] for each in cotangents[name]])
            reached.index_add_(0, index, (g != 0).any(2).float())
        aligned = y.dim() > 1 and y[0].numel() == a.shape[1]
        for n, places in enumerate(kept):
            whole = torch.tensor(sorted(places)) if aligned else slice(None)
            if places:
                reached[n, whole] += 1
        return reached > 0

    return {
        name: [
            Batch(
                inputs=torch.cat([a[group] for a in inputs[name]]),
                cotangents=torch.cat([g[group] for g in cotangents[name]]),
                gradients=torch.stack([d[group] for d in gradients[name]]),
                owner=index,
                weight=torch.tensor(weight, dtype=torch.float64),
                terms=terms,
                live=live(name, group),
                lookups=isinstance(layer, nn.Embedding),
            )
            for group in range(groups_of(layer))
        ]
        for name, layer in layers.items()
    }


# -- the four approximations -----------------------------------------------------------------------


def kfac_factors(batch: Batch) -> list[Tensor]:
    """``A``, ``G``, and 1 in the place of TKFAC's δ."""
    a, g = batch.omega.sum(0) / batch.examples, batch.gamma.sum(0) / batch.terms
    return [a, g, torch.ones((), dtype=torch.float64)]


def tkfac_factors(batch: Batch) -> list[Tensor]:
    """``Φ``, ``Ψ``, ``δ``."""
    omega, gamma = batch.omega, batch.gamma
    tr_omega, tr_gamma = (torch.einsum("nii->n", m) for m in (omega, gamma))
    delta = (tr_omega * tr_gamma).sum()
    phi = (tr_gamma[:, None, None] * omega).sum(0) / delta
    psi = (tr_omega[:, None, None] * gamma).sum(0) / delta
    return [phi, psi, delta / batch.terms]


@dataclass(frozen=True)
class Method:
    factors: Callable[[Batch], list[Tensor]]
    rescaled: bool


METHODS = {
    "KFAC": Method(kfac_factors, rescaled=False),
    "EKFAC": Method(kfac_factors, rescaled=True),
    "TKFAC": Method(tkfac_factors, rescaled=False),
    "TEKFAC": Method(tkfac_factors, rescaled=True),
}


@dataclass
class Block:
    """One layer's (one group's) curvature over time."""

    method: Method
    factor_decay: float = 0.95
    scale_decay: float = 0.95
    factors: list[Tensor] = field(default_factory=list)
    spectra: tuple[Tensor, Tensor] | None = None
    """``(A, G)`` or ``(Φ, Ψ)`` at the last refresh; δ, a number, is always the latest."""
    basis: Tensor | None = None
    scale: Tensor | None = None
    active: list[Tensor] = field(default_factory=list)
    """How many columns of W are counted as such by damping."""

    def update(self, batch: Batch, factors: bool, scale: bool, basis: bool) -> None:
        if factors:
            self.factors = mix(self.factors, self.method.factors(batch), self.factor_decay)
            self.active = mix(self.active, [batch.active.double()], self.factor_decay)
        if basis:
            previous = self.dense() if self.scale is not None else None
            self.spectra = (self.factors[0], self.factors[1])
            u_in, u_out = (torch.linalg.eigh(m).eigenvectors for m in self.spectra)
            self.basis = torch.kron(u_out, u_in)
            if previous is not None:
                self.scale = (self.basis.T @ previous @ self.basis).diagonal()
        if scale and self.method.rescaled:
            seen = (self.basis.T @ batch.fisher @ self.basis).diagonal()
            old = [] if self.scale is None else [self.scale]
            (self.scale,) = mix(old, [seen], self.scale_decay)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """The two factors whose Kronecker product is the block, without a rescaling."""
        root = self.factors[2].sqrt()
        return root * self.spectra[0], root * self.spectra[1]

    @property
    def trace(self) -> Tensor:
        return self.dense().trace()

    def dense(self) -> Tensor:
        if self.scale is not None:
            return self.basis @ torch.diag(self.scale) @ self.basis.T
        input_factor, output_factor = self.pair
        return torch.kron(output_factor, input_factor)

    def damped(self, damping: float, fc_scale: float = 1.0, factored: bool = False) -> Tensor:
        a, g = (math.sqrt(fc_scale) * m for m in self.pair)
        if self.method.rescaled:
            dense = fc_scale * self.dense()
            if not factored:
                return dense + damping * torch.eye(len(dense), dtype=dense.dtype)
            # What the method without the rescaling adds to its own block.
            return dense + self._factored(a, g, damping) - torch.kron(g, a)
        return self._factored(a, g, damping)

    def _factored(self, a: Tensor, g: Tensor, damping: float) -> Tensor:
        pi = math.sqrt((a.trace() / self.active[0]) / (g.trace() / len(g)))
        root = math.sqrt(damping)
        a = a + pi * root * torch.eye(len(a), dtype=a.dtype)
        g = g + root / pi * torch.eye(len(g), dtype=g.dtype)
        return torch.kron(g, a)


def divided(matrix: Tensor, vector: Tensor, power: float) -> Tensor:
    """``matrix^(−power) @ vector``: by a dense solve, or the matrix's own eigenvectors."""
    if power == 1:
        return torch.linalg.solve(matrix, vector)
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (values**-power * (vectors.T @ vector))


def mix(old: list[Tensor], new: list[Tensor], decay: float) -> list[Tensor]:
    """The exponential moving average, first batch taken whole."""
    if not old:
        return new
    return [decay * o + (1 - decay) * n for o, n in zip(old, new, strict=True)]


@dataclass(frozen=True)
class Trace:
    """The paper's 3.5: each layer's mean eigenvalue, kept above ``nu / dim``."""

    nu: float


@dataclass(frozen=True)
class Mean:
    """This times each layer's mean eigenvalue."""

    ratio: float


@dataclass(frozen=True)
class Factored:
    """Factored Tikhonov damping for methods with a rescaling, too."""

    damping: float


@dataclass(frozen=True)
class Relative:
    """The same with λ by the mean squared norm of the weight's rows, where that is above 1."""

    damping: float


def orthogonal(matrices: Tensor) -> Tensor:
    """Singular values made alike by Muon's polynomial, five times; root mean squares made 1."""
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.pow(4).sum(dim=-1, keepdim=True) ** 0.25
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    result = u @ torch.diag_embed(s) @ v
    return result / result.square().mean(dim=(-2, -1), keepdim=True).sqrt()


@dataclass
class Optimizer:
    """Natural gradient by dense solves, for the curvature layers of ``model`` and nothing else."""

    model: nn.Module
    method: str
    lr: float = 1e-3
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    damping: float | Trace | Mean | Factored | Relative = 1e-2
    power: float = 1.0
    rms_clip: float | None = None
    orthogonalize: bool = False
    fc_scale: float | str = 1.0
    factor_every: int = 1
    scale_every: int = 1
    basis_every: int = 1
    factor_decay: float = 0.95
    scale_decay: float = 0.95
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.layers = curvature_layers(self.model, self.exclude)
        self.blocks = {
            name: [
                Block(METHODS[self.method], self.factor_decay, self.scale_decay)
                for _ in range(groups_of(layer))
            ]
            for name, layer in self.layers.items()
        }
        self.velocity: dict[str, Tensor] = {}
        self.rows: dict[str, float] = {}
        self.steps = 0

    def step(
        self,
        x: Tensor,
        y: Tensor,
        loss: Loss,
        draws: Draws,
        measured: dict[str, list[Batch]] | None = None,
    ) -> None:
        """A step on a batch, of which ``measured`` is what `measure` says, if that is known."""
        statistics = measured or measure(self.model, x, y, draws, self.exclude)
        for name, blocks in self.blocks.items():
            for block, batch in zip(blocks, statistics[name], strict=True):
                block.update(
                    batch,
                    factors=self.steps % self.factor_every == 0,
                    scale=self.steps % self.scale_every == 0,
                    basis=self.steps % self.basis_every == 0,
                )
        if self.steps % self.factor_every == 0:
            for name, layer in self.layers.items():
                rows = layer.weight.detach().flatten(1)
                rows = rows.T if isinstance(layer, nn.Embedding) else rows
                self.rows[name] = float(sum(row @ row for row in rows)) / len(rows)
        self.steps += 1
        value = loss(self.model(x), y)
        for name, layer in self.layers.items():
            found = torch.autograd.grad(
                value, parts(layer), retain_graph=True, materialize_grads=True
            )
            natural = self.precondition(name, matrix(layer, found))
            if self.rms_clip is not None:
                size = float(natural.square().mean()) ** 0.5
                natural = natural * min(1.0, (1 - self.momentum) * self.rms_clip / size)
            self._descend(name, layer, natural)

    def _descend(self, name: str, layer: nn.Module, direction: Tensor) -> None:
        velocity = self.momentum * self.velocity.get(name, 0.0) + direction
        self.velocity[name] = velocity
        if self.nesterov:
            velocity = direction + self.momentum * velocity
        if self.orthogonalize and not isinstance(layer, nn.Embedding):
            velocity = orthogonal(velocity) * (self.rms_clip or 1.0)
        if isinstance(layer, nn.Embedding):
            velocity = velocity.mT
        sizes = [p[0].numel() for p in parts(layer)]
        change = velocity.reshape(-1, sum(sizes)).split(sizes, 1)
        with torch.no_grad():
            for p, c in zip(parts(layer), change, strict=True):
                p.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * c.reshape(p.shape))

    def precondition(self, name: str, gradient: Tensor) -> Tensor:
        """The damped block's power times a ``(groups, d_out, d_in)`` gradient."""
        solved = [
            divided(damped, g.flatten(), self.power).reshape(g.shape)
            for damped, g in zip(self.damped(name), gradient, strict=True)
        ]
        return torch.stack(solved)

    def damped(self, name: str) -> list[Tensor]:
        lam, beta = self.damping_of(name), self.beta(name)
        factored = isinstance(self.damping, (Factored, Relative))
        return [block.damped(lam, beta, factored) for block in self.blocks[name]]

    def dense(self, name: str) -> Tensor:
        """The layer's undamped block, block-diagonal over the groups of a convolution."""
        return torch.block_diag(*(self.beta(name) * block.dense() for block in self.blocks[name]))

    def raw_trace(self, name: str) -> float:
        return float(sum(block.trace for block in self.blocks[name]))

    def trace(self, name: str) -> float:
        return self.beta(name) * self.raw_trace(name)

    def damping_of(self, name: str) -> float:
        if isinstance(self.damping, Trace):
            return max(self.trace(name), self.damping.nu) / self.dim(name)
        if isinstance(self.damping, Mean):
            return self.damping.ratio * self.trace(name) / self.dim(name)
        if isinstance(self.damping, Relative):
            return self.damping.damping / max(1.0, self.rows[name])
        return self.damping.damping if isinstance(self.damping, Factored) else self.damping

    def dim(self, name: str) -> float:
        """The layer's parameters, of an embedding's entries only as many as batches see."""
        return float(sum(b.active[0] * len(b.spectra[1]) for b in self.blocks[name]))

    def beta(self, name: str) -> float:
        """β of a fully-connected layer in a convolutional network; 1 for every other layer."""
        convolutions = [n for n, m in self.layers.items() if isinstance(m, CONVOLUTIONS)]
        if not convolutions or name in convolutions:
            return 1.0
        if self.fc_scale == "auto":
            mean = sum(self.raw_trace(n) for n in convolutions) / len(convolutions)
            return max(1.0, mean / self.raw_trace(name))
        return float(self.fc_scale)
