//! The steps of one event's path, measured separately: `cargo bench --bench micro`.
#![allow(unreachable_pub, reason = "a program exports nothing")]
#![allow(clippy::disallowed_methods, reason = "benchmarks own their tasks")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use futures_util::future::join_all;
use jiff::Timestamp;
use prism_relay::event::{Envelope, Event, Fingerprint, Source, SubjectKey};
use prism_relay::metrics::Metrics;
use prism_relay::publisher::message::Message;
use prism_relay::secret::Secret;
use prism_relay::signature::{Verifier, sign};
use prism_relay::spool::{self, Durability, Spool};

/// Events that are appended concurrently.
const SENDERS: usize = 64;

fn body() -> &'static str {
    include_str!("../tests/samples/events.jsonl").lines().next().expect("a sample")
}

/// A new event, not a duplicate.
fn event() -> Event {
    let id = uuid::Uuid::now_v7();
    let body = Bytes::from(body().replace("7f2ec6e0-b06d-42b1-b2a1-fff59a458490", &id.to_string()));
    let accepted_ms = Timestamp::now().as_millisecond();
    let (fingerprint, subject) = (Fingerprint::of(&body), Some(SubjectKey(id.as_u128() as i64)));
    Event { id, accepted_ms, source: Source::Webhook, authentic: true, trace: None, fingerprint, subject, body }
}

fn signature(criterion: &mut Criterion) {
    let secret = Secret::new("whsec_bench");
    let (now, body) = (Timestamp::now(), body());
    let timestamp = now.to_string();
    let signature = sign(&secret, &timestamp, body.as_bytes());
    let verifier = Verifier::new(&[secret], true, Duration::from_secs(300));
    criterion.bench_function("verify a signature", |bencher| {
        bencher.iter(|| {
            let (timestamp, signature) = (Some(timestamp.as_bytes()), Some(signature.as_bytes()));
            verifier.verify(timestamp, signature, black_box(body), now).expect("a good signature")
        });
    });
}

fn envelope(criterion: &mut Criterion) {
    criterion.bench_function("read an envelope", |bencher| {
        bencher.iter(|| Envelope::parse(black_box(body().as_bytes())).expect("an envelope"));
    });
    let event = event();
    criterion.bench_function("make a message", |bencher| {
        bencher.iter(|| {
            let event = black_box(&event);
            Message::new(event, Envelope::parse(&event.body).ok().as_ref(), None)
        });
    });
}

fn append(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("spool.db");
    let spool = spool::Settings { path, max_bytes: u64::MAX, durability: Durability::Disk, body_bytes_max: 1 << 18 };
    let dedupe = spool::dedupe::Settings { window: Duration::from_secs(120), entries_max: 100_000 };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let guard = runtime.enter();
    let (spool, _end) = Spool::open(&spool, &dedupe, None, Arc::new(Metrics::new())).expect("a spool");
    drop(guard);
    let mut group = criterion.benchmark_group("append to the spool, synced");
    for senders in [1, SENDERS] {
        group.throughput(Throughput::Elements(senders as u64));
        group.bench_function(format!("{senders} at once"), |bencher| {
            let events = || (0..senders).map(|_| event()).collect::<Vec<_>>();
            bencher.to_async(&runtime).iter_batched(
                events,
                |events| async {
                    for receipt in join_all(events.into_iter().map(|event| spool.append(event, None))).await {
                        assert!(!receipt.expect("a receipt").duplicate);
                    }
                },
                BatchSize::SmallInput,
            );
        });
    }
}

criterion_group!(benches, signature, envelope, append);
criterion_main!(benches);
