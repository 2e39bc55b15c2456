"""What parts of a step take, in multiplications: counts, so that what follows from them is the same
in every run.

A unit is one multiplication of a large product in float32. What is no such product was timed
beside one, on one core of a server's processor (AMD EPYC, 55·10⁹ of them a second): decompositions
take more for each multiplication, and what moves memory or starts an operation takes time without
any. The counts only say what is worth doing when (`tekfac.optimizer.schedule`); a third more or
less is of no account.
"""

from __future__ import annotations

# To start and end a layer's operations in both passes and in the update (0.15 ms).
CALLS = 2**23

# To go through a parameter in the update: its gradient, momentum, preconditioned and its own value.
UPDATED = 100


def model_pass(rows: int, d_in: int, d_out: int) -> int:
    """A forward and a backward pass through a layer that sees ``rows`` inputs."""
    return 3 * rows * d_in * d_out


def preconditioning(d_in: int, d_out: int, k_in: int, k_out: int) -> int:
    """A step's preconditioning and update of one layer in a basis with so many eigenvectors."""
    return d_in * d_out * (2 * (k_in + k_out) + UPDATED)


def orthogonalization(d_in: int, d_out: int) -> int:
    """Five of `optimizer.orthogonal`'s iterations: three products each."""
    short, long = sorted((d_in, d_out))
    return 5 * short * short * (2 * long + short)


def eigenvectors(d: int, k: int) -> int:
    """All eigenvectors of a ``d × d`` matrix, or the leading ``k < d`` by `linalg.leading`."""
    if k < d:
        return 12 * k * k * d + 2**10 * d * k + 2 * eigenvectors(k, k)
    return 6 * d**3 + 2**16 * d
