"""Rivals, each a program of its own."""
