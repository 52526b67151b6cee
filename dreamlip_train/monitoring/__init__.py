"""What a run tells and notices of itself: its log, stop signals, loss spikes, hangs, and the machine it is on."""
