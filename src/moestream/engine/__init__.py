"""Requests to token ids: sampling, scheduling, steps and receipts. No text here."""
