"""Soft-Bellman residuals and the losses made of them: loops over tokens, float64.

With V the value before a token, r its reward and l = log pi - log pi_ref,

    delta_t = V_t + sum_(i >= t) (beta l_i - r_i)

over the tokens that count. The losses are the mean of delta^2 over the starts of
actions: every token, the first of every step, or the first of all. The gradient of the
policy loss at a token is that of the start of its own action, 2 beta delta / n; of the
value loss at a start 2 delta / n.
"""

import numpy as np


def residual(log_prob, reference_log_prob, values, rewards, beta, where):
    rows, length = log_prob.shape
    delta = np.zeros((rows, length))
    for b in range(rows):
        for t in range(length):
            if not where[b, t]:
                continue
            delta[b, t] = values[b, t]
            for i in range(t, length):
                if where[b, i]:
                    reward = rewards[b, i] if np.ndim(rewards) == 2 else 0.0
                    delta[b, t] += (
                        beta * (log_prob[b, i] - reference_log_prob[b, i]) - reward
                    )
            if np.ndim(rewards) == 1:
                delta[b, t] -= rewards[b]
    return delta


def starts(where, level, segment_ids=None):
    """For every token that counts the place of the start of its action; else -1."""
    rows, length = where.shape
    place = np.full((rows, length), -1)
    for b in range(rows):
        current, last = -1, None
        for t in range(length):
            if not where[b, t]:
                continue
            new = current < 0 or level == "token"
            if level == "step" and segment_ids is not None:
                new = new or segment_ids[b, t] != last
                last = segment_ids[b, t]
            if new:
                current = t
            place[b, t] = current
    return place


def losses(
    log_prob, reference_log_prob, values, rewards, beta, where, level, segment_ids=None
):
    """The loss, its gradient in the values, and in the log-probabilities."""
    delta = residual(log_prob, reference_log_prob, values, rewards, beta, where)
    place = starts(where, level, segment_ids)
    rows, length = where.shape
    loss, of_values, of_log_prob = np.zeros(rows), np.zeros_like(delta), delta * 0
    for b in range(rows):
        own = sorted({p for p in place[b] if p >= 0})
        for t in own:
            loss[b] += delta[b, t] ** 2 / len(own)
            of_values[b, t] = 2 * delta[b, t] / len(own)
        for t in range(length):
            if place[b, t] >= 0:
                of_log_prob[b, t] = 2 * beta * delta[b, place[b, t]] / len(own)
    return loss, of_values, of_log_prob
