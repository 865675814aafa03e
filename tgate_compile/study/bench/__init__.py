"""How fast a schedule is."""
