"""Meta-gradient estimators. Adding one: a file here, a line in ``ESTIMATORS``."""

from metanudge.estimators.base import Estimator
from metanudge.estimators.fobmaml import FOBMAML
from metanudge.estimators.fomaml import FOMAML
from metanudge.estimators.hfmaml import HFMAML
from metanudge.estimators.imaml import IMAML
from metanudge.estimators.maml import MAML
from metanudge.estimators.reptile import Reptile
from metanudge.estimators.stencil import STENCILS, Stencil
from metanudge.estimators.tangent import Tangent

ESTIMATORS: dict[str, type[Estimator]] = {
    "fobmaml": FOBMAML,
    "maml": MAML,
    "fomaml": FOMAML,
    "reptile": Reptile,
    "imaml": IMAML,
    "hfmaml": HFMAML,
    "tangent": Tangent,
}

__all__ = [
    "ESTIMATORS",
    "FOBMAML",
    "FOMAML",
    "HFMAML",
    "IMAML",
    "MAML",
    "STENCILS",
    "Estimator",
    "Reptile",
    "Stencil",
    "Tangent",
]
