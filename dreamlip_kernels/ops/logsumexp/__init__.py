"""Row and column log-sum-exp of all pairs: the op, its backends, and what they share."""
