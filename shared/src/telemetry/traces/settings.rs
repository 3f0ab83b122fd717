//! Which collector, by the variables that OpenTelemetry's specification names.
//!
//! Read here is what decides whether and where traces are exported, so that a mistake is one clear
//! line; the SDK reads the rest (headers, resource, sampler, limits) itself.

use std::{path::PathBuf, time::Duration};

use url::Url;

/// Longest export when no variable says otherwise, as the specification has it.
const DEADLINE: Duration = Duration::from_secs(10);

/// Longest wait of a span for others when no variable says otherwise, by the same.
const DELAY: Duration = Duration::from_secs(5);

/// Where traces go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OtlpSettings {
    /// The collector's URL for traces.
    pub(super) endpoint: Url,
    /// Longest time of one export.
    pub(super) deadline: Duration,
    /// How long a span may wait until others fill its batch.
    pub(super) delay: Duration,
    /// More CA certificates to trust.
    pub(super) ca: Option<PathBuf>,
}

/// A variable that cannot be followed. Values are left out: a URL may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable} {what}")]
pub(super) struct OtlpFault {
    variable: String,
    what: &'static str,
}

impl OtlpSettings {
    /// None when traces are off.
    ///
    /// # Errors
    /// When a variable asks for something that we cannot do.
    pub(super) fn read(
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, OtlpFault> {
        let is = |name: &str, value: &str| {
            variable(name).is_some_and(|it| it.trim().eq_ignore_ascii_case(value))
        };
        if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
            return Ok(None);
        }
        // The one for traces goes before the one for all that OTLP exports.
        let of_traces = |what: &str| {
            [
                format!("OTEL_EXPORTER_OTLP_TRACES_{what}"),
                format!("OTEL_EXPORTER_OTLP_{what}"),
            ]
            .into_iter()
            .find_map(|name| variable(&name).map(|value| (name, value)))
        };
        let Some((name, endpoint)) = of_traces("ENDPOINT") else {
            return Ok(None);
        };
        let endpoint = url(name, &endpoint)?;
        if let Some(exporter) = variable("OTEL_TRACES_EXPORTER")
            && exporter.trim() != "otlp"
        {
            return Err(fault(
                "OTEL_TRACES_EXPORTER",
                "names another exporter than otlp",
            ));
        }
        if let Some((name, protocol)) = of_traces("PROTOCOL")
            && protocol.trim() != "http/protobuf"
        {
            return Err(fault(
                name,
                "is not http/protobuf, which alone is spoken here",
            ));
        }
        let deadline = of_traces("TIMEOUT").map(milliseconds).transpose()?;
        let delay = "OTEL_BSP_SCHEDULE_DELAY";
        let delay = variable(delay).map(|value| milliseconds((delay.to_owned(), value)));
        check_sampler(&variable)?;
        Ok(Some(Self {
            endpoint,
            deadline: deadline.unwrap_or(DEADLINE),
            delay: delay.transpose()?.unwrap_or(DELAY),
            ca: of_traces("CERTIFICATE").map(|(_, path)| path.into()),
        }))
    }
}

fn milliseconds((name, text): (String, String)) -> Result<Duration, OtlpFault> {
    match text.trim().parse() {
        Ok(milliseconds @ 1..) => Ok(Duration::from_millis(milliseconds)),
        _ => Err(fault(name, "is not a number of milliseconds")),
    }
}

/// What the SDK cannot read it takes for "everything", which may be costly.
fn check_sampler(variable: &impl Fn(&str) -> Option<String>) -> Result<(), OtlpFault> {
    match variable("OTEL_TRACES_SAMPLER").as_deref() {
        None
        | Some("always_on" | "always_off" | "parentbased_always_on" | "parentbased_always_off") => {
            Ok(())
        }
        Some("traceidratio" | "parentbased_traceidratio") => {
            let share = variable("OTEL_TRACES_SAMPLER_ARG").map(|it| it.parse::<f64>());
            match share {
                Some(Ok(0.0..=1.0)) => Ok(()),
                _ => Err(fault(
                    "OTEL_TRACES_SAMPLER_ARG",
                    "is not a share from 0 to 1, which OTEL_TRACES_SAMPLER asks for",
                )),
            }
        }
        Some(_) => Err(fault(
            "OTEL_TRACES_SAMPLER",
            "is none of always_on, always_off, traceidratio and their parentbased_ forms",
        )),
    }
}

fn url(name: String, text: &str) -> Result<Url, OtlpFault> {
    let url = Url::parse(text.trim()).ok();
    let url = url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let Some(url) = url else {
        let what = "is not a URL such as http://collector.example:4318";
        return Err(fault(name, what));
    };
    if !url.username().is_empty() || url.password().is_some() {
        let what = "has a user or a password in it; OTEL_EXPORTER_OTLP_HEADERS is for these";
        return Err(fault(name, what));
    }
    Ok(url)
}

fn fault(variable: impl Into<String>, what: &'static str) -> OtlpFault {
    OtlpFault {
        variable: variable.into(),
        what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<OtlpSettings>, String> {
        OtlpSettings::read(|name| {
            let found = variables.iter().find(|(it, _)| *it == name);
            found.map(|(_, value)| (*value).to_owned())
        })
        .map_err(|fault| fault.to_string())
    }

    const ENDPOINT: (&str, &str) = (
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "http://collector.example:4318",
    );

    #[test]
    fn traces_are_off_unless_a_collector_is_named() {
        assert_eq!(read(&[]), Ok(None));
        assert_eq!(read(&[("OTEL_TRACES_SAMPLER", "nonsense")]), Ok(None));
        assert_eq!(read(&[ENDPOINT, ("OTEL_SDK_DISABLED", "TRUE")]), Ok(None));
        assert_eq!(
            read(&[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")]),
            Ok(None)
        );
        let settings = read(&[ENDPOINT]).unwrap().unwrap();
        assert_eq!((settings.deadline, settings.delay), (DEADLINE, DELAY));
        assert_eq!(settings.ca, None);
    }

    #[test]
    fn what_is_for_traces_alone_goes_first() {
        let settings = read(&[
            ENDPOINT,
            (
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
                "https://traces.example/in",
            ),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1500"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/etc/ca.pem"),
            ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ]);
        let settings = settings.unwrap().unwrap();
        assert_eq!(settings.endpoint.as_str(), "https://traces.example/in");
        assert_eq!(settings.deadline, Duration::from_millis(1500));
        assert_eq!(settings.ca, Some("/etc/ca.pem".into()));
    }

    #[test]
    fn a_fault_names_the_variable_and_not_its_value() {
        for (variable, value) in [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector-x:4318"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://me:pass-x@c.example"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc-x"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10-x"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
            ("OTEL_BSP_SCHEDULE_DELAY", "5-x"),
            ("OTEL_TRACES_EXPORTER", "zipkin-x"),
            ("OTEL_TRACES_SAMPLER", "jaeger-x"),
        ] {
            let line = read(&[(variable, value), ENDPOINT]).unwrap_err();
            assert!(line.starts_with(variable), "{line}");
            assert!(!line.contains("-x"), "{line}");
        }
        let line = read(&[ENDPOINT, ("OTEL_TRACES_SAMPLER", "traceidratio")]).unwrap_err();
        assert!(line.starts_with("OTEL_TRACES_SAMPLER_ARG"), "{line}");
    }
}
