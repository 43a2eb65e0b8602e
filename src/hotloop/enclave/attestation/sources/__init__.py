"""Where evidence comes from, inside: one file a device, one interface."""

from __future__ import annotations

from .source import EvidenceSource, open_source

__all__ = ["EvidenceSource", "open_source"]
