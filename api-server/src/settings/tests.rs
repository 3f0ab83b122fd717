use super::*;

fn usable() -> Settings {
    Settings {
        api_token: Some("service".to_owned().into()),
        ..Settings::default()
    }
}

#[test]
fn each_fault_is_a_line_that_names_its_variable() {
    assert_eq!(usable().faults(), Vec::<String>::new());
    let faults = Settings {
        rest_listen: ([127, 0, 0, 1], 8000).into(),
        grpc_listen: ([127, 0, 0, 1], 8000).into(),
        admin_listen: Some(([127, 0, 0, 1], 8000).into()),
        database: Database::File("/no/such/folder/ambient.db".into()),
        jwks: vec![JwksSource::File("/no/such/jwks.json".into())],
        api_token: Some("same".to_owned().into()),
        operator_token: Some("same".to_owned().into()),
        admins: vec!["system:admin".to_owned()],
        ..Settings::default()
    }
    .faults();
    let variables: Vec<_> = faults
        .iter()
        .filter_map(|fault| fault.split_once(": "))
        .map(|(variable, _)| variable)
        .collect();
    assert_eq!(
        variables,
        [
            "AMBIENT_GRPC_LISTEN",
            "AMBIENT_ADMIN_LISTEN",
            "AMBIENT_DATABASE",
            "AMBIENT_JWKS",
            "AMBIENT_OPERATOR_TOKEN",
            "AMBIENT_ADMINS"
        ]
    );
    assert!(!faults.concat().contains("same\""));
    assert_eq!(Settings::default().faults().len(), 1);
}

#[test]
fn files_of_keys_are_read_before_anything_starts() {
    let folder = tempfile::TempDir::new().unwrap();
    for (name, content, reason) in [
        ("broken.json", "{", "not a JWKS"),
        ("other.json", r#"{"kind": "List"}"#, "not a JWKS"),
        ("none.json", r#"{"keys": []}"#, "no key that can verify"),
        (
            "secret.json",
            r#"{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}"#,
            "no key that can verify",
        ),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let settings = Settings {
            jwks: vec![JwksSource::File(path)],
            ..usable()
        };
        let faults = settings.faults();
        assert_eq!(faults.len(), 1, "{name}: {faults:?}");
        for part in ["AMBIENT_JWKS: ", name, reason] {
            assert!(faults[0].contains(part), "{part} in {faults:?}");
        }
        assert!(!faults[0].contains("c2VjcmV0"));
    }
    // A file that is there but cannot be read, whoever asks.
    let unreadable = Settings {
        session_jwks: vec![JwksSource::File("/proc/self/mem".into())],
        ..usable()
    };
    let faults = unreadable.faults();
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert!(
        faults[0].starts_with("AMBIENT_SESSION_JWKS: "),
        "{faults:?}"
    );
    assert!(faults[0].contains("cannot read"), "{faults:?}");
}

#[test]
fn what_session_tokens_must_say_needs_keys_of_theirs() {
    let faults = Settings {
        session_issuer: vec!["https://control-plane.test".to_owned()],
        session_audience: vec!["ambient-api".to_owned()],
        ..usable()
    }
    .faults();
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert!(faults[0].starts_with("AMBIENT_SESSION_JWT_ISSUER: "));
    assert!(faults[1].starts_with("AMBIENT_SESSION_JWT_AUDIENCE: "));
}

#[test]
fn sources_of_keys_are_urls_or_files() {
    assert!(matches!("/a/b.json".parse(), Ok(JwksSource::File(_))));
    assert!(matches!("https://idp/jwks".parse(), Ok(JwksSource::Url(_))));
    for bad in ["", "ftp://idp/jwks", "http://", "https://user:pw@idp/jwks"] {
        let error = bad.parse::<JwksSource>().unwrap_err().to_string();
        assert!(!error.contains("pw"), "{error}");
    }
}
