"""Strategies and communication between ranks."""
