"""Eviction policies: one frozen dataclass each, see `vattn.evictor`.

by attention   H2O, Keyformer, CORM, TOVA, SnapKV, PyramidKV, AdaKV, CAKE, CriticalKV,
               ObservedAttention, MPCacheStatic, PoolLru, PoolCounter
by K and V     ExpectedAttention, KeyDiff, Knorm, LagKV
by position    Streaming, SlidingWindow, Cascading, PoolFifo
by head        SimLayerKV, DuoAttention
by channel     ThinK
offline        KVzip, KVzap
merging        Elastic, Merging, SubGen
of others      Protected, PerLayer, Merging
baselines      RandomTokens, Oracle
"""

from vattn.evictors.adakv import AdaKV
from vattn.evictors.cake import CAKE
from vattn.evictors.cascading import Cascading
from vattn.evictors.combined import PerLayer, Protected
from vattn.evictors.corm import CORM
from vattn.evictors.criticalkv import CriticalKV
from vattn.evictors.duo_attention import DuoAttention
from vattn.evictors.elastic import Elastic, Merging
from vattn.evictors.expected_attention import ExpectedAttention
from vattn.evictors.h2o import H2O
from vattn.evictors.keydiff import KeyDiff
from vattn.evictors.keyformer import Keyformer
from vattn.evictors.knorm import Knorm
from vattn.evictors.kvzap import KVzap
from vattn.evictors.kvzip import KVzip
from vattn.evictors.lagkv import LagKV
from vattn.evictors.mpcache import MPCacheStatic
from vattn.evictors.observed import ObservedAttention
from vattn.evictors.oracle import Oracle
from vattn.evictors.pool import PoolCounter, PoolFifo, PoolLru
from vattn.evictors.pyramidkv import PyramidKV
from vattn.evictors.random_tokens import RandomTokens
from vattn.evictors.simlayerkv import SimLayerKV
from vattn.evictors.snapkv import SnapKV
from vattn.evictors.streaming import SlidingWindow, Streaming
from vattn.evictors.subgen import SubGen
from vattn.evictors.think import ThinK
from vattn.evictors.tova import TOVA

__all__ = [
    "CAKE",
    "CORM",
    "H2O",
    "TOVA",
    "AdaKV",
    "Cascading",
    "CriticalKV",
    "DuoAttention",
    "Elastic",
    "ExpectedAttention",
    "KVzap",
    "KVzip",
    "KeyDiff",
    "Keyformer",
    "Knorm",
    "LagKV",
    "MPCacheStatic",
    "Merging",
    "ObservedAttention",
    "Oracle",
    "PerLayer",
    "PoolCounter",
    "PoolFifo",
    "PoolLru",
    "Protected",
    "PyramidKV",
    "RandomTokens",
    "SimLayerKV",
    "SlidingWindow",
    "SnapKV",
    "Streaming",
    "SubGen",
    "ThinK",
]
