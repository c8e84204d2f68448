//! Layers, mistakes, and the two files that we ship.

use std::io::Write;

use super::sections::SECOND;
use super::*;
use crate::logging::Format;
use crate::secret::Secret;
use crate::spool::Durability;
use crate::topology::Declare;

const EXAMPLE: &str = include_str!("../../config/production.example.toml");

/// Loads a file with these contents and these variables.
fn load(toml: &str, environment: &[(&str, &str)], purpose: Purpose) -> Result<Config, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(toml.as_bytes()).unwrap();
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::load(Some(file.path()), environment, purpose)
        .map_err(|error| error.to_string().replace(file.path().to_str().unwrap(), "FILE"))
}

fn mistakes(toml: &str, environment: &[(&str, &str)]) -> String {
    load(toml, environment, Purpose::Client).expect_err("there is a mistake")
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let config = Config::load(None, [], Purpose::Client).unwrap();
    assert_eq!(config.http.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(config.http.path, "/webhooks/prism");
    assert_eq!(config.http.body_bytes_max, 256 * 1024);
    assert_eq!((config.http.header_timeout, config.http.body_timeout), (10 * SECOND, 10 * SECOND));
    assert_eq!(config.http.connections_max, 10_000);
    assert!(config.http.allowed_sources.is_empty() && config.http.trusted_proxies.is_empty());
    assert!(config.signature.required && config.signature.secrets.is_empty());
    assert_eq!(config.signature.tolerance, 300 * SECOND);
    assert_eq!(config.spool.path.to_str(), Some("data/spool.db"));
    assert_eq!((config.spool.max_bytes, config.spool.durability), (1 << 30, Durability::Disk));
    assert_eq!((config.dedupe.window, config.dedupe.entries_max), (120 * SECOND, 100_000));
    assert_eq!(config.broker.urls[0].to_string(), "amqp://guest@127.0.0.1:5672/%2f");
    assert_eq!((config.publisher.exchange.as_str(), config.publisher.window), ("prism.webhooks", 1000));
    assert_eq!(
        (config.publisher.confirm_timeout, config.broker.urls[0].expose().query.heartbeat),
        (30 * SECOND, Some(10))
    );
    assert_eq!((config.publisher.reconnect_min, config.publisher.reconnect_max), (100 * MILLISECOND, 15 * SECOND));
    assert_eq!(config.topology.declare, Declare::Active);
    assert_eq!(config.topology.queues[1].bindings, ["body_shape_prediction.#"]);
    assert_eq!(config.ops.listen.to_string(), "127.0.0.1:9090");
    assert_eq!(config.log.format, Format::Auto);
    assert_eq!(config.shutdown.grace, 25 * SECOND);
}

#[test]
fn nothing_is_reconciled_without_a_key_and_the_key_is_shown_nowhere() {
    let config = Config::load(None, [], Purpose::Client).unwrap();
    let reconcile = config.reconcile;
    assert!(reconcile.followed().is_none());
    assert_eq!(reconcile.api_url.as_str(), "https://api.hosted.prismlabs.tech");
    assert_eq!((reconcile.after, reconcile.interval, reconcile.rate), (900 * SECOND, 60 * SECOND, 1.0));
    assert_eq!((reconcile.subjects.max, reconcile.subjects.keep), (100_000, 7 * 24 * 3600 * SECOND));

    let key = "prism-key-0123456789";
    let text = format!("[reconcile]\napi_key = \"{key}\"\napi_url = \"http://127.0.0.1:8089\"\n");
    let config = load(&text, &[], Purpose::Client).unwrap();
    assert_eq!(config.reconcile.followed().map(|subjects| subjects.max), Some(100_000));
    assert!(config.notes.iter().any(|note| note.key == "reconcile.api_url" && note.text.contains("prism-verified")));
    assert!(!format!("{config:?}").contains(key));
}

#[test]
fn every_mistake_of_reconciling_is_named_at_once() {
    let text = mistakes(
        "[reconcile]\napi_key = \"hunter2-short\"\napi_url = \"http://prism.example\"\nafter = \"0s\"\n\
         interval = \"2h\"\n\
         rate = 0\nsubjects_max = 10\nkeep = \"1m\"\nsince = 1\n",
        &[],
    );
    for expected in [
        "reconcile.api_key: the value is shorter than 16 characters (set in FILE)",
        "reconcile.api_url: the value begins with http://, which would send the key in clear text",
        "reconcile.after: \"0s\" is not between 1s and 7days",
        "reconcile.interval: \"2h\" is not between 1s and 1h",
        "reconcile.rate: \"0\" is not a number of requests per second from 0.01 to 100",
        "reconcile.subjects_max: \"10\" is not a whole number between 1000 and 1000000",
        "reconcile.keep: \"1m\" is not between 1h and 30days",
        "reconcile.since: unknown key",
    ] {
        assert!(text.contains(expected), "{expected} is missing in:\n{text}");
    }
    assert!(!text.contains("hunter2"), "{text}");
    let text = mistakes("[reconcile]\nafter = \"2h\"\nkeep = \"1h\"\n", &[]);
    assert!(text.contains("reconcile.keep: is below reconcile.after"), "{text}");
    let text = mistakes("[reconcile]\napi_key = \"'prism-key-0123456789'\"\n", &[]);
    assert!(text.contains("reconcile.api_key: the value begins or ends with a quotation mark"), "{text}");
    let text = mistakes("[reconcile]\napi_key_file = \"/dev/zero\"\n", &[]);
    assert!(text.contains("reconcile.api_key_file: \"/dev/zero\" is a pipe, a socket or a device"), "{text}");
}

#[test]
fn the_example_differs_from_valid_only_by_the_files_that_it_names() {
    let error = load(EXAMPLE, &[], Purpose::Serve).unwrap_err();
    let lines: Vec<_> = error.lines().skip(1).map(|line| line.trim().split(':').next().unwrap()).collect();
    assert_eq!(lines, ["signature.secrets_file", "broker.password_file"], "{error}");

    let secrets = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secrets.path(), "whsec_new_0123456789\nwhsec_old_0123456789\n").unwrap();
    let password = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(password.path(), "hunter2\n").unwrap();
    let twins = [
        ("PRISM_RELAY__SIGNATURE__SECRETS_FILE", secrets.path().to_str().unwrap()),
        ("PRISM_RELAY__BROKER__PASSWORD_FILE", password.path().to_str().unwrap()),
    ];
    let config = load(EXAMPLE, &twins, Purpose::Serve).unwrap();
    assert_eq!(config.broker.urls[0].expose().authority.userinfo.password, "hunter2");
    assert_eq!(config.broker.urls.len(), 3);
    let secrets: Vec<_> = config.signature.secrets.iter().map(Secret::expose).collect();
    assert_eq!(secrets, ["whsec_new_0123456789", "whsec_old_0123456789"]);
}

#[test]
fn the_environment_wins_over_the_file_and_the_file_over_the_defaults() {
    let toml = "[http]\npath = \"/file\"\nlisten = \"127.0.0.1:1\"\n[signature]\nsecrets = [\"0123456789abcdef\"]\n";
    let environment = [
        ("PRISM_RELAY__HTTP__LISTEN", "127.0.0.1:2"),
        ("PRISM_RELAY__SIGNATURE__SECRETS", "0123456789012345, whsec_0123456789"),
        ("PRISM_RELAY__HTTP__ALLOWED_SOURCES", "203.0.113.0/24,2001:db8::1,::ffff:198.51.100.0/120"),
        ("PRISM_RELAY__HTTP__CONNECTIONS_MAX", "7"),
        ("PRISM_RELAY__SIGNATURE__REQUIRED", "false"),
        ("PRISM_RELAY__TOPOLOGY__QUEUES", "[{ name = \"q\", bindings = [\"#\"] }]"),
        ("PRISM_RELAYER", "another program's"),
    ];
    let config = load(toml, &environment, Purpose::Serve).unwrap();
    assert_eq!((config.http.path.as_str(), config.http.listen.port()), ("/file", 2));
    let secrets: Vec<_> = config.signature.secrets.iter().map(Secret::expose).collect();
    assert_eq!(secrets, ["0123456789012345", "whsec_0123456789"], "a secret of digits stays as it is");
    assert_eq!(
        config.http.allowed_sources.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["203.0.113.0/24", "2001:db8::1/128", "198.51.100.0/24"]
    );
    assert_eq!(config.http.connections_max, 7);
    assert!(!config.signature.required);
    assert_eq!(config.topology.queues.len(), 1);
    assert_eq!(
        (config.topology.queues[0].name.as_str(), config.topology.queues[0].bindings.as_slice()),
        ("q", ["#".to_owned()].as_slice())
    );
}

#[test]
fn the_address_of_the_notices_is_quoted_nowhere_but_for_its_origin() {
    let toml = "[notify]\nurl = \"https://user:pass@hooks.example.com/T0/key\"\nsecret = \"0123456789abcdef\"\n";
    let config = load(toml, &[], Purpose::Client).unwrap();
    let target = config.notify.target.as_ref().unwrap();
    assert_eq!(target.origin(), "https://hooks.example.com");
    assert_eq!(config.notify.secret.as_ref().map(Secret::expose), Some("0123456789abcdef"));
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(toml.as_bytes()).unwrap();
    let shown = shown(Some(file.path()), []).unwrap();
    assert!(shown.contains("url = \"https://hooks.example.com/***\"") && shown.contains("secret = \"***\""), "{shown}");
    assert!(!shown.contains("pass") && !shown.contains("key"), "{shown}");
    for (toml, expected) in [
        ("url = \"hooks.example.com/key\"", "notify.url: the value is not an address such as https://"),
        ("secret = \"0123456789\"", "notify.secret: the value is shorter than 16 characters"),
        ("secret = \"0123456789abcdef\"\nsecret_file = \"/etc/passwd\"", "notify.secret_file:"),
    ] {
        let found = mistakes(&format!("[notify]\n{toml}\n"), &[]);
        assert!(found.contains(expected) && !found.contains("key") && !found.contains("0123456789"), "{found}");
    }
    let config = load("[notify]\nsecret = \"0123456789abcdef\"\n", &[], Purpose::Client).unwrap();
    assert!(config.notes.iter().any(|note| note.key == "notify.secret"), "{:?}", config.notes);
}

#[test]
fn all_mistakes_come_in_one_message_each_with_its_key() {
    let toml = "
        [http]
        listen = \"nowhere\"
        path = \"webhooks\"
        body_bytes_max = \"much\"
        body_timeot = \"1s\"
        allowed_sources = [\"10.0.0.0/99\"]
        [spool]
        durability = \"maybe\"
        max_bytes = \"0\"
        [broker]
        urls = []
        window = 0
        heartbeat = \"1500ms\"
        reconnect_max = \"1ms\"
        [topology]
        queues = [{ name = \"prism.dead\", bindings = [\"#\"] }, { name = \"q\", binding = \"#\" }]
        [log]
        filter = \"a=b=c\"
        [shutdown]
        grace = 5
        [sigature]
        required = true
    ";
    let text = mistakes(toml, &[("PRISM_RELAY__OPS__LISTEN", "9090")]);
    for expected in [
        "the configuration has 18 mistakes (configuration file: FILE):",
        "http.listen: \"nowhere\" is not an IP address with a port, such as 127.0.0.1:8080 (set in FILE)",
        "http.path: \"webhooks\" is not a path such as /webhooks/prism",
        "http.body_bytes_max: \"much\" is not a size such as 64KiB or 1GiB",
        "http.body_timeot: unknown key; did you mean http.body_timeout?",
        "http.allowed_sources: \"10.0.0.0/99\" is neither an IP address nor a CIDR",
        "spool.durability: \"maybe\" is not one of disk, process",
        "spool.max_bytes: \"0\" is not between",
        "broker.urls: names no broker",
        "broker.window: \"0\" is not a whole number between 1 and 65535",
        "broker.heartbeat: is not a whole number of seconds, as AMQP requires",
        "broker.reconnect_max: is below broker.reconnect_min",
        "topology.queues[0].name: \"prism.dead\" is a name that the relay uses for its own queues",
        "topology.queues[1].bindings: takes a list of at least one topic pattern",
        "topology.queues[1].binding: unknown key",
        "ops.listen: \"9090\" is not an IP address with a port, such as 127.0.0.1:8080 (set in the environment)",
        "log.filter: \"a=b=c\" has the word \"b=c\", which is not a level",
        "shutdown.grace: \"5\" is not a duration such as 500ms, 10s or 2m",
        "sigature.required: unknown key; did you mean signature.required?",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in:\n{text}");
    }
}

#[test]
fn a_value_of_the_wrong_shape_is_named() {
    let text = mistakes("http = 3\n[spool]\npath = [\"a\"]\n[ops.listen]\nport = 1\n", &[]);
    assert!(text.contains("http: is a section, [http], not a value"), "{text}");
    assert!(text.contains("spool.path: takes a single value, not a list"), "{text}");
    assert!(text.contains("ops.listen.port: unknown key"), "{text}");
    let text = mistakes("", &[("PRISM_RELAY__TOPOLOGY__QUEUES", "prism.scan")]);
    assert!(text.contains("topology.queues: takes a list of tables"), "{text}");
}

#[test]
fn no_mistake_quotes_a_secret() {
    let hush = "hunter2";
    let texts = [
        mistakes("[broker]\nurls = [\"http://me:hunter2@broker\"]", &[]),
        mistakes("[signature]\nsecrets = [[\"hunter2\"]]", &[]),
        mistakes("[signature]\nsecrets = [\"hunter2]\n", &[]),
        mistakes("[signature]\nsecret = \"hunter2\"", &[]),
        mistakes("", &[("PRISM_RELAY__BROKER__PASSWRD", hush)]),
    ];
    for text in texts {
        assert!(!text.contains(hush), "{text}");
    }
    let config =
        load("[signature]\nsecrets = [\"hunter2_0123456789\"]\n[broker]\npassword = \"hunter2\"", &[], Purpose::Serve)
            .unwrap();
    assert!(!format!("{config:?}").contains(hush));
}

#[test]
fn the_password_of_a_url_is_hidden_with_any_comma_in_it() {
    let shown = |file: Option<&Path>, environment: Vec<(String, String)>| {
        let mut raw = Raw::merge(file, environment).unwrap();
        raw.urls("broker.urls", |_| Ok(()));
        raw.settings().into_iter().find(|setting| setting.key == "broker.urls").unwrap().value
    };
    for password in ["x,y", ",x", "x,", "a@b,c"] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write!(file, "[broker]\nurls = [\"amqp://me:{password}@one/v\", \"amqp://me:pw@two/v\"]").unwrap();
        let urls = shown(Some(file.path()), Vec::new()).into_array().unwrap();
        let urls: Vec<_> = urls.into_iter().map(|url| url.into_string().unwrap()).collect();
        assert_eq!(urls, ["amqp://me:***@one/v", "amqp://me:***@two/v"], "{password}");
    }
    let variable = ("PRISM_RELAY__BROKER__URLS".to_owned(), "amqp://me:x@one,amqp://me:y@two".to_owned());
    let urls = shown(None, vec![variable]).into_string().unwrap();
    assert_eq!(urls, "amqp://me:***@one,amqp://me:***@two");
}

#[test]
fn a_secret_in_place_of_a_path_is_not_quoted() {
    for (variable, secret, expected) in [
        ("SIGNATURE__SECRETS_FILE", "whsec_hunter2", "signature.secrets_file: the value is not the path of a file; a"),
        ("SIGNATURE__SECRETS_FILE", "hunter2/+x=", "a secret itself goes into signature.secrets (set in the env"),
        ("SIGNATURE__SECRETS_FILE", "\"hunter2\"", "signature.secrets_file: the value is in quotation marks"),
        ("BROKER__PASSWORD_FILE", "/hunter2", "a secret itself goes into broker.password (set in the environment)"),
        ("OPS__TOKEN_FILE", "hunter2", "a secret itself goes into ops.token (set in the environment)"),
        (
            "HTTP__TLS__PRIVATE_KEY",
            "-----BEGIN X-----\nhunter2",
            "http.tls.private_key: the value is a PEM text; write",
        ),
    ] {
        let text = mistakes("", &[(&format!("PRISM_RELAY__{variable}"), secret)]);
        assert!(text.contains(expected) && !text.contains("hunter2"), "{expected:?} is missing in:\n{text}");
    }
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("absent");
    let text = mistakes("", &[("PRISM_RELAY__OPS__TOKEN_FILE", path.to_str().unwrap())]);
    assert!(text.contains(&format!("ops.token_file: {path:?} cannot be read: No such file")), "{text}");
}

#[test]
fn a_pipe_in_place_of_a_file_with_a_secret_is_not_waited_for() {
    let text = mistakes("[ops]\ntoken_file = \"/dev/zero\"", &[]);
    assert!(text.contains("ops.token_file: \"/dev/zero\" is a pipe, a socket or a device, not a file"), "{text}");
}

#[test]
fn a_name_without_a_key_is_told() {
    let text = mistakes("", &[("PRISM_RELAY__", "x")]);
    assert!(text.contains("\"\": is not a key: a name is missing, such as in PRISM_RELAY__"), "{text}");
}

#[test]
fn a_secret_that_looks_like_more_than_one_is_noted() {
    let notes = |lines: &str| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), lines).unwrap();
        let toml = format!("[signature]\nsecrets_file = \"{}\"", file.path().display());
        load(&toml, &[], Purpose::Serve).unwrap().notes
    };
    for slip in ["SIGNATURE_SECRET=whsec_1", "whsec_0123456789,whsec_a", "{\"secret\":\"whsec_0123\"}"] {
        let [note] = &notes(&format!("whsec_0123456789\n{slip}\n"))[..] else { panic!("one note for {slip}") };
        assert_eq!(note.key, "signature.secrets_file");
        assert!(note.text.starts_with("secret 2 contains `=`, `,` or `{`"), "{note:?}");
    }
    assert_eq!(notes("whsec_0123456789\nMDEyMzQ1Njc4OWFiY2RlZg==\n"), []);
}

#[test]
fn broken_or_missing_files_are_told_with_their_place() {
    let text = mistakes("[http]\nlisten = \n", &[]);
    assert!(text.contains("line 2") && text.contains("FILE"), "{text}");
    let text = Config::load(Some(Path::new("/nowhere/relay.toml")), [], Purpose::Client).unwrap_err().to_string();
    assert!(text.contains("cannot read /nowhere/relay.toml: No such file"), "{text}");
}

#[test]
fn a_value_and_its_file_twin_exclude_each_other() {
    let secrets = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secrets.path(), "hunter2_0123456789").unwrap();
    let path = secrets.path().to_str().unwrap();
    let toml = format!(
        "[signature]\nsecrets = [\"0123456789abcdef\"]\nsecrets_file = \"{path}\"\n\
         [broker]\npassword = \"b\"\npassword_file = \"{path}\""
    );
    let text = mistakes(&toml, &[]);
    assert!(text.contains("signature.secrets_file: is set together with signature.secrets"), "{text}");
    assert!(text.contains("broker.password_file: is set together with broker.password"), "{text}");
}

#[test]
fn files_with_secrets_that_cannot_be_used_are_told_without_what_is_in_them() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (path, tell) = (file.path().to_str().unwrap(), |content: &[u8]| {
        std::fs::write(file.path(), content).unwrap();
        let key = |name: &str| format!("{name} = \"{}\"\n", file.path().display());
        mistakes(&format!("[signature]\n{}[broker]\n{}", key("secrets_file"), key("password_file")), &[])
    });
    let text = tell(b"\n\n");
    assert!(text.contains(&format!("signature.secrets_file: \"{path}\" holds no secret")), "{text}");
    assert!(text.contains(&format!("broker.password_file: \"{path}\" is empty")), "{text}");
    let text = tell("hunter2\n".repeat(9).as_bytes());
    assert!(text.contains("holds 9 secrets; 8 are allowed") && text.contains("has more than one line"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
    let text = tell(b"hunter2\xff");
    assert!(text.matches("is not UTF-8").count() == 2 && !text.contains("hunter2"), "{text}");
}

#[test]
fn what_belongs_together_in_tls_is_asked_for_together() {
    let text = mistakes("[http]\ntls = { private_key = \"a\" }\n[broker]\ntls = { certificate = \"b\" }", &[]);
    assert!(text.contains("http.tls.certificate: is missing"), "{text}");
    assert!(text.contains("broker.tls.private_key: is missing"), "{text}");
    let text = mistakes("[broker]\ntls = { ca = \"/nowhere/ca.pem\", server_name = \"a b\" }", &[]);
    assert!(text.contains("broker.tls: is set, but no url in broker.urls begins with amqps://"), "{text}");
    assert!(text.contains("broker.tls.server_name: \"a b\" is not a host name"), "{text}");
    let text = mistakes("[broker]\nurls = [\"amqps://broker\"]\ntls = { ca = \"/nowhere/ca.pem\" }", &[]);
    assert!(text.contains("broker.tls: cannot read /nowhere/ca.pem: No such file"), "{text}");
    // Commands other than serve and check may lack the permission to read its key.
    let tls = "[http]\ntls = { certificate = \"/nowhere/a\", private_key = \"/nowhere/b\" }";
    assert!(load(tls, &[], Purpose::Client).is_ok());
    let text = load(tls, &[("PRISM_RELAY__SIGNATURE__SECRETS", "whsec_0123456789")], Purpose::Serve).unwrap_err();
    assert!(text.contains("http.tls: cannot read /nowhere/a: No such file"), "{text}");
}

#[test]
fn only_the_relay_itself_needs_a_secret() {
    assert!(load("", &[], Purpose::Client).is_ok());
    assert!(load("", &[], Purpose::Serve).unwrap_err().contains("signature.secrets: is empty"));
    assert!(load("[signature]\nrequired = false", &[], Purpose::Serve).is_ok());
}

#[test]
fn queues_and_the_archive_are_read_and_bounded() {
    let toml = r##"
        [topology]
        queues = [
          { name = "q", bindings = ["a.#"], delivery_limit = 3, retry_delays = "1s,2m", partitions = 4, ttl = "1h" },
          { name = "r", bindings = "b.#,c.*", single_active_consumer = true, max_length = 10 },
        ]
        archive = { max_age = "7d" }
    "##;
    let topology =
        load(toml, &[("PRISM_RELAY__SIGNATURE__SECRETS", "whsec_0123456789")], Purpose::Serve).unwrap().topology;
    let [q, r] = &topology.queues[..] else { panic!("{topology:?}") };
    assert_eq!((q.delivery_limit, q.partitions, q.ttl), (3, Some(4), Some(HOUR)));
    assert_eq!(q.retry_delays, [SECOND, 120 * SECOND]);
    assert_eq!((r.delivery_limit, r.max_length, r.single_active_consumer), (20, Some(10), true));
    assert_eq!(r.bindings, ["b.#", "c.*"]);
    assert_eq!(topology.archive.unwrap().name, "prism.archive");

    let text = mistakes(
        r##"[topology]
        queues = [
          { name = "q", bindings = ["#"], partitions = 1, retry_delays = ["soon"], delivery_limit = 0, tttl = "1h" },
          { name = "a", bindings = ["#"] },
          { name = "a", bindings = ["#"] },
          { name = "prism.events", bindings = ["#"], retry_delays = ["1s"] },
          { bindings = ["#"] },
        ]
        archive = { name = "everything" }"##,
        &[],
    );
    for expected in [
        "topology.queues[0].partitions: \"1\" is not a whole number between 2 and 256",
        "topology.queues[0].retry_delays: \"soon\" is not a duration",
        "topology.queues[0].delivery_limit: \"0\" is not a whole number between 1 and 1000000",
        "topology.queues[0].tttl: unknown key; did you mean topology.queues[0].ttl?",
        "topology: two entities have the same name: queue a",
        "topology: two entities have the same name: exchange prism.events",
        "topology.queues[4].name: is missing",
        "topology.archive.max_age: is missing",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in:\n{text}");
    }
}

#[test]
fn a_login_in_the_address_of_the_management_api_is_not_quoted() {
    let text = mistakes("[broker]\nmanagement_url = \"http://admin:hunter2@rabbit:15672\"", &[]);
    assert!(text.contains("broker.management_url: the value contains a login") && !text.contains("hunter2"), "{text}");
}

#[test]
fn an_endpoint_for_traces_needs_a_build_that_can_export_them() {
    let loaded = load("[traces]\nendpoint = \"http://127.0.0.1:4318\"", &[], Purpose::Client);
    if cfg!(feature = "otlp") {
        assert!(loaded.unwrap().traces.endpoint.is_some());
    } else {
        let mistake = loaded.unwrap_err();
        assert!(mistake.contains("traces.endpoint: the value needs a build with traces"), "{mistake}");
    }
}

#[test]
fn secrets_go_through_one_door_from_the_file_and_from_the_environment() {
    let toml = |value: &str| format!("[signature]\nsecrets = {value}");
    let variable = |value: &str| mistakes("", &[("PRISM_RELAY__SIGNATURE__SECRETS", value)]);
    for (text, expected) in [
        (mistakes(&toml("[\" \"]"), &[]), "signature.secrets: secret 1 has only blanks (set in FILE)"),
        (mistakes(&toml("[\"whsec_0123456789\", \"whsec_0123456789\"]"), &[]), "secret 2 is the same as secret 1"),
        (
            mistakes(&toml("[\"whsec_0123456789\", \"# a comment in November\", \"'whsec_9876543210'\"]"), &[]),
            "secret 3",
        ),
        (variable("whsec_0123456789,1"), "secret 2 is shorter than 16 characters (set in the environment)"),
        (variable("whsec_0123456789 "), "secret 1 begins or ends with a blank (set in the environment)"),
        (variable("\"whsec_0123456789\""), "signature.secrets: the value is in quotation marks; remove them"),
        (variable("\"whsec_0123456789,whsec_9876543210\""), "secret 1 begins or ends with a quotation mark"),
        (mistakes("[ops]\ntoken = \"0123456789abcdef \"", &[]), "ops.token: the value begins or ends with a blank"),
        (mistakes("[broker]\npassword = \" hunter2\"", &[]), "broker.password: the value begins or ends with a blank"),
        (mistakes("[broker]\nurls = [\"amqp://me:hunter2%0A@b/v\"]", &[]), "in its password, such as %0A"),
        (mistakes("", &[("PRISM_RELAY__BROKER__URLS", "amqp://me:12,hunter2@b/v")]), "has a raw `,` in the user"),
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in:\n{text}");
        assert!(!text.contains("whsec_") && !text.contains("hunter2"), "{text}");
    }
    let ok = |value: &str| load("", &[("PRISM_RELAY__SIGNATURE__SECRETS", value)], Purpose::Serve).unwrap().signature;
    for value in ["\u{feff}whsec_0123456789\r\n", "whsec_0123456789 , whsec_9876543210", "whsec_0123456789,"] {
        assert_eq!(ok(value).secrets[0].expose(), "whsec_0123456789", "{value:?}");
    }
    // The default login, and a short password.
    let config = load("[broker]\npassword = \"pw\\n\"", &[], Purpose::Client).unwrap();
    assert_eq!(config.broker.urls[0].expose().authority.userinfo.password, "pw");
}

#[test]
fn the_path_of_webhooks_is_what_stands_in_a_request() {
    let path =
        |text: &str| load("", &[("PRISM_RELAY__HTTP__PATH", text)], Purpose::Client).map(|config| config.http.path);
    for (text, expected) in [
        ("/webhooks/prism\n", "/webhooks/prism"),
        ("/a-b_c.d~e/%C3%BC/!$&'()*+,;=:@|[]", "/a-b_c.d~e/%C3%BC/!$&'()*+,;=:@|[]"),
        ("/", "/"),
    ] {
        assert_eq!(path(text).unwrap(), expected);
    }
    for (text, expected) in [
        (
            "/prüfung",
            "contains 'ü', which a client percent-encodes, so no request would match; write it percent-encoded",
        ),
        ("/prüfung", ", as %C3%BC"),
        ("/a b", "contains ' ', which a client percent-encodes"),
        ("/a\nb", "contains '\\n', which a client percent-encodes"),
        ("/webhooks/prism ", "contains ' '"),
        ("/50%", "contains a % that two hex digits do not follow"),
        ("/a/../b", "contains a segment . or .."),
        ("/a?b", "is not a path such as /webhooks/prism"),
        ("https://hooks.example.com/prism", "is not a path such as /webhooks/prism"),
        ("'/prism'", "is in quotation marks; remove them"),
        ("/healthz", "is reserved"),
    ] {
        let text = path(text).unwrap_err();
        assert!(text.contains(expected), "{expected:?} is missing in:\n{text}");
    }
}

#[test]
fn names_with_blanks_at_their_ends_are_mistakes() {
    let toml = "[spool]\npath = \"data/spool.db \"\n[topology]\nqueues = [{ name = \"q \", bindings = [\"#.a.#.#\"] }]";
    let text = mistakes(toml, &[]);
    for expected in [
        "spool.path: \"data/spool.db \" begins or ends with a blank",
        "topology.queues[0].name: \"q \" begins or ends with a blank",
        "topology.queues[0].bindings: \"#.a.#.#\" has 3 words `#`; 2 are allowed",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in:\n{text}");
    }
}

#[test]
fn another_format_and_a_variable_with_one_underscore_are_named() {
    for (file, expected) in [
        ("# ours\nhttp:\n  listen: 0.0.0.0:8080\n", "the file looks like YAML, but the configuration is TOML"),
        ("---\nhttp: {}\n", "the file looks like YAML"),
        ("- http: {}\n", "the file looks like YAML"),
        ("{\n \"http\": {}\n}\n", "the file looks like JSON"),
    ] {
        let text = mistakes(file, &[]);
        assert!(text.contains(expected), "{expected:?} is missing in:\n{text}");
    }
    assert!(!mistakes("[http]\nlisten = \n", &[]).contains("looks like"));
    for name in ["PRISM_RELAY_SIGNATURE_SECRETS", "prism_relay__signature__secrets", "PRISM_RELAY_SIGNATURE__SECRETS"] {
        let text = load("", &[(name, "whsec_0123456789")], Purpose::Serve).unwrap_err();
        let hint = format!("hint: {name} is ignored; write PRISM_RELAY__SIGNATURE__SECRETS");
        assert!(text.contains("signature.secrets: is empty") && text.contains(&hint), "{text}");
        assert!(!text.contains("whsec_"), "{text}");
    }
    // What Kubernetes sets for a service of this name.
    let config = load("", &[("PRISM_RELAY_PORT", "tcp://10.0.0.1:80")], Purpose::Client).unwrap();
    assert_eq!(config.notes, []);
}

#[test]
fn what_may_not_be_meant_is_noted() {
    let toml = "[signature]\nrequired = false\n[spool]\ndurability = \"process\"\n[dedupe]\nwindow = \"0s\"\n\
                [topology]\nqueues = [{ name = \"q\", bindings = [\"scan.*\", \"scan.#\"] }]";
    let notes = load(toml, &[], Purpose::Serve).unwrap().notes;
    let keys: Vec<_> = notes.iter().map(|note| note.key.as_str()).collect();
    let expected =
        ["signature.required", "signature.secrets", "spool.durability", "dedupe.window", "topology.queues[0].bindings"];
    assert_eq!(keys, expected, "{notes:?}");
    assert_eq!(load("", &[], Purpose::Client).unwrap().notes, []);
}
