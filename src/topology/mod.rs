//! What must exist on the broker: exchanges, queues and bindings. The relay creates or checks them when it connects, or
//! leaves them alone, as `topology.declare` says; commands show, export and compare them.

mod declare;
mod definitions;
mod diff;
mod live;
mod plan;
mod remedy;
mod show;
mod spec;

pub use declare::{Comparison, TopologyError, compare, establish};
pub use definitions::definitions;
pub use diff::{Difference, Kind, differences};
pub use live::Live;
pub use plan::{DEAD, Entity, Plan, UNROUTED};
pub use remedy::{Commands, Remedy, quote};
pub use show::show;
pub use spec::{ARCHIVE, ArchiveSpec, Declare, QueueSpec, Spec};
