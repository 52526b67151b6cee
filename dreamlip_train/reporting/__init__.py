"""What was measured, for people: plots, the page of a run, and histograms of captions."""
