//! Bodies of any shape: named, keyed and made into a message, without a panic and within AMQP's limits.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use prism_relay::event::{Envelope, Event, Fingerprint, Source, TraceContext};
use prism_relay::publisher::message::Message;
use prism_relay::subject::Progress;

fuzz_target!(|input: &[u8]| {
    if let Ok(envelope) = Envelope::parse(input) {
        let key = envelope.routing_key();
        let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        assert!(!key.is_empty() && key.len() <= 200 && key.bytes().all(safe), "{key:?}");
        assert!(key.split('.').all(|word| !word.is_empty()), "{key:?}");
        let _ = envelope.subject();
        if let Some(progress) = Progress::of(&envelope) {
            assert_eq!(progress.subject.to_string().parse(), Ok(progress.subject.clone()));
            assert_eq!(progress.event_type(), envelope.event_type);
        }
    }
    // The start of the same bytes also plays the trace headers.
    let (head, tail) = input.split_at(input.len().min(60));
    let event = Event {
        id: Default::default(),
        accepted_ms: i64::from_le_bytes(input.first_chunk().copied().unwrap_or_default()),
        source: if input.len() % 3 == 0 { Source::Api } else { Source::Webhook },
        authentic: input.len() % 2 == 0,
        trace: TraceContext::from_headers(Some(head), Some(tail)),
        fingerprint: Fingerprint::of(input),
        subject: Envelope::parse(input).ok().and_then(|envelope| envelope.subject_key()),
        body: Bytes::copy_from_slice(input),
    };
    let message = Message::new(&event, Envelope::parse(&event.body).ok().as_ref(), event.trace.as_ref());
    let headers = message.properties.headers().as_ref().expect("a message has headers");
    let length: usize = headers.into_iter().map(|(name, value)| name.as_str().len() + format!("{value:?}").len()).sum();
    assert!(length < 32 * 1024, "{length} bytes of headers do not fit a frame");
    assert!(!headers.inner().contains_key("userToken"));
});
