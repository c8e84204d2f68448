//! Reads the topology that is on the broker from its management API.

use super::Live;
use crate::broker::{Management, ManagementError, encoded};

impl Live {
    /// Reads exchanges, queues, bindings and policies of the virtual host.
    pub async fn read(api: &Management) -> Result<Self, ManagementError> {
        let vhost = encoded(api.vhost());
        Ok(Self {
            version: api.version().await?,
            exchanges: api.get(&format!("exchanges/{vhost}")).await?,
            queues: api.get(&format!("queues/{vhost}")).await?,
            bindings: api.get(&format!("bindings/{vhost}")).await?,
            policies: api.get(&format!("policies/{vhost}")).await?,
        })
    }
}
