"""Eviction policies: one frozen dataclass each, see `vattn.evictor`.

by attention   H2O, Keyformer, CORM, TOVA, SnapKV, PyramidKV, AdaKV, CAKE, ObservedAttention,
               MPCacheStatic
by position    Streaming, SlidingWindow
by head        SimLayerKV, DuoAttention
"""

from vattn.evictors.adakv import AdaKV
from vattn.evictors.cake import CAKE
from vattn.evictors.corm import CORM
from vattn.evictors.duo_attention import DuoAttention
from vattn.evictors.h2o import H2O
from vattn.evictors.keyformer import Keyformer
from vattn.evictors.mpcache import MPCacheStatic
from vattn.evictors.observed import ObservedAttention
from vattn.evictors.pyramidkv import PyramidKV
from vattn.evictors.simlayerkv import SimLayerKV
from vattn.evictors.snapkv import SnapKV
from vattn.evictors.streaming import SlidingWindow, Streaming
from vattn.evictors.tova import TOVA

__all__ = [
    "CAKE",
    "CORM",
    "H2O",
    "TOVA",
    "AdaKV",
    "DuoAttention",
    "Keyformer",
    "MPCacheStatic",
    "ObservedAttention",
    "PyramidKV",
    "SimLayerKV",
    "SlidingWindow",
    "SnapKV",
    "Streaming",
]
