//! The integration suite: the real binary against real RabbitMQ nodes.
mod harness;
