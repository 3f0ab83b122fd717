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
fn sources_of_keys_are_urls_or_files() {
    assert!(matches!("/a/b.json".parse(), Ok(JwksSource::File(_))));
    assert!(matches!("https://idp/jwks".parse(), Ok(JwksSource::Url(_))));
    for bad in ["", "ftp://idp/jwks", "http://", "https://user:pw@idp/jwks"] {
        let error = bad.parse::<JwksSource>().unwrap_err().to_string();
        assert!(!error.contains("pw"), "{error}");
    }
}
