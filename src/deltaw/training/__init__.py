"""Loss and loop. Knows nothing of where data came from, who prints, or what a run folder is."""
