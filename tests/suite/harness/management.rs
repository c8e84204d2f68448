//! RabbitMQ's management API: a hundred times quicker than `rabbitmqctl`.

use hyper::Method;
use serde_json::Value;

use super::http::{Answer, Client};

/// The API of one node, as `guest`. Plain data: it can be used from any runtime, also while the node is down.
#[derive(Debug, Clone, Copy)]
pub struct Management {
    pub port: u16,
}

impl Management {
    /// One call, such as `GET` `/api/` + `queues/v/q`; path segments have to be [`encode`]d. An answer of any status is fine.
    pub async fn call(self, method: Method, path: &str, body: &Value) -> Result<Answer, String> {
        let url = format!("http://127.0.0.1:{}/api/{path}", self.port);
        // guest, and the password in marks.rs.
        let headers =
            [("authorization", "Basic Z3Vlc3Q6bWFya2VkLXBhc3MtNmQxZg=="), ("content-type", "application/json")];
        let body = if body.is_null() { String::new() } else { body.to_string() };
        Client::http1().send(method, &url, &headers, body).await
    }

    /// What is at `path`; `None` if there is nothing.
    pub async fn find(self, path: &str) -> Option<Value> {
        let answer = self.call(Method::GET, path, &Value::Null).await;
        let answer = answer.unwrap_or_else(|error| panic!("GET {path}: {error}"));
        (answer.status != 404).then(|| answer.expect(200).json())
    }

    pub async fn get(self, path: &str) -> Value {
        self.find(path).await.unwrap_or_else(|| panic!("GET {path}: there is no such thing"))
    }

    /// The list at `path`; empty if there is nothing.
    pub async fn list(self, path: &str) -> Vec<Value> {
        match self.find(path).await {
            Some(Value::Array(list)) => list,
            Some(other) => panic!("GET {path}: no list but {other}"),
            None => Vec::new(),
        }
    }

    pub async fn put(self, path: &str, body: Value) {
        self.change(Method::PUT, path, body).await;
    }

    pub async fn post(self, path: &str, body: Value) {
        self.change(Method::POST, path, body).await;
    }

    /// Deletes what is at `path`; whether there was anything.
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

/// Text as one segment of a path.
pub fn encode(segment: &str) -> String {
    let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    segment.bytes().map(|byte| if safe(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
