//! The plan as text, for `topology show`.

use lapin::types::FieldTable;

use super::definitions::{kind, plain};
use super::plan::{Entity, Plan};

/// Lists entities and bindings in the order of their declaration, each with its arguments below it.
pub fn show(plan: &Plan) -> String {
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
