"""safe-offrl's updates, compiled, with matrix products in bfloat16."""

from __future__ import annotations

from ours import cases
from worker import DEVICE

from safe_offrl.compute.descent import Compute

CASES = cases(Compute(compiled=True, precision="bf16", device=DEVICE))
