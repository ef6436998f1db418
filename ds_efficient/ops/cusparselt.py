"""2:4 sparse products on NVIDIA's sparse tensor cores, through cuSPARSELt.

`unavailable` says whether they run here; `tune` measures once for each shape whether they pay, and how;
`SparseOperand` holds the sparse matrix and `multiply` multiplies by it. The library is called through ctypes,
with plans that are made once for each shape: see `cusparselt_library`, `cusparselt_plans`,
`cusparselt_operand`, `cusparselt_multiply`, `cusparselt_cache`, `cusparselt_probe`, `cusparselt_tuning`.
"""

from ds_efficient.ops.cusparselt_multiply import multiply
from ds_efficient.ops.cusparselt_operand import SparseOperand, shape_problem
from ds_efficient.ops.cusparselt_probe import probe, unavailable
from ds_efficient.ops.cusparselt_tuning import Choice, tune

__all__ = ["Choice", "SparseOperand", "multiply", "probe", "shape_problem", "tune", "unavailable"]
