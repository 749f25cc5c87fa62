"""What a run needs to go on after it died: its folder's layout, its identity and journal, and signals that save first."""
