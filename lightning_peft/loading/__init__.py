"""Loading base models."""
