"""Looking at what runs where: pictures of plans."""

from __future__ import annotations

__all__ = ["plan_view"]
