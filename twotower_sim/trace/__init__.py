"""The commands of ``twotower-sim trace``: get traces, look at them, convert them, take their fingerprints."""
