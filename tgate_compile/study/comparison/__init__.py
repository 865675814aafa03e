"""Compare methods side by side on one HTML page."""
