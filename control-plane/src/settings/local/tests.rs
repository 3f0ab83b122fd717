use clap::Parser as _;

use super::{super::values::LOOPBACK, *};

/// Settings of `ambient-control-plane ARGUMENTS` with this environment (secrets included).
fn local(arguments: &[&str], variables: &[(&str, &str)]) -> Result<LocalSettings, Vec<String>> {
    let arguments = std::iter::once("ambient-control-plane").chain(arguments.iter().copied());
    let parsed =
        raw::Arguments::try_parse_from(arguments).map_err(|error| vec![error.to_string()])?;
    let Some(raw::Verb::Local(local)) = parsed.command else {
        panic!("not local");
    };
    let environment = |name: &str| {
        variables
            .iter()
            .find(|(variable, _)| *variable == name)
            .map(|(_, value)| (*value).to_owned())
    };
    let secrets = Secrets {
        api_token: environment("AMBIENT_API_TOKEN").map(Into::into),
        oidc_client_secret: environment("OIDC_CLIENT_SECRET").map(Into::into),
        anthropic_api_key: None,
    };
    let log = LogSettings {
        level: parsed.log.log_level.unwrap_or_default(),
        format: parsed.log.log_format,
    };
    let mut faults = Faults::default();
    let settings = check(*local, secrets, log, environment, &mut faults);
    if faults.0.is_empty() {
        Ok(settings)
    } else {
        Err(faults.0)
    }
}

fn faults(arguments: &[&str]) -> Vec<String> {
    local(arguments, &[("HOME", "/home/me")]).unwrap_err()
}

#[test]
fn local_has_fixed_ports_and_a_folder_of_the_user() {
    let settings = local(&["local"], &[("HOME", "/home/me")]).unwrap();
    assert_eq!(settings.mode, Mode::Serve);
    assert_eq!(
        settings.data_dir,
        Some("/home/me/.local/state/ambient".into())
    );
    for (listen, port) in [
        (settings.api_listen, 8000),
        (settings.grpc_listen, 8001),
        (settings.token_listen, 8080),
    ] {
        let address = ([127, 0, 0, 1], port).into();
        let asked = false;
        assert_eq!(listen, Listen { address, asked });
    }
    assert_eq!(settings.refresh, Interval::Auto);
    assert!(matches!(
        settings.issuer,
        IssuerSettings::Minted {
            life: DEFAULT_TOKEN_TTL
        }
    ));
    let xdg = local(&["local"], &[("HOME", "/h"), ("XDG_STATE_HOME", "/state")]).unwrap();
    assert_eq!(xdg.data_dir, Some("/state/ambient".into()));
    let neither = local(&["local"], &[]).unwrap_err();
    assert!(neither[0].starts_with("--data-dir: "), "{neither:?}");
}

#[test]
fn run_takes_flags_before_and_behind_the_word() {
    for arguments in [
        [
            "local",
            "--token-ttl",
            "6s",
            "--data-dir",
            "/d",
            "run",
            "--",
            "cmd",
            "--x",
        ],
        [
            "local",
            "run",
            "--token-ttl",
            "6s",
            "--data-dir",
            "/d",
            "--",
            "cmd",
            "--x",
        ],
        [
            "local",
            "--data-dir",
            "/d",
            "run",
            "--token-ttl",
            "6s",
            "--",
            "cmd",
            "--x",
        ],
    ] {
        let settings = local(&arguments, &[]).unwrap();
        assert_eq!(
            settings.mode,
            Mode::Run {
                command: vec!["cmd".to_owned(), "--x".to_owned()],
                io: AgentIo::Lines,
                turns: 0
            },
            "{arguments:?}"
        );
        assert_eq!(settings.data_dir, Some("/d".into()));
        assert_eq!(settings.api_listen.address.port(), 0);
        assert!(matches!(settings.issuer, IssuerSettings::Minted { life } if life.as_secs() == 6));
    }
}

#[test]
fn the_agents_own_flags_are_the_agents() {
    let settings = local(
        &[
            "local",
            "run",
            "--io",
            "stream-json",
            "--turns",
            "2",
            "--",
            "a",
            "--data-dir",
            "/mine",
        ],
        &[],
    )
    .unwrap();
    assert_eq!(settings.data_dir, None);
    let Mode::Run { command, io, turns } = settings.mode else {
        panic!("not run");
    };
    assert_eq!(command, ["a", "--data-dir", "/mine"]);
    assert_eq!((io, turns), (AgentIo::StreamJson, 2));
}

#[test]
fn every_fault_is_a_line_that_names_its_setting() {
    let found = faults(&[
        "local",
        "--demo",
        "--token-ttl",
        "1s",
        "--refresh-interval",
        "sometimes",
        "--api-listen",
        "here",
        "--agent-command",
        "[]",
        "--cp-rate-limits",
        "maybe",
        "--cp-token-issuer",
        "magic",
        "--jwks",
        "ftp://idp/keys",
    ]);
    let names: Vec<_> = found
        .iter()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(
        names,
        [
            "--api-listen",
            "--token-ttl",
            "--refresh-interval",
            "--token-ttl",
            "CP_TOKEN_ISSUER",
            "AGENT_COMMAND",
            "AMBIENT_JWKS",
            "CP_RATE_LIMITS",
        ]
    );
    assert!(found.iter().all(|line| !line.contains('\n')));
}

#[test]
fn contradictions_are_refused() {
    let doubled = faults(&["local", "--api-listen", "127.0.0.1:8080"]);
    assert!(
        doubled[0].starts_with("--token-listen: 127.0.0.1:8080 is taken"),
        "{doubled:?}"
    );
    let both = faults(&["local", "--demo", "run", "--", "cmd"]);
    assert!(both[0].starts_with("--demo: "), "{both:?}");
    let turns = faults(&["local", "run", "--turns", "1", "--", "cmd"]);
    assert!(turns[0].starts_with("--turns: "), "{turns:?}");
    let life = local(
        &["local", "--cp-token-issuer", "static", "--token-ttl", "1m"],
        &[("HOME", "/h"), ("AMBIENT_API_TOKEN", "t")],
    );
    assert!(life.unwrap_err()[0].starts_with("--token-ttl: "));
}

#[test]
fn other_issuers_need_their_settings() {
    let home = ("HOME", "/h");
    let fixed = local(&["local", "--cp-token-issuer", "static"], &[home]);
    assert!(fixed.unwrap_err()[0].starts_with("AMBIENT_API_TOKEN: "));
    let oidc = local(&["local", "--cp-token-issuer", "oidc"], &[home]).unwrap_err();
    for name in [
        "OIDC_TOKEN_URL",
        "OIDC_CLIENT_ID",
        "OIDC_CLIENT_SECRET",
        "AMBIENT_JWKS",
    ] {
        assert!(
            oidc.iter().any(|line| line.starts_with(name)),
            "{name}: {oidc:?}"
        );
    }
    let complete = local(
        &[
            "local",
            "--cp-token-issuer",
            "oidc",
            "--oidc-token-url",
            "https://idp/token",
            "--oidc-client-id",
            "me",
            "--jwks",
            "https://idp/keys",
        ],
        &[home, ("OIDC_CLIENT_SECRET", "hunter2")],
    )
    .unwrap();
    assert!(matches!(complete.issuer, IssuerSettings::Oidc { .. }));
    assert!(!format!("{complete:?}").contains("hunter2"));
}

#[test]
fn only_named_variables_reach_sessions() {
    let settings = local(
        &["local"],
        &[
            ("HOME", "/h"),
            ("PATH", "/bin"),
            ("AMBIENT_API_TOKEN", "secret"),
            ("NO_PROXY", "intern"),
        ],
    )
    .unwrap();
    assert_eq!(settings.passed_on["PATH"], "/bin");
    assert_eq!(settings.passed_on["NO_PROXY"], format!("intern,{LOOPBACK}"));
    assert!(!settings.passed_on.contains_key("AMBIENT_API_TOKEN"));
}

#[test]
fn addresses_are_loopback_unless_told() {
    assert_eq!(parse_listen(":8080"), Ok(([127, 0, 0, 1], 8080).into()));
    assert_eq!(parse_listen("0"), Ok(([127, 0, 0, 1], 0).into()));
    assert_eq!(parse_listen("0.0.0.0:1"), Ok(([0, 0, 0, 0], 1).into()));
    assert!(parse_listen("[::1]:1").is_ok());
    for bad in ["", "host:1", "127.0.0.1", "1.2.3.4:99999"] {
        assert!(parse_listen(bad).is_err(), "{bad}");
    }
}

#[test]
fn hash_is_that_of_the_logs() {
    let read = super::super::read(["ambient-control-plane", "hash", "abc"].map(Into::into));
    assert!(
        matches!(read, Ok(super::super::Action::Hash(hash)) if hash.to_string() == "ba7816bf8f01")
    );
}

#[test]
fn what_the_api_server_would_refuse_is_found_before_it_starts() {
    let arguments = [
        "local",
        "--jwks",
        "/no/such/file.json",
        "--admins",
        "system:admin",
    ];
    let faults = faults(&arguments);
    assert!(
        faults.iter().any(|line| line.starts_with("AMBIENT_JWKS: ")),
        "{faults:?}"
    );
    assert!(
        faults
            .iter()
            .any(|line| line.starts_with("AMBIENT_ADMINS: ")),
        "{faults:?}"
    );
}

#[test]
fn a_demo_that_could_not_show_its_renewals_is_refused() {
    for (arguments, setting) in [
        (["local", "--demo", "--token-ttl", "15m"], "--token-ttl: "),
        (
            ["local", "--demo", "--refresh-interval", "off"],
            "--refresh-interval: ",
        ),
        (
            ["local", "--demo", "--cp-token-issuer", "static"],
            "CP_TOKEN_ISSUER: ",
        ),
    ] {
        let faults = faults(&arguments);
        assert!(faults[0].starts_with(setting), "{faults:?}");
    }
    assert!(local(&["local", "--demo", "--token-ttl", "4s"], &[("HOME", "/h")]).is_ok());
}

#[test]
fn an_address_that_was_asked_for_is_told_from_a_default() {
    let settings = local(
        &["local", "--api-listen", "127.0.0.1:8000"],
        &[("HOME", "/h")],
    )
    .unwrap();
    assert!(settings.api_listen.asked);
    assert!(!settings.grpc_listen.asked);
}
