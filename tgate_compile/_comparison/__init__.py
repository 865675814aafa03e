"""Compares methods on several models: images side by side, what they cost and how far they are from plain's."""
