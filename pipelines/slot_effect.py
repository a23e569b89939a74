"""What the ranker's side tower has taken for the work of the slot, and so has kept out of its scores.

S slots, T tasks. A viewer looks at slot s with some probability e(s), which multiplies the chance of every signal: the
effect is a shift of log probability. The side tower shifts logits, which is the same for a rare signal and more for a
frequent one (by about 1 / (1 - p)); either is a line in log e(s), so a correlation with it is the same on both scales.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from features.dataset import Dataset

MIN_IMPRESSIONS = 1000
"""A slot with fewer training impressions has hardly moved from where it was drawn."""


def slot_effect(ranker_dir: Path, dataset: Dataset, train_rows: np.ndarray) -> list[dict]:
    """A row a slot that was trained on: impressions, and each task's logit less that of the first such slot; empty
    for a log without slots."""
    with safe_open(ranker_dir / "ranker.safetensors", framework="np") as file:  # of which tables are nearly all
        slot_SH, out_TH = file.get_tensor("side.slot.weight"), file.get_tensor("side.out.weight")
    tasks = json.loads((ranker_dir / "ranker.json").read_text())["sizes"]["tasks"]
    effect_ST = slot_SH @ out_TH.T
    shown_S = np.bincount(np.asarray(dataset.examples.slot)[train_rows], minlength=len(effect_ST))
    # Row 0 is an unknown slot; the last is shared by all slots beyond the spec's.
    slots = [row for row in range(1, len(effect_ST) - 1) if shown_S[row] >= MIN_IMPRESSIONS]
    return [
        {"slot": row - 1, "impressions": int(shown_S[row])}
        | {task: float(effect_ST[row, t] - effect_ST[slots[0], t]) for t, task in enumerate(tasks)}
        for row in slots
    ]
