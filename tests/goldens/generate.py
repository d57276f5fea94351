"""Regenerate the goldens: ``python tests/goldens/generate.py [--search] [NAME ...]``, with torch==2.13.0, transformers.

``--search`` looks for seeds without near-ties, so that no rounding difference can choose another expert or another
token; the best belong into ``tiny.RECIPES``.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import tiny
import torch

HERE = Path(__file__).parent
SEEDS = 40
GAP, MARGIN = 2e-3, 2e-2  # router logits, token logits: wished for, in this proportion


def clearness(recipe: tiny.Recipe) -> float:
    """How far the closest decision of a checkpoint is from a tie, 1 being as wished."""
    with tempfile.TemporaryDirectory() as folder:
        golden = tiny.golden(recipe, tiny.write(recipe, Path(folder)))
    return float(min(golden["gap"] / GAP, golden["margin"] / MARGIN))


def search(recipes: list[tiny.Recipe]) -> None:
    """Print the clearest seed of each recipe."""
    for recipe in recipes:
        best = max((replace(recipe, seed=seed) for seed in range(SEEDS)), key=clearness)
        print(f"{recipe.name}: seed={best.seed}, clearness {clearness(best):.2f}")


def write(recipes: list[tiny.Recipe]) -> None:
    """Write each recipe's checkpoint and golden beside this file."""
    for recipe in recipes:
        folder = HERE / recipe.name
        shutil.rmtree(folder, ignore_errors=True)
        golden = tiny.golden(recipe, tiny.write(recipe, folder))
        np.savez_compressed(folder / "golden.npz", **golden)
        nbytes = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{recipe.name}: gap {golden['gap']:.2g}, margin {golden['margin']:.2g}, {nbytes} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)  # one order of addition, so that the files can be reproduced
    names = [name for name in sys.argv[1:] if name != "--search"]
    chosen = [recipe for recipe in tiny.RECIPES if not names or recipe.name in names]
    search(chosen) if "--search" in sys.argv else write(chosen)
