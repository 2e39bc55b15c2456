"""Natural-gradient optimizers for PyTorch: KFAC, EKFAC, TKFAC and TEKFAC (arXiv 2011.13609).

    optimizer = tekfac.TEKFAC(model, lr=5e-3)

and the training loop stays as it is.
"""

from tekfac.capture.graph import measuring
from tekfac.capture.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from tekfac.curvature.damping import (
    AdaptiveDamping,
    AgreementDamping,
    DampingRule,
    FactoredDamping,
    MeanDamping,
    RelativeDamping,
    TraceDamping,
)
from tekfac.methods.ekfac import EKFAC
from tekfac.methods.kfac import KFAC
from tekfac.methods.tekfac import TEKFAC
from tekfac.methods.tkfac import TKFAC
from tekfac.optimizer.first_order import Adam
from tekfac.optimizer.natural_gradient import NaturalGradient

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "TEKFAC",
    "TKFAC",
    "Adam",
    "AdaptiveDamping",
    "AgreementDamping",
    "Bernoulli",
    "Categorical",
    "DampingRule",
    "FactoredDamping",
    "Gaussian",
    "Likelihood",
    "MeanDamping",
    "NaturalGradient",
    "RelativeDamping",
    "TraceDamping",
    "measuring",
]
