//! The contract of the messages: the JSON Schemas of `deploy/workers/schemas`, compiled in. They are the only list of
//! the fields, states and types that Prism documents.

use serde_json::Value;

/// The body of every event, with any payload.
pub(crate) const ENVELOPE: &str = include_str!("../deploy/workers/schemas/envelope.schema.json");
/// The AMQP headers of a message.
pub(crate) const HEADERS: &str = include_str!("../deploy/workers/schemas/headers.schema.json");
/// Which payload belongs to which event type.
const EVENT: &str = include_str!("../deploy/workers/schemas/event.schema.json");
/// The payloads, by the names of their files.
const PAYLOADS: [(&str, &str); 2] = [
    ("scan.schema.json", include_str!("../deploy/workers/schemas/scan.schema.json")),
    ("body_shape_prediction.schema.json", include_str!("../deploy/workers/schemas/body_shape_prediction.schema.json")),
];

/// A compiled-in schema as JSON.
pub(crate) fn parsed(schema: &str) -> Value {
    serde_json::from_str(schema).expect("a test parses every compiled-in schema")
}

/// The documented event types, each with the schema of its payload.
pub(crate) fn documented() -> Vec<(String, Value)> {
    let event = parsed(EVENT);
    let cases = event["allOf"].as_array().into_iter().flatten();
    let types = |case: &Value| {
        let file = case.pointer("/then/properties/payload/$ref")?;
        let (_, schema) = PAYLOADS.iter().find(|(name, _)| file == name)?;
        let types = case.pointer("/if/properties/eventType/enum")?.as_array()?;
        let types = types.iter().filter_map(Value::as_str).map(|name| (name.to_owned(), parsed(schema)));
        Some(types.collect::<Vec<_>>())
    };
    cases.filter_map(types).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::DOCUMENTED_TYPES;

    #[test]
    fn every_documented_type_has_the_schema_of_its_payload() {
        let documented = documented();
        let names: Vec<_> = documented.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, DOCUMENTED_TYPES);
        assert_eq!(parsed(ENVELOPE)["properties"]["eventType"]["anyOf"][0]["enum"], serde_json::json!(names));
        for (name, schema) in &documented {
            let id = if name.starts_with("scan.") { "scanId" } else { "bodyShapePredictionId" };
            assert_eq!(schema["required"][0], id, "{name}");
        }
        assert_eq!(parsed(HEADERS)["title"], "Headers");
    }
}
