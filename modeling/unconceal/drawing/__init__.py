"""Sheets and curves of results."""
