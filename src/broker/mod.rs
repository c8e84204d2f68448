//! How to reach RabbitMQ: addresses and credentials, connections, the management API, and what its replies mean.
//! Declares nothing and publishes nothing.

mod access;
mod connection;
mod management;
mod reactor;
mod reply;
mod settings;
mod url;

pub use access::BrokerAccess;
pub use connection::{BrokerConnection, ConnectError};
pub use management::{Management, ManagementError, encoded};
pub use reply::{NameTooLong, SHORT_STRING_BYTES_MAX, reply_code, reply_text, short_string};
pub use settings::Settings;
pub use url::BrokerUrl;
