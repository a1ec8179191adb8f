"""Closed forms that the papers prove, to hold runs against."""
