//! The plan as text, for `topology show`.

use lapin::types::FieldTable;

use super::definitions::{kind, plain};
use super::plan::{Entity, Plan};

/// Lists entities and bindings in the order of their declaration, each with its arguments below it.
pub(crate) fn show(plan: &Plan) -> String {
    let mut text = String::new();
    for entity in plan.entities() {
        let what = match entity {
            Entity::Exchange(exchange) => kind(&exchange.kind),
            Entity::Queue(_) => "durable".to_owned(),
        };
        add(&mut text, &format!("{entity}  ({what})"), entity.arguments());
    }
    for binding in &plan.bindings {
        add(&mut text, &binding.to_string(), &binding.arguments);
    }
    text
}

fn add(text: &mut String, line: &str, arguments: &FieldTable) {
    *text += &format!("{line}\n");
    for (name, value) in arguments.inner() {
        *text += &format!("    {name} = {}\n", plain(value));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::topology::spec::{ArchiveSpec, QueueSpec, Spec};

    const SECOND: Duration = Duration::from_secs(1);

    const PLAIN: &str = r##"exchange prism.unrouted  (fanout)
queue prism.unrouted  (durable)
    x-queue-type = "quorum"
exchange prism.dead  (topic)
queue prism.dead  (durable)
    x-queue-type = "quorum"
exchange prism.events  (topic)
    alternate-exchange = "prism.unrouted"
queue q  (durable)
    x-dead-letter-exchange = "prism.dead"
    x-dead-letter-strategy = "at-least-once"
    x-delivery-limit = 20
    x-overflow = "reject-publish"
    x-queue-type = "quorum"
exchange e  (fanout)
binding of queue prism.unrouted to exchange prism.unrouted by ""
binding of queue prism.dead to exchange prism.dead by "#"
binding of queue q to exchange prism.events by "a.#"
binding of exchange prism.events to exchange e by ""
"##;

    fn shown(spec: &Spec) -> String {
        show(&Plan::new(spec, "e"))
    }

    #[test]
    fn a_queue_without_options_dead_letters_to_the_dead_letters() {
        assert_eq!(shown(&Spec::of_queue(|_| {})), PLAIN);
    }

    /// What an option changes in [`PLAIN`]: the lines of the queue `q`.
    #[test]
    fn options_of_a_queue_are_arguments() {
        type Change = fn(&mut QueueSpec);
        let options: [(Change, &str); 4] = [
            (|queue| queue.delivery_limit = 3, "    x-delivery-limit = 3\n"),
            (|queue| queue.single_active_consumer = true, "    x-single-active-consumer = true\n"),
            (|queue| queue.max_length = Some(7), "    x-max-length = 7\n"),
            (|queue| queue.ttl = Some(2 * SECOND), "    x-message-ttl = 2000\n"),
        ];
        for (change, line) in options {
            let text = shown(&Spec::of_queue(change));
            let other = |text: &str| text.replace(line, "").replace("    x-delivery-limit = 20\n", "");
            assert!(text.contains(line), "{line} is not in {text}");
            assert_eq!(other(&text), other(PLAIN));
        }
    }

    #[test]
    fn retry_delays_are_a_ladder_that_ends_in_the_dead_letters() {
        let text = shown(&Spec::of_queue(|queue| queue.retry_delays = vec![SECOND, 60 * SECOND]));
        let ladder = r#"exchange q.retry.1  (fanout)
exchange q.retry  (direct)
    alternate-exchange = "q.retry.1"
exchange q.rejected  (headers)
    alternate-exchange = "q.retry"
queue q.retry.1  (durable)
    x-dead-letter-exchange = "q"
    x-dead-letter-routing-key = "q:1"
    x-dead-letter-strategy = "at-least-once"
    x-message-ttl = 1000
    x-overflow = "reject-publish"
    x-queue-type = "quorum"
queue q.retry.2  (durable)
    x-dead-letter-exchange = "q"
    x-dead-letter-routing-key = "q:2"
    x-dead-letter-strategy = "at-least-once"
    x-message-ttl = 60000
    x-overflow = "reject-publish"
    x-queue-type = "quorum"
queue q  (durable)
    x-dead-letter-exchange = "q.rejected"
"#;
        assert!(text.contains(ladder), "{text}");
        for line in [
            "exchange q  (fanout)\n    alternate-exchange = \"prism.unrouted\"",
            "binding of queue q.retry.1 to exchange q.retry.1 by \"\"",
            "binding of queue q.retry.2 to exchange q.retry by \"q:1\"",
            "binding of exchange prism.dead to exchange q.retry by \"q:2\"",
            "binding of queue q to exchange q by \"\"",
            "binding of queue q to exchange prism.events by \"a.#\"",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        for header in ["x-first-death-reason", "x-last-death-reason"] {
            for reason in ["delivery_limit", "expired"] {
                let binding = "binding of exchange prism.dead to exchange q.rejected by \"\"";
                let dead = format!("{binding}\n    {header} = \"{reason}\"\n    x-match = \"all-with-x\"\n");
                assert!(text.contains(&dead), "{dead} is not in {text}");
            }
        }
    }

    #[test]
    fn partitions_are_queues_behind_an_exchange_that_hashes_the_subject() {
        let text = shown(&Spec::of_queue(|queue| queue.partitions = Some(2)));
        for line in [
            "exchange q  (x-consistent-hash)\n    alternate-exchange = \"prism.unrouted\"\n",
            "    hash-header = \"prism-subject\"\n",
            "queue q.1  (durable)",
            "queue q.2  (durable)",
            "binding of queue q.1 to exchange q by \"1\"",
            "binding of queue q.2 to exchange q by \"1\"",
            "binding of exchange q to exchange prism.events by \"a.#\"",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        assert_eq!(text.matches("x-single-active-consumer = true").count(), 2, "{text}");
        assert!(!text.contains("queue q  "), "{text}");
    }

    #[test]
    fn the_archive_hangs_on_the_fanout_and_is_no_route_of_the_topic_exchange() {
        let mut spec = Spec::of_queue(|_| {});
        let (max_age, max_bytes) = (3600 * SECOND, Some(1 << 30));
        spec.archive = Some(ArchiveSpec { name: "all".to_owned(), max_age, max_bytes });
        let text = shown(&spec);
        assert_eq!(text.matches("binding of queue all").count(), 1, "{text}");
        for line in [
            "queue all  (durable)\n    x-max-age = \"3600s\"\n    x-max-length-bytes = 1073741824\n",
            "    x-queue-type = \"stream\"\n",
            "binding of queue all to exchange e by \"\"",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        let without_fanout = show(&Plan::new(&spec, "prism.events"));
        for line in [
            "binding of queue all to exchange prism.unrouted by \"\"",
            "binding of queue all to exchange prism.events by \"a.#\"",
        ] {
            assert!(without_fanout.contains(line), "{line} is not in {without_fanout}");
        }
    }
}
