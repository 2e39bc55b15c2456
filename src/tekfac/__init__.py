"""Natural-gradient optimizers for PyTorch: KFAC, EKFAC, TKFAC and TEKFAC (arXiv 2011.13609).

    optimizer = tekfac.TEKFAC(model, lr=1e-3)

and the training loop stays as it is.
"""

from tekfac.damping import FactoredDamping, RelativeDamping, TraceDamping
from tekfac.ekfac import EKFAC
from tekfac.first_order import Adam
from tekfac.fisher import Bernoulli, Categorical, Gaussian, Likelihood
from tekfac.kfac import KFAC
from tekfac.optimizer import NaturalGradient
from tekfac.tekfac import TEKFAC
from tekfac.tkfac import TKFAC

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "TEKFAC",
    "TKFAC",
    "Adam",
    "Bernoulli",
    "Categorical",
    "FactoredDamping",
    "Gaussian",
    "Likelihood",
    "NaturalGradient",
    "RelativeDamping",
    "TraceDamping",
]
