"""Choose a schedule by measuring."""
