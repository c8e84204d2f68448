//! The integration suite: the real binary against real RabbitMQ nodes.
#![allow(unreachable_pub, reason = "a program exports nothing")]
#![allow(
    clippy::disallowed_methods,
    reason = "tests own their tasks, and set up the environment of the programs that they start"
)]

mod harness;

mod broker;
mod check;
mod clock;
mod cluster;
mod command_line;
mod configuration;
mod console;
mod contract;
mod discretion;
mod disk;
mod docs;
mod durability;
mod framing;
mod handover;
mod hostile;
mod house_rules;
mod messages;
mod network;
mod notices;
mod operators;
mod parked;
mod power;
mod process;
mod queues;
mod quickstart;
mod reconcile;
mod reconcile_commands;
mod redrive;
mod replay;
mod replicas;
mod secrets;
mod soak;
mod spool_commands;
mod spool_files;
mod spool_log;
mod statuses;
mod tls;
mod topology;
#[cfg(feature = "otlp")]
mod traces;
mod workers;
