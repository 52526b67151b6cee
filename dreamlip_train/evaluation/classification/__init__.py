"""Pictures sorted into named classes: zero-shot and multi-label, class lists and prompts."""
