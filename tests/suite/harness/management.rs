//! RabbitMQ's management API, which is a hundred times faster than `rabbitmqctl`.

use hyper::Method;
use serde_json::Value;

use super::http::{Answer, Client};

/// The API of one node, as the user `guest`. Plain data: usable from any runtime, also while the node is down.
#[derive(Debug, Clone, Copy)]
pub struct Management {
    pub port: u16,
}

impl Management {
    /// One call, such as `GET` `/api/` + `queues/v/q`, with path segments that are [`encode`]d. Accepts any status.
    pub async fn call(self, method: Method, path: &str, body: &Value) -> Result<Answer, String> {
        let url = format!("http://127.0.0.1:{}/api/{path}", self.port);
        // The user is guest; the password is in marks.rs.
        let headers =
            [("authorization", "Basic Z3Vlc3Q6bWFya2VkLXBhc3MtNmQxZg=="), ("content-type", "application/json")];
        let body = if body.is_null() { String::new() } else { body.to_string() };
        Client::http1().send(method, &url, &headers, body).await
    }

    /// The value at `path`; `None` for 404.
    pub async fn find(self, path: &str) -> Option<Value> {
        let answer = self.call(Method::GET, path, &Value::Null).await;
        let answer = answer.unwrap_or_else(|error| panic!("GET {path}: {error}"));
        (answer.status != 404).then(|| answer.expect(200).json())
    }

    /// The list at `path`; empty for 404.
    pub async fn list(self, path: &str) -> Vec<Value> {
        match self.find(path).await {
            Some(Value::Array(list)) => list,
            Some(other) => panic!("GET {path}: expected a list, got {other}"),
            None => Vec::new(),
        }
    }

    pub async fn put(self, path: &str, body: Value) {
        self.change(Method::PUT, path, body).await;
    }

    pub async fn post(self, path: &str, body: Value) {
        self.change(Method::POST, path, body).await;
    }

    /// Deletes the object at `path`. Returns whether it existed.
    pub async fn delete(self, path: &str) -> bool {
        let answer = self.call(Method::DELETE, path, &Value::Null).await;
        let answer = answer.unwrap_or_else(|error| panic!("DELETE {path}: {error}"));
        assert!(answer.status < 300 || answer.status == 404, "DELETE {path}: {answer}");
        answer.status != 404
    }

    async fn change(self, method: Method, path: &str, body: Value) {
        let answer =
            self.call(method.clone(), path, &body).await.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        assert!(answer.status < 300, "{method} {path} {body}: {answer}");
    }
}

/// Percent-encodes text as one segment of a path.
pub fn encode(segment: &str) -> String {
    let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    segment.bytes().map(|byte| if safe(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
