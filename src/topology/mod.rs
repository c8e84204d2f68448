//! What must exist on the broker: exchanges, queues and bindings. The relay creates or checks them when it connects, or
//! leaves them alone, as `topology.declare` says; commands show, export and compare them.

mod asyncapi;
mod declare;
mod definitions;
mod diff;
mod live;
mod look;
mod losses;
mod pattern;
mod plan;
mod probe;
mod remedy;
mod show;
mod spec;
mod trouble;

pub(crate) use asyncapi::asyncapi;
pub(crate) use declare::{Comparison, TopologyError, compare, establish};
pub(crate) use definitions::definitions;
pub(crate) use diff::{Difference, Kind, differences, missing_bindings};
pub(crate) use live::{Live, LiveEntity};
pub(crate) use look::{Looker, QueueLook};
pub(crate) use losses::{Loss, losses};
pub(crate) use pattern::{check_pattern, matches, pattern_advice};
pub(crate) use plan::{DEAD, EVENTS, Entity, Plan, QueueRole, UNROUTED};
pub(crate) use probe::{may_bind, may_publish, would_create};
pub(crate) use remedy::{Commands, Remedy, quote};
pub(crate) use show::show;
pub(crate) use spec::{ARCHIVE, ArchiveSpec, Declare, QueueSpec, Spec};
pub(crate) use trouble::{Trouble, TroubleKind};
