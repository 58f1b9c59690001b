"""Analytic models of a run before it is rented. Pure functions; nothing here imports torch."""
