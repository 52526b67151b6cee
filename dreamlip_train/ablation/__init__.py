"""The paper's ablations: the grid of variants, their runs, and what the claims come to."""
