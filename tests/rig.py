"""The rig of the state machine, of `vattn.allocator.testing_rig`."""

from vattn.allocator.testing_rig import LANE_PAGES, SLOTS, Rig, done, ints

__all__ = ["LANE_PAGES", "SLOTS", "Rig", "done", "ints"]
