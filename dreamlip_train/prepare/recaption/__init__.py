"""Images recaptioned by a multi-modal model: run here, or behind an HTTP endpoint."""
