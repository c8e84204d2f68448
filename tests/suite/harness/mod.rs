//! The harness of the suite: real RabbitMQ nodes, the real relay, and a wire between them that a test can cut.
//!
//! A test reads like this:
//!
//! ```ignore
//! let vhost = Vhost::new(Node::shared().await).await;
//! let wire = Wire::new(vhost.address());
//! let relay = Setup::new(&vhost.url_through(&wire)).set("broker.window", 10).start().await;
//! let id = relay.post(body).await.id();
//! wire.cut();
//! assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
//! ```
//!
//! Nothing outlives the test process, however that ends: every process has a [`leash::Leash`], and every folder is a
//! [`scratch::Scratch`]. Nothing sleeps, except [`eventually()`] between two probes, a slow [`Wire`], and steady
//! [`traffic`] between two webhooks.

pub mod background;
pub mod browser;
pub mod certificates;
pub mod cluster;
pub mod disk;
pub mod eventually;
pub mod http;
pub mod leash;
pub mod management;
pub mod marks;
pub mod node;
pub mod ports;
pub mod prism_api;
pub mod program;
pub mod relay;
pub mod samples;
pub mod scratch;
pub mod setup;
pub mod situations;
pub mod traffic;
pub mod vhost;
pub mod wire;

mod selftest;

pub use certificates::Authority;
pub use cluster::Cluster;
pub use eventually::{eventually, eventually_equal, eventually_within};
pub use http::{Answer, Client, Raw};
pub use node::Node;
pub use prism_api::{PrismApi, Trouble};
pub use relay::Relay;
pub use setup::{SECRET, Setup};
pub use traffic::Traffic;
pub use vhost::{Delivery, Vhost};
pub use wire::Wire;
