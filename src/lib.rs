//! A durable webhook-to-RabbitMQ relay for the Prism body-scan API.
//!
//! The path of one event: [`server`] accepts the connection and [`ingress`] reads the webhook; [`signature`] tells who
//! sent it; [`event`] names it; [`spool`] puts it on disk, and only then it is answered 200. From there [`publisher`]
//! takes it, in order, and publishes it to the exchange that [`topology`] has declared; it leaves the spool when
//! RabbitMQ has confirmed it. [`relay`] builds these parts, starts them, and drains them in the order of the data.
//!
//! Ingress and publisher meet only at the spool.

pub mod cli;
pub mod config;
pub mod relay;
// The path of one event.
pub mod server;
pub mod ingress;
pub mod signature;
pub mod event;
pub mod spool;
pub mod broker;
pub mod topology;
pub mod publisher;
// Beside the path.
pub mod ops;
pub mod health;
pub mod backoff;
pub mod http_client;
pub mod recent;
pub mod metrics;
pub mod log_limiter;
pub mod reload;
pub mod secret;
pub mod service_manager;
pub mod logging;
pub mod text;
pub mod tls;
pub mod traces;
