//! A durable webhook-to-RabbitMQ relay for the Prism body-scan API.
//!
//! The path of one event: [`server`] accepts the connection and [`ingress`] reads the webhook; [`signature`] checks who
//! sent it; [`event`] names it, and [`subject`] knows how far its scan or prediction has come; [`spool`] puts it on
//! disk, and only then is it answered 200. From there [`publisher`] reads it, in order, and publishes it over a
//! connection of `broker` to the exchange that `topology` has declared. It leaves the spool when RabbitMQ has confirmed
//! it. What no webhook brought, `reconcile` learns from Prism's API, and hands it to the spool as well.
//!
//! `relay` builds these parts, runs them, and drains them in the order of the data. Ingress and publisher meet only at
//! the spool. Imports run one way: `tests/suite/house_rules.rs` lists what each module may use.
//!
//! The public modules are public for `main.rs`, the benchmarks and the fuzz targets. They are not a stable interface.
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "unit tests own their tasks"))]

pub mod cli;
mod relay;
pub mod config;
// The path of one event.
pub mod server;
pub mod ingress;
pub mod signature;
pub mod event;
pub mod subject;
mod schemas;
pub mod spool;
pub mod publisher;
mod broker;
mod topology;
mod reconcile;
// Not on the path of an event.
mod problem;
mod health;
mod recent;
mod drift;
mod ops;
pub mod metrics;
mod logging;
mod log_limiter;
pub mod traces;
mod tls;
mod first_bytes;
mod http_client;
mod reload;
pub mod secret;
mod service_manager;
mod backoff;
mod text;
