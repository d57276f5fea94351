from __future__ import annotations

import sys
from pathlib import Path

# The programs beside each other in this folder import one another by name, as when they are run.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "peers"))
