//! Spans on their way to a collector, by OTLP over HTTP.
//!
//! Everything is set by OpenTelemetry's own variables, as its SDK reads them. There is an export if
//! `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is set; without one nothing is traced. What they
//! ask for and is not built in is refused at the start.
//!
//! Spans wait in the SDK's queue (`OTEL_BSP_MAX_QUEUE_SIZE`, 2,048) for its thread, which sends up to 512 of them together,
//! every five seconds or sooner; what finds the queue full is dropped. A collector that cannot be reached costs that, and a
//! line in the log a minute.

use std::env;
use std::error::Error;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use opentelemetry::global;
use opentelemetry_http::HttpError;
use opentelemetry_otlp::{SpanExporter, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::{Handle, Runtime};
use tokio::time::{Instant, timeout};

use crate::gateway::http_client::{HttpClient, http_client};
use crate::gateway::serve::ServeError;
use crate::gateway::worker::traced::Traced;
use crate::platform::adapter::MessageHandler;
use crate::traces;

/// The name of this service, if none is set.
const SERVICE: &str = "tabcast";
/// How long an export may take, as OTLP has it, if nothing is set.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// The most of a collector's answer that is read.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// What cannot be exported is told so often.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// The samplers that there are, by their names in `OTEL_TRACES_SAMPLER`.
const SAMPLERS: [&str; 4] = ["always_on", "always_off", "parentbased_always_on", "parentbased_always_off"];
/// Those with a ratio, `OTEL_TRACES_SAMPLER_ARG`.
const RATIO_SAMPLERS: [&str; 2] = ["traceidratio", "parentbased_traceidratio"];

/// Why spans cannot be exported as the variables say.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// A variable has a value that cannot be followed.
    #[error("{variable} must be {expected}, or not set")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// What it may be.
        expected: &'static str,
    },
    /// The exporter refused the rest of them, such as an endpoint that is no URL.
    #[error("traces cannot be exported: {0}")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    /// The TLS library refused its own defaults.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// The export of this process's spans, if there is one.
#[derive(Debug)]
pub(super) struct Export(Option<SdkTracerProvider>);

impl Export {
    /// Begins it if a collector is set. Requests run on `control`.
    pub(super) fn begin(control: &Runtime) -> Result<Self, ServeError> {
        if !is_wanted() {
            return Ok(Self(None));
        }
        let provider = provider(control.handle().clone())?;
        global::set_tracer_provider(provider.clone());
        traces::begin();
        tracing::info!("publishes are traced");
        Ok(Self(Some(provider)))
    }

    /// What handles messages, in their traces.
    pub(super) fn of_messages(&self, handler: Arc<dyn MessageHandler>) -> Arc<dyn MessageHandler> {
        if self.0.is_some() { Arc::new(Traced(handler)) } else { handler }
    }

    /// Sends what waits, for as long as `patience` allows. Spans that end later are lost.
    ///
    /// # Cancel safety
    /// Dropped early, it may or may not be sent.
    pub(super) async fn finish(self, patience: Duration) {
        let Some(provider) = self.0 else { return };
        // It waits for the SDK's thread, whose requests need this runtime.
        let finished = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(patience)).await;
        if !matches!(finished, Ok(Ok(()))) {
            tracing::warn!("the last spans may not have reached the collector");
        }
    }
}

/// The value of a variable; an empty one is none.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn is_wanted() -> bool {
    let is_disabled = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let is_none = variable("OTEL_TRACES_EXPORTER").is_some_and(|value| value == "none");
    let endpoints = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
    !is_disabled && !is_none && endpoints.iter().any(|name| variable(name).is_some())
}

fn provider(runtime: Handle) -> Result<SdkTracerProvider, ExportError> {
    check(variable)?;
    let client = Collector {
        client: http_client(EXPORT_TIMEOUT, 1)?,
        runtime,
        timeout: export_timeout(),
        told: Mutex::default(),
    };
    let exporter = SpanExporter::builder().with_http().with_http_client(client).build()?;
    let version = opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_attribute(version);
    let is_named = variable("OTEL_SERVICE_NAME").is_some()
        || variable("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|list| list.contains("service.name="));
    let resource = if is_named { resource } else { resource.with_service_name(SERVICE) };
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build())
}

/// The SDK would go on with a default.
fn check(variable: impl Fn(&str) -> Option<String>) -> Result<(), ExportError> {
    let refused = |variable, expected| Err(ExportError::Variable { variable, expected });
    for name in ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"] {
        if variable(name).is_some_and(|protocol| protocol != "http/protobuf") {
            return refused(name, "http/protobuf");
        }
    }
    let sampler = variable("OTEL_TRACES_SAMPLER");
    let is_ratio = sampler.as_deref().is_some_and(|name| RATIO_SAMPLERS.contains(&name));
    if sampler.is_some_and(|name| !is_ratio && !SAMPLERS.contains(&name.as_str())) {
        let expected = "always_on, always_off, traceidratio, parentbased_always_on, parentbased_always_off, or \
                        parentbased_traceidratio";
        return refused("OTEL_TRACES_SAMPLER", expected);
    }
    let ratio = variable("OTEL_TRACES_SAMPLER_ARG").and_then(|ratio| ratio.parse::<f64>().ok());
    if is_ratio && !ratio.is_some_and(|ratio| (0.0..=1.0).contains(&ratio)) {
        return Err(ExportError::Variable {
            variable: "OTEL_TRACES_SAMPLER_ARG",
            expected: "a number from 0 to 1 with this sampler",
        });
    }
    Ok(())
}

fn export_timeout() -> Duration {
    let names = ["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"];
    let millis = names.iter().find_map(|name| variable(name)?.parse().ok());
    millis.map_or(EXPORT_TIMEOUT, Duration::from_millis)
}

/// The way to the collector. The SDK's thread waits for requests that run on our runtime.
struct Collector {
    client: HttpClient,
    runtime: Handle,
    timeout: Duration,
    /// When it was last told that it cannot be reached.
    told: Mutex<Option<Instant>>,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl Collector {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (client, timeout_after) = (self.client.clone(), self.timeout);
        let exchange = async move {
            let response = client.request(request.map(Full::new)).await?;
            let (parts, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await?;
            Ok::<_, HttpError>(Response::from_parts(parts, body.to_bytes()))
        };
        let exchange = self.runtime.spawn(async move { timeout(timeout_after, exchange).await });
        let result = match exchange.await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err("no answer in time".into()),
            Err(_) => Err("this process ends".into()),
        };
        match &result {
            Ok(response) if response.status().is_success() => {}
            Ok(response) => self.tell(&response.status()),
            Err(error) => self.tell(&Chain(error.as_ref())),
        }
        result
    }

    fn tell(&self, reason: &dyn fmt::Display) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
            *told = Some(Instant::now());
            tracing::warn!(%reason, "spans do not reach the collector");
        }
    }
}

impl opentelemetry_http::HttpClient for Collector {
    fn send_bytes<'life0, 'async_trait>(
        &'life0 self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(self.send(request))
    }
}

/// An error and its causes, in one line.
struct Chain<'e>(&'e dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_followed_is_refused() {
        let checked = |variables: &[(&str, &str)], expected: Option<&str>| {
            let find =
                |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned());
            let refused = check(find).err().map(|error| error.to_string());
            assert_eq!(refused.as_deref().map(|text| text.split(' ').next().unwrap()), expected, "{variables:?}");
        };
        checked(&[], None);
        for sampler in SAMPLERS {
            checked(&[("OTEL_TRACES_SAMPLER", sampler)], None);
        }
        for sampler in RATIO_SAMPLERS {
            checked(&[("OTEL_TRACES_SAMPLER", sampler), ("OTEL_TRACES_SAMPLER_ARG", "0.25")], None);
            for ratio in ["", "x", "-0.1", "1.1", "NaN"] {
                let variables = [("OTEL_TRACES_SAMPLER", sampler), ("OTEL_TRACES_SAMPLER_ARG", ratio)];
                checked(&variables, Some("OTEL_TRACES_SAMPLER_ARG"));
            }
        }
        checked(&[("OTEL_TRACES_SAMPLER", "sometimes")], Some("OTEL_TRACES_SAMPLER"));
        checked(&[("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")], None);
        checked(&[("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")], Some("OTEL_EXPORTER_OTLP_PROTOCOL"));
        checked(&[("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")], Some("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"));
    }
}
