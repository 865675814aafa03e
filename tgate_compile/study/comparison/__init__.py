"""Methods side by side, on one page."""
