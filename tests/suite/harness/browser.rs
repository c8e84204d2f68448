//! A real headless Chromium, driven through ChromeDriver (the W3C's WebDriver protocol).
//!
//! By default, Chromium and ChromeDriver are Debian's packages `chromium` and `chromium-driver`; `PRISM_TEST_CHROMIUM`
//! and `PRISM_TEST_CHROMEDRIVER` name others. With `PRISM_TEST_SCREENSHOTS` set to a folder, screenshots are saved
//! there.

use std::path::PathBuf;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use hyper::Method;
use serde_json::{Value, json};

use super::eventually::{eventually, poll};
use super::http::{Answer, Client};
use super::leash;
use super::ports;
use super::program::Program;
use super::scratch::Scratch;

/// Both programs together take some seconds to start, and longer while a compiler runs.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// The key under which WebDriver returns elements (W3C WebDriver, section 12.1).
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

pub struct Browser {
    client: Client,
    session: String,
    // Dropped in this order: the driver, the browser, its profile.
    _driver: Program,
    _chromium: Program,
    _profile: Scratch,
}

fn program(variable: &str, default: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| default.to_owned())
}

impl Browser {
    pub async fn start() -> Self {
        let (profile, debugging, port) = (Scratch::new(), ports::free(), ports::free());
        let mut chromium = leash::command(&program("PRISM_TEST_CHROMIUM", "chromium"));
        chromium.args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
        ]);
        chromium.args(["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars"]);
        chromium.arg(format!("--user-data-dir={}", profile.path().display()));
        chromium.arg(format!("--remote-debugging-port={debugging}")).arg("about:blank");
        let chromium = Program::start(chromium);
        let mut driver = leash::command(&program("PRISM_TEST_CHROMEDRIVER", "chromedriver"));
        driver.arg(format!("--port={port}"));
        let driver = Program::start(driver);

        let (client, url) = (Client::http1(), format!("http://127.0.0.1:{port}/session"));
        // The driver attaches to a running browser, so that the browser has its own leash.
        let options = json!({ "debuggerAddress": format!("127.0.0.1:{debugging}") });
        let always = json!({ "goog:chromeOptions": options, "goog:loggingPrefs": { "browser": "ALL" } });
        let capabilities = json!({ "capabilities": { "alwaysMatch": always } }).to_string();
        let session = poll(START_DEADLINE, async || {
            let answer = client.send(Method::POST, &url, &[], capabilities.clone()).await?;
            let id = answer.json()["value"]["sessionId"].as_str().map(str::to_owned);
            id.ok_or_else(|| answer.to_string())
        });
        let session = session.await.unwrap_or_else(|error| {
            panic!("no browser (see the module doc of browser.rs): {error}\n{}", chromium.stderr().join("\n"))
        });
        let session = format!("{url}/{session}");
        Self { client, session, _driver: driver, _chromium: chromium, _profile: profile }
    }

    async fn call(&self, method: Method, path: &str, body: Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let answer = self.client.send(method, &format!("{}/{path}", self.session), &[], body).await;
        answer.unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    pub async fn open(&self, url: &str) {
        self.call(Method::POST, "url", json!({ "url": url })).await.expect(200);
    }

    /// Runs the body of a function in the page and gives back its result.
    pub async fn run(&self, script: &str) -> Value {
        let body = json!({ "script": script, "args": [] });
        // A page that is being replaced by the next one cannot run scripts.
        eventually(&format!("the page to run {script:?}"), async || {
            let answer = self.call(Method::POST, "execute/sync", body.clone()).await;
            if answer.status == 200 { Ok(answer.json()["value"].take()) } else { Err(answer) }
        })
        .await
    }

    /// The visible text of the first element that matches; empty if there is none or it is hidden.
    pub async fn text(&self, css: &str) -> String {
        let script = format!("return document.querySelector({})?.innerText ?? ''", Value::from(css));
        // The page keeps numbers and units together with non-breaking spaces.
        self.run(&script).await.as_str().unwrap_or_default().replace('\u{a0}', " ")
    }

    /// Waits until the text of this element contains `part`.
    pub async fn shows(&self, css: &str, part: &str) {
        eventually(&format!("{part:?} in {css}"), async || match self.text(css).await {
            text if text.contains(part) => Ok(()),
            text => Err(format!("{text:?}")),
        })
        .await;
    }

    async fn element(&self, css: &str) -> String {
        eventually(&format!("an element {css}"), async || {
            let query = json!({ "using": "css selector", "value": css });
            let found = self.call(Method::POST, "element", query).await;
            found.json()["value"][ELEMENT].as_str().map(str::to_owned).ok_or_else(|| found.to_string())
        })
        .await
    }

    /// Clicks as a person does: only on an element that is visible and not covered.
    pub async fn click(&self, css: &str) {
        eventually(&format!("a click on {css}"), async || {
            let element = self.element(css).await;
            let answer = self.call(Method::POST, &format!("element/{element}/click"), json!({})).await;
            if answer.status == 200 { Ok(()) } else { Err(answer) }
        })
        .await;
    }

    pub async fn write(&self, css: &str, text: &str) {
        let element = self.element(css).await;
        self.call(Method::POST, &format!("element/{element}/value"), json!({ "text": text })).await.expect(200);
    }

    /// Sets the width and height of the page in CSS pixels, and a light or dark colour scheme.
    pub async fn look_like(&self, (width, height): (u32, u32), dark: bool) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.devtools("Emulation.setDeviceMetricsOverride", metrics).await;
        let scheme = if dark { "dark" } else { "light" };
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.devtools("Emulation.setEmulatedMedia", json!({ "features": features })).await;
    }

    async fn devtools(&self, command: &str, parameters: Value) -> Value {
        let body = json!({ "cmd": command, "params": parameters });
        self.call(Method::POST, "goog/cdp/execute", body).await.expect(200).json()["value"].take()
    }

    /// Saves a screenshot of the page if `PRISM_TEST_SCREENSHOTS` is set.
    pub async fn screenshot(&self, name: &str) {
        let Some(folder) = std::env::var_os("PRISM_TEST_SCREENSHOTS").map(PathBuf::from) else { return };
        let picture = self.devtools("Page.captureScreenshot", json!({ "format": "png" })).await;
        let picture =
            BASE64_STANDARD.decode(picture["data"].as_str().unwrap_or_default()).expect("a picture in base64");
        std::fs::create_dir_all(&folder).expect("make the folder for screenshots");
        std::fs::write(folder.join(format!("{name}.png")), picture).expect("write a screenshot");
    }

    /// The warnings and errors on the browser's console since the last call: scripts, network, content policy.
    pub async fn errors(&self) -> Vec<String> {
        let log = self.call(Method::POST, "se/log", json!({ "type": "browser" })).await.expect(200).json();
        let lines = log["value"].as_array().cloned().unwrap_or_default();
        let serious = lines.iter().filter(|line| line["level"] == "SEVERE" || line["level"] == "WARNING");
        serious.map(|line| line["message"].as_str().unwrap_or_default().to_owned()).collect()
    }
}
