//! What must exist on the broker: exchanges, queues and bindings. The relay creates or checks them when it connects, or
//! leaves them alone, as `topology.declare` says; commands show, export and compare them.

mod declare;
mod definitions;
mod diff;
mod live;
mod pattern;
mod plan;
mod remedy;
mod show;
mod spec;

pub(crate) use declare::{Comparison, TopologyError, compare, establish};
pub(crate) use definitions::definitions;
pub(crate) use diff::{Difference, Kind, differences};
pub(crate) use live::Live;
pub(crate) use pattern::{check_pattern, matches, pattern_advice};
pub(crate) use plan::{DEAD, Plan, UNROUTED};
pub(crate) use remedy::{Commands, Remedy, quote};
pub(crate) use show::show;
pub(crate) use spec::{ARCHIVE, ArchiveSpec, Declare, QueueSpec, Spec};
