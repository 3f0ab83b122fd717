use super::*;

fn parse(arguments: &[&str]) -> Result<Settings, String> {
    let all = std::iter::once("ambient-sidecar").chain(arguments.iter().copied());
    match Settings::from_arguments(all.map(Into::into)) {
        Ok(settings) => Ok(settings),
        Err(NoSettings::Invalid(InvalidSettings(line))) => Err(line),
        Err(NoSettings::Asked(text)) => panic!("{text}"),
    }
}

fn fault(arguments: &[&str]) -> String {
    let line = parse(arguments).unwrap_err();
    assert!(!line.contains('\n'), "{line}");
    line
}

#[test]
fn grpc_goes_to_the_upstream_unless_told() {
    let settings = parse(&["--upstream", "https://api.example/"]).unwrap();
    assert_eq!(settings.grpc_upstream, settings.upstream);
    assert_eq!(settings.upstream.to_string(), "https://api.example");
    assert!(!settings.require_header);
    let settings = parse(&[
        "--upstream",
        "https://api.example",
        "--grpc-upstream",
        "http://127.0.0.1:8001",
        "--require-header",
    ])
    .unwrap();
    assert_eq!(settings.grpc_upstream.to_string(), "http://127.0.0.1:8001");
    assert!(settings.require_header);
}

#[test]
fn every_fault_names_its_setting_and_no_secret() {
    let upstream = ["--upstream", "http://api.example"];
    let with = |more: &[&str]| fault(&[&upstream[..], more].concat());

    assert!(fault(&[]).contains("AMBIENT_UPSTREAM_URL"));
    let line = fault(&["--upstream", "http://user:hunter2@api.example"]);
    assert!(
        line.starts_with("AMBIENT_UPSTREAM_URL: ") && !line.contains("hunter2"),
        "{line}"
    );
    assert!(fault(&["--upstream", "ftp://api.example"]).contains("http or https"));
    assert!(fault(&["--upstream", "http://api.example/?a=b"]).contains("query"));
    let line = with(&["--proxy-listen", "0.0.0.0:80"]);
    assert!(
        line.contains("AMBIENT_PROXY_LISTEN") && line.contains("loopback"),
        "{line}"
    );
    assert!(with(&["--endpoint-listen", "here"]).contains("AMBIENT_ENDPOINT_LISTEN"));
    assert!(with(&["--log-level", "loud"]).contains("LOG_LEVEL"));
    assert!(with(&["--require-header=maybe"]).contains("AMBIENT_REQUIRE_HEADER"));
    assert!(with(&["--token-file", "/"]).contains("AMBIENT_BOT_TOKEN_FILE"));
    let line = with(&["--session-id", "seven77"]);
    assert!(
        line.starts_with("SESSION_ID: ") && !line.contains("seven77"),
        "{line}"
    );
    let line = with(&[
        "--cp-token-url",
        "http://u:hunter2@x",
        "--cp-token-public-key",
        "x",
    ]);
    assert!(
        line.contains("AMBIENT_CP_TOKEN_URL: ") && line.contains("_PUBLIC_KEY: "),
        "{line}"
    );
    assert!(!line.contains("hunter2"), "{line}");
    let line = with(&[
        "--proxy-listen",
        "127.0.0.1:7000",
        "--admin-listen",
        "127.0.0.1:7000",
    ]);
    assert!(line.contains("both"), "{line}");
}

#[test]
fn token_is_fetched_only_where_no_folder_is_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let there = dir.path().join("bot-token").display().to_string();
    let gone = dir.path().join("gone/bot-token").display().to_string();
    let run = |file: &str| {
        parse(&[
            "--upstream",
            "http://api.example",
            "--token-file",
            file,
            "--cp-token-url",
            "http://cp.example/token",
        ])
    };

    assert!(matches!(run(&there).unwrap().source, Source::File(_)));
    let line = run(&gone).unwrap_err();
    assert!(
        line.contains("AMBIENT_CP_TOKEN_PUBLIC_KEY is missing") && line.contains("SESSION_ID"),
        "{line}"
    );
}
