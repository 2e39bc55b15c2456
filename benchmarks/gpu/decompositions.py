"""Eigendecompositions: batched or one after the other, and what may take their place."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.part import Results, options_of, timed
from tekfac.curvature.linalg import leading, orthonormal

WORDS = (
    "Milliseconds for the whole batch of float32 matrices, best of three. *QR* is one step of "
    "orthogonal iteration from the old eigenvectors, `qr(M U)`; *Cholesky* the same by the "
    "Cholesky factor of `(M U)ᵀ M U`, in float64; *host* is `eigh` on the CPU with the copies to "
    "it and back."
)


def spd(count: int, width: int, device: torch.device) -> Tensor:
    """Positive definite matrices with eigenvalues over several orders, as factors have."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(count, width, width, generator=generator)
    rows = (rows * torch.logspace(0, -3, width)).to(device)
    found: Tensor = rows.mT @ rows / width
    return found


def main() -> None:
    """A row for each size."""
    options = options_of(__doc__)
    device, repeats = options.device, 1 if options.tiny else 3
    results = Results(options.out, "Eigendecompositions", device, WORDS)
    sizes = (4, 8) if options.tiny else (32, 64, 128, 256, 577, 1153, 2048)
    for width in sizes:
        for count in (1, 6):
            if count * width > 8000:
                continue
            m = spd(count, width, device)
            u = torch.linalg.eigh(m)[1]

            def by_cholesky(m: Tensor = m, u: Tensor = u) -> Tensor:
                product = (m @ u).double()
                factor = torch.linalg.cholesky_ex(product.mT @ product)[0]
                return torch.linalg.solve_triangular(factor.mT, product, upper=True, left=False)

            def on_host(m: Tensor = m) -> Tensor:
                return torch.linalg.eigh(m.cpu())[1].to(m.device)

            tried = {
                "batched": lambda m=m: torch.linalg.eigh(m),
                "loop": lambda m=m: [torch.linalg.eigh(one) for one in m],
                "float64": lambda m=m: torch.linalg.eigh(m.double()),
                "QR": lambda m=m, u=u: torch.linalg.qr(m @ u),
                "QR loop": lambda m=m, u=u: [
                    torch.linalg.qr(x @ v) for x, v in zip(m, u, strict=True)
                ],
                "Cholesky": by_cholesky,
                "host": on_host,
            }
            row = {name: 1e3 * timed(device, each, repeats) for name, each in tried.items()}
            results.add("whole", width=width, matrices=count, **row)
    for width, rank in ((16, 4),) if options.tiny else ((2305, 512), (4609, 512), (50257, 512)):
        probe = orthonormal(1, width, rank, torch.zeros(1, device=device))
        rows = torch.randn(1, 2 * rank, width, device=device)
        product = rows.mT @ (rows @ probe)
        seconds = timed(device, lambda p=product, q=probe: leading(p, q), repeats)
        results.add("leading eigenvectors", width=width, rank=rank, ms=1e3 * seconds)


if __name__ == "__main__":
    main()
