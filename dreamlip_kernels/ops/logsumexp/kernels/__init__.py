"""Triton kernels of bidirectional_logsumexp: pieces of logits (logits), both sums (sums), their logarithms (finish),
the gradient of the pairs (gradient), and what surrounds its products (vector)."""
