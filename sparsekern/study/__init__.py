"""Looking at networks: paths between solutions, curvature, receptive fields, and what is wrong."""

from sparsekern.study.diagnose import Diagnosis, LayerRow, diagnose
from sparsekern.study.locality import (
    Displacements,
    composed,
    displacements,
    expected_locality,
    receptive_fields,
)
from sparsekern.study.paths import Instability, Path, instability, interpolate, to_pruned
from sparsekern.study.spectrum import Lanczos, Spectrum, lanczos, spectrum

__all__ = [
    "Diagnosis",
    "Displacements",
    "Instability",
    "Lanczos",
    "LayerRow",
    "Path",
    "Spectrum",
    "composed",
    "diagnose",
    "displacements",
    "expected_locality",
    "instability",
    "interpolate",
    "lanczos",
    "receptive_fields",
    "spectrum",
    "to_pruned",
]
