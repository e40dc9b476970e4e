"""Where a model runs: devices, links, what they cost, and the partitioner that makes a plan of them.

Pure: no I/O, no clock, no randomness. `partition(snapshot, model, constraints)` is the whole of it; everything else is
the values that go in and come out, and the errors.
"""

from topology.constraints import OBJECTIVES, Constraints
from topology.displace import RunningJob
from topology.errors import ConstraintError, NoFeasiblePlan, Relaxation, Shortfall, TopologyError
from topology.model import DTYPE_BYTES, ModelSpec
from topology.partition import DEFAULT_CONTEXT, STRATEGIES, partition
from topology.plan import Choice, Plan, Predicted, Replica, Shard, Stage, Standby
from topology.snapshot import Device, Held, Link, Site, Snapshot

__all__ = [
    "DEFAULT_CONTEXT",
    "DTYPE_BYTES",
    "OBJECTIVES",
    "STRATEGIES",
    "Choice",
    "ConstraintError",
    "Constraints",
    "Device",
    "Held",
    "Link",
    "ModelSpec",
    "NoFeasiblePlan",
    "Plan",
    "Predicted",
    "Relaxation",
    "Replica",
    "RunningJob",
    "Shard",
    "Shortfall",
    "Site",
    "Snapshot",
    "Stage",
    "Standby",
    "TopologyError",
    "partition",
]
