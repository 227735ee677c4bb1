"""Models over a cache that forgets: a runner, what it is asked, and every eviction policy."""
