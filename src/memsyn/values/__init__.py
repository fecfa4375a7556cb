"""Importances and memories as frozen values: their arithmetic, comparison and conversion. Nothing is measured here."""
