"""Analyze when the attentions of a pipeline converge."""
