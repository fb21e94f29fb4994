"""Policy gradient losses by their definitions, a token at a time: NumPy, float64."""

import numpy as np


def ppo_clip(new, old, advantages, low, high, level, reference, kl_weight, where):
    loss = np.zeros(new.shape)
    for i in range(len(new)):
        kept = [t for t in range(new.shape[1]) if where[i, t]]
        mean = sum(new[i, t] - old[i, t] for t in kept) / max(len(kept), 1)
        for t in kept:
            ratio = np.exp(mean if level == "sequence" else new[i, t] - old[i, t])
            a = advantages[i] if advantages.ndim == 1 else advantages[i, t]
            clipped = min(max(ratio, 1 - low), 1 + high)
            loss[i, t] = -min(ratio * a, clipped * a)
            if kl_weight:
                quotient = np.exp(reference[i, t] - new[i, t])
                loss[i, t] += kl_weight * (quotient - np.log(quotient) - 1)
    return loss


def advantages(rewards, baseline, standardized, epsilon, where):
    found = np.zeros(rewards.shape)
    for i, row in enumerate(rewards):
        kept = [j for j in range(len(row)) if where[i, j]]
        for j in kept:
            others = [k for k in kept if k != j] if baseline != "mean" else kept
            if not others:
                continue
            found[i, j] = row[j] - np.mean([row[k] for k in others])
            if standardized and len(kept) > 1:
                found[i, j] /= np.std([row[k] for k in kept], ddof=1) + epsilon
    return found
