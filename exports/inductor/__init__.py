"""Inductor and AOTInductor."""
