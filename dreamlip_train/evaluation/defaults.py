"""What the evaluations take where nobody says otherwise: of the functions and of the commands' options."""

BATCH_SIZE = 64
"""Images per forward pass."""
WINDOWS = 16
"""Windows of a segmented picture per forward pass."""
SPLIT = "test"
WORKERS = 2
"""Loader processes."""
CAPTIONS_PER_IMAGE = 5
RESIZE = 0
"""Shorter side of a segmented picture; 0 takes one and a half windows."""
STRIDE = 0
"""Pixels between windows; 0 takes half a window."""
BACKGROUND_THRESHOLD = 0.5
