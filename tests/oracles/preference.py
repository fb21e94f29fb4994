"""Losses of sequences by their definitions, a pair at a time: NumPy, float64."""

import numpy as np


def sequence_log_probs(logits, labels, where):
    """The sum over the tokens that count of log softmax at the label."""
    logits = np.asarray(logits, np.float64)
    totals = np.zeros(labels.shape[0])
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            if where[b, t]:
                z = logits[b, t]
                top = z.max()
                weights = [np.exp(x - top) for x in z]
                totals[b] += z[labels[b, t]] - top - np.log(sum(weights))
    return totals


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def margin(chosen, rejected, ref_chosen, ref_rejected, beta):
    return [
        beta * (np.float64(w) - np.float64(rw) - np.float64(x) + np.float64(rx))
        for w, x, rw, rx in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)
    ]


def dpo(h):
    return np.array([-np.log(sigmoid(x)) for x in h])


def conservative(h, smoothing):
    plain, reverse = dpo(h), dpo([-x for x in h])
    return (1 - smoothing) * plain + smoothing * reverse


def robust(h, flip_rate):
    plain, reverse = dpo(h), dpo([-x for x in h])
    return ((1 - flip_rate) * plain - flip_rate * reverse) / (1 - 2 * flip_rate)


def simpo(chosen, rejected, chosen_lengths, rejected_lengths, beta, gamma):
    found = []
    for w, x, n, m in zip(
        chosen, rejected, chosen_lengths, rejected_lengths, strict=True
    ):
        difference = np.float64(w) / int(n) - np.float64(x) / int(m)
        found.append(-np.log(sigmoid(beta * difference - gamma)))
    return np.array(found)


def identity(chosen, rejected, ref_chosen, ref_rejected, beta):
    h = margin(chosen, rejected, ref_chosen, ref_rejected, 1.0)
    return np.array([(x - 1 / (2 * beta)) ** 2 for x in h])


def odds_ratio(chosen, rejected, chosen_lengths, rejected_lengths, beta):
    found = []
    for w, x, n, m in zip(
        chosen, rejected, chosen_lengths, rejected_lengths, strict=True
    ):
        of_chosen, of_rejected = np.exp(np.float64(w) / n), np.exp(np.float64(x) / m)
        ratio = (of_chosen / (1 - of_chosen)) / (of_rejected / (1 - of_rejected))
        found.append(-np.log(of_chosen) - beta * np.log(ratio / (1 + ratio)))
    return np.array(found)


def contrastive(chosen, rejected, beta, weight, chosen_lengths):
    found = []
    for w, x, n in zip(chosen, rejected, chosen_lengths, strict=True):
        h = beta * (np.float64(w) - np.float64(x))
        found.append(-np.log(sigmoid(h)) - weight * np.float64(w) / n)
    return np.array(found)


def prospect(log_prob, reference_log_prob, desirable, point, beta, of_good, of_bad):
    found = []
    for p, r, good in zip(log_prob, reference_log_prob, desirable, strict=True):
        gain = beta * (np.float64(p) - np.float64(r) - max(point, 0))
        value = sigmoid(gain) if good else sigmoid(-gain)
        found.append((of_good if good else of_bad) * (1 - value))
    return np.array(found)


def negative_preference(log_prob, reference_log_prob, beta):
    return np.array(
        [
            -2 / beta * np.log(sigmoid(-beta * (np.float64(p) - np.float64(r))))
            for p, r in zip(log_prob, reference_log_prob, strict=True)
        ]
    )


def differential(logp, ref_logp):
    """Q = (pi / ref) / sum(pi / ref) along the last axis, and its entropy."""
    ratio = np.exp(np.asarray(logp, np.float64) - np.asarray(ref_logp, np.float64))
    q = ratio / ratio.sum(-1, keepdims=True)
    safe = np.where(q > 0, q, 1)
    return q, -(q * np.log(safe)).sum(-1)


def dpo_optimal(ref, chosen, rejected, beta):
    weight = np.float64(ref) * (np.float64(chosen) / np.float64(rejected)) ** (1 / beta)
    return weight / weight.sum(-1, keepdims=True)


def optimal_rejected(ref, target, beta):
    weight = np.float64(ref) * (np.float64(ref) / np.float64(target)) ** beta
    return weight / weight.sum(-1, keepdims=True)


def density_ratio(strong, weak, where, normalize):
    rewards = np.zeros(strong.shape[:-1])
    for i in np.ndindex(rewards.shape):
        terms = [
            np.float64(s) - np.float64(w)
            for s, w, counts in zip(strong[i], weak[i], where[i], strict=True)
            if counts
        ]
        rewards[i] = sum(terms) / (max(len(terms), 1) if normalize == "mean" else 1)
    return rewards


def annotate(rewards, where):
    """(chosen, rejected, margin) of each row, by walking through it."""
    found = []
    for row, exists in zip(rewards, where, strict=True):
        real = [i for i in range(len(row)) if exists[i]]
        if not real:
            found.append((0, 0, 0.0))
            continue
        chosen = max(real, key=lambda i: (row[i], -i))
        rejected = min(real, key=lambda i: (row[i], i))
        gap = 0.0 if chosen == rejected else float(row[chosen]) - float(row[rejected])
        found.append((chosen, rejected, gap))
    return found
