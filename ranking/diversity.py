"""How much a candidate repeats what was just shown: maximal marginal relevance, or sliding spectral decomposition.

K candidates, W slots back, D vector width; every vector has length 1 (or 0). A redundancy lies in 0 .. 1.
"""

from __future__ import annotations

import numpy as np


def marginal_relevance(cosine_WK: np.ndarray) -> np.ndarray:
    """(K,) cosine with the most similar of the recent, at least 0 (MMR, Carbonell and Goldstein, SIGIR 1998)."""
    return np.maximum(cosine_WK.max(axis=0), 0.0)


def spectral(vector_KD: np.ndarray, recent_WD: np.ndarray) -> np.ndarray:
    """(K,) 1 - r, where r is how far a candidate stands out of the space that the recent ones span.

    That is the factor by which it would increase the volume spanned by the window, the greedy step of sliding spectral
    decomposition (Huang et al., KDD 2021). Unlike MMR it sees what two recent videos say together. Computed afresh
    for each window by a rank-revealing decomposition: the paper's running update of all candidates is cheaper for
    long windows, and drifts when the oldest video leaves.
    """
    _, singular, basis_WD = np.linalg.svd(recent_WD, full_matrices=False)
    basis_WD = basis_WD[singular > 1e-6 * max(float(singular[0]), 1.0)]
    inside_K = np.square(vector_KD @ basis_WD.T).sum(axis=1)
    return 1.0 - np.sqrt(np.clip(1.0 - inside_K, 0.0, None))
