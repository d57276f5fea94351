"""Run Mixture-of-Experts language models far larger than memory, streaming the experts from SSD."""

__version__ = "0.1.0"
