"""Coupled sampling and the verification of drafts."""
