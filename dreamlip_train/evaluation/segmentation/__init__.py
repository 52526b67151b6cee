"""Where a model sees what a text says: semantic segmentation, its sets, and localization by sub-captions."""
