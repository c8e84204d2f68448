//! The harness's own runtime: for work that must continue while a test blocks its thread, and for work that a `Drop`
//! must wait for.

use std::sync::{LazyLock, mpsc};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("harness")
        .enable_all()
        .build()
        .expect("a runtime for the harness")
});

/// Runs `work` in the background.
pub fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    RUNTIME.spawn(work)
}

/// Runs `work` and blocks this thread until it is done; `None` if that takes longer than `limit`. Made for `Drop`,
/// where nothing can be awaited.
pub fn wait_for<T: Send + 'static>(limit: Duration, work: impl Future<Output = T> + Send + 'static) -> Option<T> {
    let (done, outcome) = mpsc::channel();
    RUNTIME.spawn(async move { done.send(work.await) });
    outcome.recv_timeout(limit).ok()
}
