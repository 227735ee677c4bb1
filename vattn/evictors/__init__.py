"""Eviction policies: one frozen dataclass each, see `vattn.evictor`."""

from vattn.evictors.h2o import H2O
from vattn.evictors.snapkv import SnapKV
from vattn.evictors.streaming import SlidingWindow, Streaming

__all__ = ["H2O", "SlidingWindow", "SnapKV", "Streaming"]
