"""A run's state on disk: saved whole or not at all, found again, resumed, exported and imported."""
