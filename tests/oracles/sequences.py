"""Smaller sequence losses and scores: loops in NumPy, float64."""

import numpy as np


def top_k_mean(values, k):
    """Of one row; 0 for an empty one."""
    largest = sorted(values, reverse=True)[:k]
    return np.mean(largest) if largest else 0.0


def smoothed(nll, k, alpha, where):
    """The loss of one row, and its gradient; of equal losses the first are larger."""
    kept = [t for t in range(len(nll)) if where[t]]
    gradient = np.zeros(len(nll))
    if not kept:
        return 0.0, gradient
    worst = sorted(kept, key=lambda t: (-nll[t], t))[:k]
    gradient[kept] += 1 / len(kept)
    gradient[worst] += alpha / len(worst)
    values = [nll[t] for t in kept]
    return np.mean(values) + alpha * top_k_mean(values, k), gradient


def confidence(nll, groups):
    """n_g exp(-s_g) over the sum of these, in extended precision."""
    exact = np.asarray(nll, np.longdouble)
    share = np.exp(exact.min() - exact)
    total = dict.fromkeys(groups, 0 * share[0])
    for g, e in zip(groups, share, strict=True):
        total[g] += e
    return np.array([total[g] / share.sum() for g in groups], np.float64)


def trice_weights(proposal_correct, chain_correct):
    """1 / N for remembered rationales, - leave-one-out acceptance / N for proposals."""
    included = [m for m, correct in enumerate(chain_correct) if correct]
    chain, proposal = np.zeros(len(chain_correct)), np.zeros(len(chain_correct))
    for m in included:
        others = [bool(proposal_correct[o]) for o in included if o != m]
        chain[m] = 1 / len(included)
        proposal[m] = -(np.mean(others) if others else 0) / len(included)
    return chain, proposal
