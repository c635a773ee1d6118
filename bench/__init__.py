"""Side-by-side measurements of `ttpa` and `ttpa_kernels` against their peers.

Whatever is installed, the code of this checkout is measured: its two roots come first on the path.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = [root for root in ROOTS if root not in sys.path]


def environment() -> dict[str, str]:
    """The environment of a child process: that of this one, with the two roots on its path."""
    paths = ROOTS + [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in ROOTS]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
