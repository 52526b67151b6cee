"""Images found by texts and texts by images: recall, and the sets it is reported on."""
