"""Selection policies: one frozen dataclass each, see `vattn.selector`.

by page     Quest, MeanDeviation, Cuboid, Landmark, Clusters
by token    Signs, Nibbles, Graded, Loki, DoubleSparsity, SparQ, InfiniGen
combined    TwoStage, Twilight, Sampled, Estimated
baselines   Exact, Random, Window
"""

from vattn.policies.clusters import Clusters
from vattn.policies.cuboid import Cuboid
from vattn.policies.deviation import MeanDeviation
from vattn.policies.double_sparsity import DoubleSparsity
from vattn.policies.estimated import Estimated
from vattn.policies.exact import Exact
from vattn.policies.graded import Graded
from vattn.policies.infinigen import InfiniGen, skew
from vattn.policies.landmark import Landmark
from vattn.policies.loki import Loki
from vattn.policies.maps import Map
from vattn.policies.nibbles import Nibbles
from vattn.policies.quest import Quest
from vattn.policies.random_pages import Random
from vattn.policies.sampled import Sampled
from vattn.policies.signs import Signs
from vattn.policies.sparq import SparQ
from vattn.policies.twilight import Twilight
from vattn.policies.two_stage import TwoStage
from vattn.policies.window import Window

__all__ = [
    "Clusters",
    "Cuboid",
    "DoubleSparsity",
    "Estimated",
    "Exact",
    "Graded",
    "InfiniGen",
    "Landmark",
    "Loki",
    "Map",
    "MeanDeviation",
    "Nibbles",
    "Quest",
    "Random",
    "Sampled",
    "Signs",
    "SparQ",
    "Twilight",
    "TwoStage",
    "Window",
    "skew",
]
