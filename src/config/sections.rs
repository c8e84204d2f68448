//! Reads each section: keys, ranges, and keys that belong together. Mistakes are collected in [`Raw`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;
use ipnet::IpNet;
use jiff::Timestamp;

use super::raw::Raw;
use super::secrets::{
    api_key, api_key_in, is_invisible, listed_secrets, looks_joined, notify_secret, notify_secret_in,
};
use super::secrets::{password, password_in, secrets_in, token, token_in};
use crate::broker::{self, BrokerUrl, SHORT_STRING_BYTES_MAX};
use crate::ingress::{self, HEALTH_PATH};
use crate::logging::{self, Format};
use crate::reconcile::{self, ApiUrl};
use crate::secret::Secret;
use crate::signature;
use crate::spool::{self, Durability, dedupe, subjects};
use crate::text::chain;
use crate::tls::{self, ClientFiles, Identity, ServerFiles};
use crate::topology::{ARCHIVE, ArchiveSpec, DEAD, Declare, Plan, QueueSpec, Spec, UNROUTED};
use crate::topology::{check_pattern, pattern_advice};
use crate::{ops, publisher, traces};

/// What the configuration is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The relay, or a check whether it would run.
    Serve,
    /// Any other command; it works without the secret.
    Client,
}

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
pub(super) const MILLISECOND: Duration = Duration::from_millis(1);

/// The default delivery limit: RabbitMQ 4's own for quorum queues.
const DELIVERY_LIMIT: usize = 20;
/// Maximum time to live of a message, below RabbitMQ's limit of 2^32 milliseconds.
const TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Maximum number of retry delays. Each of them needs a queue.
const RETRIES_MAX: usize = 16;
const PARTITIONS_MAX: usize = 256;
/// Room for the suffixes that the relay appends, such as `.retry.16`.
const SUFFIX_BYTES: usize = 16;

pub(super) fn http(raw: &mut Raw, purpose: Purpose) -> ingress::Settings {
    let body_bytes_max = raw.bytes("http.body_bytes_max", 1..=128 * MIB);
    let buffer_bytes_max = raw.bytes("http.buffer_bytes_max", 1..=MIB * MIB);
    if buffer_bytes_max < body_bytes_max {
        raw.mistake("http.buffer_bytes_max", "is below http.body_bytes_max: the largest allowed body would not fit");
    }
    ingress::Settings {
        listen: raw.read("http.listen", address).unwrap_or(UNSPECIFIED),
        path: raw.read("http.path", webhook_path).unwrap_or_default(),
        body_bytes_max: body_bytes_max as usize,
        buffer_bytes_max: buffer_bytes_max as usize,
        header_timeout: raw.duration("http.header_timeout", MILLISECOND..=HOUR),
        idle_timeout: raw.duration("http.idle_timeout", MILLISECOND..=HOUR),
        body_timeout: raw.duration("http.body_timeout", MILLISECOND..=HOUR),
        connections_max: raw.number("http.connections_max", 1..=1_000_000),
        connections_per_source_max: raw.number("http.connections_per_source_max", 1..=1_000_000),
        headers_max: raw.number("http.headers_max", 1..=1000),
        // hyper allows no less than 8 KiB.
        header_bytes_max: raw.bytes("http.header_bytes_max", 8 * KIB..=MIB) as usize,
        tls: server_files(raw, purpose),
        allowed_sources: raw.list("http.allowed_sources", network),
        trusted_proxies: raw.list("http.trusted_proxies", network),
    }
}

pub(super) fn signature(raw: &mut Raw, purpose: Purpose) -> signature::Settings {
    let required = raw.one_of("signature.required", &[("true", true), ("false", false)]);
    let texts = raw.secrets("signature.secrets");
    let mut secrets = Vec::new();
    if !texts.is_empty() {
        listed_secrets(&texts)
            .map(|listed| secrets = listed)
            .unwrap_or_else(|fault| raw.mistake_in_value("signature.secrets", fault));
    }
    let file = raw.file("signature.secrets_file", secrets_in);
    let secrets_file = file.map(|(path, from_file)| {
        if !texts.is_empty() {
            raw.mistake("signature.secrets_file", "is set together with signature.secrets; set one of them");
        }
        secrets = from_file;
        path
    });
    let is_wrong = ["signature.secrets", "signature.secrets_file"].iter().any(|key| raw.has_mistake(key));
    if required && secrets.is_empty() && !is_wrong && purpose == Purpose::Serve {
        raw.mistake(
            "signature.secrets",
            "is empty, so no webhook could be accepted; set it (or signature.secrets_file) to the secret of the \
             Prism account, or set signature.required to false if the account does not sign",
        );
    }
    if !required {
        raw.note("signature.required", "is false: any client that knows the address can post events");
        if secrets.is_empty() && !is_wrong {
            let text = "is empty: signatures are not checked, not even where they are present";
            raw.note("signature.secrets", text);
        }
    }
    let key = if secrets_file.is_some() { "signature.secrets_file" } else { "signature.secrets" };
    for (position, _) in (1..).zip(&secrets).filter(|(_, secret)| looks_joined(secret)) {
        let text = "contains `=`, `,` or `{`, as a setting, a list or JSON does; only the bare secret is taken";
        raw.note(key, format_args!("secret {position} {text}"));
    }
    signature::Settings {
        required,
        secrets,
        secrets_file,
        tolerance: raw.duration("signature.tolerance", SECOND..=DAY),
    }
}

pub(super) fn spool(raw: &mut Raw, body_bytes_max: u64) -> spool::Settings {
    let durability = raw.one_of("spool.durability", &[("disk", Durability::Disk), ("process", Durability::Process)]);
    if durability == Durability::Process {
        raw.note("spool.durability", "is \"process\": a power loss can take back events that were answered 200");
    }
    spool::Settings {
        path: raw.read("spool.path", path).unwrap_or_default(),
        max_bytes: raw.bytes("spool.max_bytes", 1..=u64::from(u32::MAX) * KIB),
        durability,
        body_bytes_max,
    }
}

pub(super) fn dedupe(raw: &mut Raw) -> dedupe::Settings {
    let window = raw.optional_duration("dedupe.window", Duration::ZERO..=DAY);
    if window.is_some_and(|window| window.is_zero()) {
        let text = "is 0s: a webhook that is sent again, or captured and replayed, is published again";
        raw.note("dedupe.window", text);
    }
    dedupe::Settings {
        window: window.unwrap_or_default(),
        entries_max: raw.number("dedupe.entries_max", 1..=10_000_000),
    }
}

pub(super) fn reconcile(raw: &mut Raw) -> reconcile::Settings {
    let (api_key_file, api_key) = secret_or_file(raw, "reconcile.api_key", api_key, api_key_in);
    let api_url = raw.url("reconcile.api_url", ApiUrl::parse);
    let after = raw.duration("reconcile.after", SECOND..=7 * DAY);
    let rate = |text: &str| match text.parse() {
        Ok(rate) if (0.01..=100.0).contains(&rate) => Ok(rate),
        _ => Err("is not a number of requests per second from 0.01 to 100".to_owned()),
    };
    let keep = raw.duration("reconcile.keep", HOUR..=30 * DAY);
    if keep < after {
        raw.mistake("reconcile.keep", "is below reconcile.after: a subject would be forgotten before it is overdue");
    }
    if api_key.is_some() && api_url.as_ref().is_some_and(|url| !url.is_tls()) {
        raw.note("reconcile.api_url", "begins with http://: its answers are published with prism-verified false");
    }
    reconcile::Settings {
        api_key,
        api_key_file,
        api_url: api_url.unwrap_or_default(),
        after,
        interval: raw.duration("reconcile.interval", SECOND..=HOUR),
        rate: raw.read("reconcile.rate", rate).unwrap_or(1.0),
        subjects: subjects::Settings { max: raw.number("reconcile.subjects_max", 1000..=1_000_000), keep },
    }
}

pub(super) fn broker(raw: &mut Raw) -> (broker::Settings, publisher::Settings) {
    let mut urls = raw.urls("broker.urls", broker_url);
    if urls.is_empty() && !raw.has_mistake("broker.urls") {
        raw.mistake("broker.urls", "names no broker");
    }
    let (password_file, password) = secret_or_file(raw, "broker.password", password, password_in);
    let heartbeat = raw.duration("broker.heartbeat", SECOND..=HOUR);
    if heartbeat.subsec_nanos() != 0 {
        raw.mistake("broker.heartbeat", "is not a whole number of seconds, as AMQP requires");
    }
    let heartbeat_seconds = heartbeat.as_secs() as u16;
    for url in &mut urls {
        if let Some(password) = &password {
            url.set_password(password);
        }
        url.set_heartbeat(heartbeat_seconds);
    }
    let confirm_timeout = raw.duration("broker.confirm_timeout", SECOND..=HOUR);
    if confirm_timeout < heartbeat {
        raw.mistake("broker.confirm_timeout", "is below broker.heartbeat: a slow broker would be treated as dead");
    }
    let reconnect_min = raw.duration("broker.reconnect_min", MILLISECOND..=HOUR);
    let reconnect_max = raw.duration("broker.reconnect_max", MILLISECOND..=HOUR);
    if reconnect_max < reconnect_min {
        raw.mistake("broker.reconnect_max", "is below broker.reconnect_min");
    }
    let (tls, server_name) = client_files(raw, &urls);
    let publisher = publisher::Settings {
        exchange: raw.read("broker.exchange", exchange_name).unwrap_or_default(),
        window: raw.number("broker.window", 1..=65_535),
        confirm_timeout,
        reconnect_min,
        reconnect_max,
        watch_interval: raw.duration("broker.watch_interval", SECOND..=HOUR),
        parked_retry: raw.duration("broker.parked_retry", MILLISECOND..=DAY),
    };
    let broker = broker::Settings {
        urls,
        password_file,
        tls,
        server_name,
        connect_timeout: raw.duration("broker.connect_timeout", MILLISECOND..=HOUR),
        management_url: raw.url("broker.management_url", management_url),
    };
    (broker, publisher)
}

pub(super) fn topology(raw: &mut Raw, exchange: &str) -> Spec {
    let choices = [("active", Declare::Active), ("passive", Declare::Passive), ("off", Declare::Off)];
    let declare = raw.one_of("topology.declare", &choices);
    let queues =
        (0..raw.tables("topology.queues")).map(|index| queue(raw, &format!("topology.queues[{index}]"))).collect();
    let spec = Spec { declare, queues, archive: archive(raw) };
    // Retry steps and partitions get derived names, which may clash with configured ones.
    for clash in Plan::new(&spec, exchange).clashes() {
        raw.mistake("topology", format_args!("two entities have the same name: {clash}"));
    }
    spec
}

fn queue(raw: &mut Raw, key: &str) -> QueueSpec {
    let at = |name: &str| format!("{key}.{name}");
    let queue = QueueSpec {
        name: raw.read(&at("name"), |text| derivable_name(text).map(|()| text.to_owned())).unwrap_or_default(),
        bindings: raw.list(&at("bindings"), |text| match text.len() {
            0..=SHORT_STRING_BYTES_MAX => check_pattern(text).map(|()| text.to_owned()),
            _ => Err("is longer than 255 bytes".to_owned()),
        }),
        delivery_limit: raw.optional_number(&at("delivery_limit"), 1..=1_000_000).unwrap_or(DELIVERY_LIMIT) as u32,
        retry_delays: raw.durations(&at("retry_delays"), MILLISECOND..=TTL_MAX),
        single_active_consumer: raw.flag(&at("single_active_consumer")),
        partitions: raw.optional_number(&at("partitions"), 2..=PARTITIONS_MAX),
        max_length: raw.optional_number(&at("max_length"), 1..=u32::MAX as usize),
        ttl: raw.optional_duration(&at("ttl"), MILLISECOND..=TTL_MAX),
    };
    if queue.name.is_empty() && !raw.has_mistake(&at("name")) {
        raw.mistake(&at("name"), "is missing");
    }
    if queue.bindings.is_empty() && !raw.has_mistake(&at("bindings")) {
        raw.mistake(&at("bindings"), "takes a list of at least one topic pattern, such as [\"scan.#\"]");
    }
    for binding in &queue.bindings {
        if let Some(advice) = pattern_advice(binding) {
            raw.note(&at("bindings"), format_args!("{binding:?} {advice}"));
        }
    }
    if queue.retry_delays.len() > RETRIES_MAX {
        raw.mistake(&at("retry_delays"), format_args!("has more than {RETRIES_MAX} steps"));
    }
    queue
}

fn archive(raw: &mut Raw) -> Option<ArchiveSpec> {
    let name = raw.read("topology.archive.name", |text| own_name(text).map(|()| text.to_owned()));
    let max_age = raw.optional_duration("topology.archive.max_age", SECOND..=10_000 * DAY);
    let max_bytes = raw.optional_bytes("topology.archive.max_bytes", MIB..=MIB * MIB);
    if max_age.is_none() && (name.is_some() || max_bytes.is_some()) && !raw.has_mistake("topology.archive.max_age") {
        raw.mistake("topology.archive.max_age", "is missing: set how long events are kept, such as \"30d\"");
    }
    Some(ArchiveSpec { name: name.unwrap_or_else(|| ARCHIVE.to_owned()), max_age: max_age?, max_bytes })
}

pub(super) fn ops(raw: &mut Raw) -> ops::Settings {
    let (token_file, token) = secret_or_file(raw, "ops.token", token, token_in);
    ops::Settings { listen: raw.read("ops.listen", address).unwrap_or(UNSPECIFIED), token, token_file }
}

pub(super) fn notify(raw: &mut Raw) -> ops::NotifySettings {
    let target = raw.secret_url("notify.url", ops::Target::parse);
    let (secret_file, secret) = secret_or_file(raw, "notify.secret", notify_secret, notify_secret_in);
    if secret.is_some() && target.is_none() && !raw.has_mistake("notify.url") {
        raw.note("notify.secret", "has no effect: notify.url is not set, so no notice is sent");
    }
    ops::NotifySettings { target, secret, secret_file }
}

/// Reads a secret from `key`, or from the file that its twin names.
fn secret_or_file(
    raw: &mut Raw,
    key: &str,
    in_text: impl Fn(&str) -> Result<Secret, String>,
    in_file: impl Fn(&str) -> Result<Secret, String>,
) -> (Option<PathBuf>, Option<Secret>) {
    let (twin, secret) = (format!("{key}_file"), raw.secret(key, in_text));
    let Some((path, from_file)) = raw.file(&twin, in_file) else { return (None, secret) };
    if secret.is_some() {
        raw.mistake(&twin, format_args!("is set together with {key}; set one of them"));
    }
    (Some(path), Some(from_file))
}

pub(super) fn log(raw: &mut Raw) -> logging::Settings {
    let formats = [("auto", Format::Auto), ("pretty", Format::Pretty), ("json", Format::Json)];
    logging::Settings {
        format: raw.one_of("log.format", &formats),
        filter: raw.read("log.filter", str::parse).unwrap_or_default(),
    }
}

/// The mistake of an endpoint in a build that cannot export traces.
const WITHOUT_TRACES: &str =
    "needs a build with traces: use the Debian package or the container image, or build with `--features otlp`";

pub(super) fn traces(raw: &mut Raw) -> traces::Settings {
    let endpoint = |text: &str| {
        match text.parse::<Uri>() {
            _ if cfg!(not(feature = "otlp")) => Err(WITHOUT_TRACES.to_owned()),
            // Errors of the exporter quote the address.
            Ok(uri) if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) => {
                Err("contains a login; set the collector's headers in OTEL_EXPORTER_OTLP_HEADERS".to_owned())
            }
            Ok(uri) if matches!(uri.scheme_str(), Some("http" | "https")) && uri.query().is_none() => Ok(uri),
            _ => Err("is not the address of a collector, such as http://127.0.0.1:4318".to_owned()),
        }
    };
    let ratio = |text: &str| match text.parse() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err("is not a number from 0 to 1".to_owned()),
    };
    traces::Settings {
        endpoint: raw.url("traces.endpoint", endpoint),
        sample_ratio: raw.read("traces.sample_ratio", ratio).unwrap_or_default(),
    }
}

/// Loads the files once, so that an unusable file is one of the mistakes. Commands other than `serve` and `check` do
/// not need them, and may lack the permission to read them.
fn server_files(raw: &mut Raw, purpose: Purpose) -> Option<ServerFiles> {
    let certificate = raw.read("http.tls.certificate", path);
    let private_key = raw.secret_path("http.tls.private_key", path);
    let client_ca = raw.read("http.tls.client_ca", path);
    let files = match (certificate, private_key) {
        (Some(certificate), Some(private_key)) => ServerFiles { certificate, private_key, client_ca },
        (None, None) if client_ca.is_none() => return None,
        (None, _) => return missing(raw, "http.tls.certificate"),
        (_, None) => return missing(raw, "http.tls.private_key"),
    };
    if purpose == Purpose::Serve {
        match files.load(Timestamp::now()) {
            Err(error) => raw.mistake("http.tls", chain(&error)),
            Ok(Identity { unknown_issuer: Some(issuer), .. }) => raw.note(
                "http.tls.certificate",
                format_args!(
                    "ends with an unknown issuer, {issuer}, whose certificate neither the file nor this system has: \
                     clients that know only the root fail if an intermediate certificate is missing"
                ),
            ),
            Ok(_) => {}
        }
    }
    Some(files)
}

fn client_files(raw: &mut Raw, urls: &[BrokerUrl]) -> (ClientFiles, Option<String>) {
    let ca = raw.read("broker.tls.ca", path);
    let certificate = raw.read("broker.tls.certificate", path);
    let private_key = raw.secret_path("broker.tls.private_key", path);
    let name = |text: &str| tls::server_name(text).map(|_| text.to_owned()).ok_or("is not a host name".to_owned());
    let server_name = raw.read("broker.tls.server_name", name);
    let identity = match (certificate, private_key) {
        (Some(certificate), Some(private_key)) => Some((certificate, private_key)),
        (None, None) => None,
        (None, Some(_)) => missing(raw, "broker.tls.certificate"),
        (Some(_), None) => missing(raw, "broker.tls.private_key"),
    };
    let external = urls.iter().find(|url| url.logs_in_by_certificate());
    if external.is_some_and(|url| identity.is_none() || !url.uses_tls()) {
        raw.mistake("broker.urls", "auth_mechanism=external needs an amqps url and broker.tls.certificate");
    }
    let files = ClientFiles { ca, identity };
    if urls.iter().any(BrokerUrl::uses_tls) {
        if let Err(error) = files.load() {
            raw.mistake("broker.tls", chain(&error));
        }
    } else if !files.paths().is_empty() || server_name.is_some() {
        raw.mistake("broker.tls", "is set, but no url in broker.urls begins with amqps://");
    }
    (files, server_name)
}

fn missing<T>(raw: &mut Raw, key: &str) -> Option<T> {
    raw.mistake(key, "is missing: set both certificate and private key");
    None
}

fn management_url(text: &str) -> Result<Uri, String> {
    match text.parse::<Uri>() {
        Ok(uri) if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) => {
            Err("contains a login; the relay uses the login of broker.urls".to_owned())
        }
        Ok(uri) if matches!(uri.scheme_str(), Some("http" | "https")) && uri.query().is_none() => Ok(uri),
        _ => Err("is not the address of the management API, such as http://127.0.0.1:15672".to_owned()),
    }
}

fn broker_url(text: &str) -> Result<BrokerUrl, String> {
    let url = BrokerUrl::parse(text)?;
    // A password that was encoded together with its line end has `%0A`.
    match url.expose().authority.userinfo.password.contains(is_invisible) {
        true => Err("contains a control character or an invisible character in its password, such as %0A".to_owned()),
        false => Ok(url),
    }
}

/// Reads the path of a file. Blanks at the ends would silently name another file.
fn path(text: &str) -> Result<PathBuf, String> {
    match text {
        "" => Err("is empty".to_owned()),
        text if text.contains("-----BEGIN") => Err("is a PEM text; write it into a file, and set its path".to_owned()),
        text if text.trim() != text => Err("begins or ends with a blank".to_owned()),
        text => Ok(PathBuf::from(text)),
    }
}

/// Placeholder for an address that could not be read. It is never used, because the mistake is in the list.
const UNSPECIFIED: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "is not an IP address with a port, such as 127.0.0.1:8080".to_owned())
}

/// Reads a network, or a single address as a network of one.
fn network(text: &str) -> Result<IpNet, String> {
    let network = text.parse().or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from));
    network.map(unmapped).map_err(|_| "is neither an IP address nor a CIDR such as 203.0.113.0/24".to_owned())
}

/// Converts IPv4 networks in IPv6 notation (RFC 4291, section 2.5.5.2) to IPv4, as is done for addresses.
fn unmapped(network: IpNet) -> IpNet {
    let IpNet::V6(mapped) = network else { return network };
    let (address, bits) = (mapped.addr().to_ipv4_mapped(), mapped.prefix_len().checked_sub(96));
    address.zip(bits).and_then(|(address, bits)| IpNet::new(address.into(), bits).ok()).unwrap_or(network)
}

/// Reads the path of webhooks. It must be written as it stands in the request line (RFC 3986, section 3.3), or no
/// request would match it.
fn webhook_path(text: &str) -> Result<String, String> {
    if !text.starts_with('/') || text.contains(['?', '#']) {
        return Err("is not a path such as /webhooks/prism".to_owned());
    }
    if text == HEALTH_PATH {
        return Err("is reserved: load balancers ask for the relay's health there".to_owned());
    }
    if let Some(c) = text.chars().find(|c| !c.is_ascii_alphanumeric() && !"/-._~!$&'()*+,;=:@%|[]".contains(*c)) {
        let encoded: String = c.to_string().bytes().map(|byte| format!("%{byte:02X}")).collect();
        return Err(format!(
            "contains {c:?}, which a client percent-encodes, so no request would match; write it percent-encoded, as \
             {encoded}"
        ));
    }
    let is_escape = |rest: &str| rest.len() >= 2 && rest.bytes().take(2).all(|byte| byte.is_ascii_hexdigit());
    if !text.split('%').skip(1).all(is_escape) {
        return Err("contains a % that two hex digits do not follow; write %25 for the character itself".to_owned());
    }
    if text.split('/').any(|segment| segment == "." || segment == "..") {
        return Err("contains a segment . or .., which clients remove, so no request would match".to_owned());
    }
    Ok(text.to_owned())
}

fn exchange_name(text: &str) -> Result<String, String> {
    own_name(text).map(|()| text.to_owned())
}

/// Checks a name from which the relay derives others.
fn derivable_name(name: &str) -> Result<(), String> {
    own_name(name)?;
    if name.len() + SUFFIX_BYTES > SHORT_STRING_BYTES_MAX {
        return Err(format!("is longer than {} bytes", SHORT_STRING_BYTES_MAX - SUFFIX_BYTES));
    }
    Ok(())
}

/// Checks the name of an exchange or a queue: neither reserved by RabbitMQ nor one of the relay's fixed names.
fn own_name(name: &str) -> Result<(), String> {
    match name {
        "" => Err("is empty".to_owned()),
        _ if name.trim() != name => Err("begins or ends with a blank".to_owned()),
        _ if name.len() > SHORT_STRING_BYTES_MAX => Err("is longer than 255 bytes".to_owned()),
        _ if name.starts_with("amq.") => Err("begins with amq., which RabbitMQ reserves".to_owned()),
        DEAD | UNROUTED => Err("is a name that the relay uses for its own queues".to_owned()),
        _ => Ok(()),
    }
}
