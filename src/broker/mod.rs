//! How to reach RabbitMQ: addresses and credentials, connections, the management API, and what its replies mean.
//! Declares nothing and publishes nothing.

mod access;
mod connection;
mod counts;
mod management;
mod reactor;
mod reply;
mod settings;
mod url;

pub(crate) use access::BrokerAccess;
pub(crate) use connection::{BrokerConnection, ConnectError};
pub(crate) use counts::{Counts, counts};
pub(crate) use management::{Management, ManagementError, encoded};
pub(crate) use reply::{
    NameTooLong, SHORT_STRING_BYTES_MAX, concerns_a_channel, is_limit, reply_code, reply_text, short_string,
};
pub(crate) use settings::Settings;
pub(crate) use url::BrokerUrl;
