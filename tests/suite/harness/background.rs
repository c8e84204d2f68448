//! A runtime of the harness's own, for what must go on while a test blocks its thread, and for what a `Drop` must
//! wait for.

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

/// Runs `work` beside the test.
pub fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    RUNTIME.spawn(work)
}

/// Runs `work` and blocks this thread until it is done or `limit` is over. Made for `Drop`, where nothing can be
/// awaited; `None` if there was not enough time.
pub fn wait_for<T: Send + 'static>(limit: Duration, work: impl Future<Output = T> + Send + 'static) -> Option<T> {
    let (done, outcome) = mpsc::channel();
    RUNTIME.spawn(async move { done.send(work.await) });
    outcome.recv_timeout(limit).ok()
}
