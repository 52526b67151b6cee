"""The sum of log-sigmoids over all pairs: the op and its backends."""
