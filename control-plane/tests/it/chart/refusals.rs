//! Wrong, unknown and contradictory values are refused, with a sentence.

use super::*;

#[track_caller]
fn refused(values: &[&str], why: &str) {
    let minimal = value_set("minimal");
    let rendered = Helm::offline().template(NAMESPACE, &[&minimal], values);
    let error = rendered.expect_err(&format!("{values:?} were taken"));
    assert!(error.contains(why), "{values:?}: {error}");
}

#[test]
fn what_the_schema_does_not_know_is_refused() {
    for (values, why) in [
        (
            r#"replicas="two""#,
            "at '/replicas': got string, want integer",
        ),
        ("replicas=-1", "at '/replicas': minimum: got -1, want 0"),
        ("replica=3", "additional properties 'replica' not allowed"),
        (
            r#"tokens={"isuer": "minted"}"#,
            "at '/tokens': additional properties 'isuer' not allowed",
        ),
        (
            r#"tokens.issuer="magic""#,
            "at '/tokens/issuer': value must be one of '', 'minted', 'oidc', 'static'",
        ),
        (r#"image.digest="sha256:abc""#, "at '/image/digest'"),
        (r#"api.url="ftp://api""#, "at '/api/url'"),
        (r#"api.url="https://user:word@api""#, "at '/api/url'"),
        (r#"api.grpcAddress="api""#, "at '/api/grpcAddress'"),
        (r#"leaseDuration="soon""#, "at '/leaseDuration'"),
        (
            r#"podLabels={"a": 1}"#,
            "at '/podLabels/a': got number, want string",
        ),
        (
            r#"commonLabels={"app.kubernetes.io/name": "a"}"#,
            "at '/commonLabels/app.kubernetes.io~1name'",
        ),
        (r#"podLabels={"app": "a"}"#, "at '/podLabels/app'"),
        (
            r#"metrics.podMonitor.labels={"helm.sh/chart": "a"}"#,
            "at '/metrics/podMonitor/labels/helm.sh~1chart'",
        ),
        (
            r#"commonAnnotations={"helm.sh/hook": "a"}"#,
            "at '/commonAnnotations/helm.sh~1hook'",
        ),
        (
            r#"podAnnotations={"checksum/pod-template": "a"}"#,
            "at '/podAnnotations/checksum~1pod-template'",
        ),
        (r#"proxy.http="proxy.example""#, "at '/proxy/http'"),
        (r#"proxy.https="ftp://proxy.example""#, "at '/proxy/https'"),
        ("extraEnv=[{}]", "missing property 'name'"),
        ("service.port=70000", "at '/service/port'"),
        (
            r#"sessions.podTemplate={"pod": {}}"#,
            "additional properties 'pod'",
        ),
    ] {
        refused(&[values], why);
    }
}

#[test]
fn what_contradicts_itself_is_refused() {
    let idp = r#"credential.oidc={"tokenUrl": "https://idp.example", "clientId": "me",
        "clientSecret": {"existingSecret": "idp"}}"#;
    let no_token = r#"credential.apiToken.existingSecret="""#;
    let cases: &[(&[&str], &str)] = &[
        (
            &[idp],
            "both credential.apiToken and credential.oidc are set",
        ),
        (&[no_token], "no credential for the session API"),
        (
            &[no_token, r#"credential.oidc.clientId="me""#],
            "credential.oidc needs all of",
        ),
        (
            &[r#"credential.apiToken.value="hush""#],
            "credential.apiToken has both existingSecret and value",
        ),
        (
            &[r#"tokens.issuer="oidc""#],
            "tokens.issuer is oidc, which needs",
        ),
        (
            &[no_token, idp, r#"tokens.issuer="static""#],
            "tokens.issuer is static, which needs",
        ),
        (
            &[r#"tokens.life="5m""#],
            "tokens.life is for minted tokens only",
        ),
        (&["tls.enabled=true"], "tls.enabled has no certificate"),
        (
            &["tls.enabled=true", "tls.certManager.enabled=true"],
            "needs tls.certManager.issuerRef.name",
        ),
        (
            &["tls.enabled=true", r#"tls.existingSecret="x""#],
            "say by which CA runners know it",
        ),
        (
            &[
                "tls.enabled=true",
                r#"tls.existingSecret="x""#,
                "tls.openshiftServiceCa=true",
            ],
            "tls has more than one certificate",
        ),
        (&[r#"tls.existingSecret="x""#], "tls.enabled is false"),
        (&[r#"tls.ca.secret="x""#], "tls.ca says what runners trust"),
        (&["tls.ca.public=true"], "tls.ca says what runners trust"),
        (
            &[
                r#"credential.apiToken={"existingSecret": "", "value": "hush", "key": "x"}"#,
                r#"sessions.anthropicApiKey={"value": "hush", "key": "x"}"#,
            ],
            "under the same key, x",
        ),
        (
            &[r#"keys.externalSecret={"target": {"name": "x"}}"#],
            "keys.externalSecret has a target",
        ),
        (
            &[
                "tls.enabled=true",
                "tls.openshiftServiceCa=true",
                r#"tls.ca={"public": true, "secret": "x"}"#,
            ],
            "tls.ca is more than one",
        ),
        (
            &[r#"platform.mode="mpp""#],
            "which needs platform.mppConfigNamespace",
        ),
        (
            &[r#"platform.mppConfigNamespace="x""#],
            "platform.mode is not mpp",
        ),
        (
            &[
                "replicas=1",
                r#"podDisruptionBudget={"minAvailable": 1, "maxUnavailable": ""}"#,
            ],
            "no node could be drained",
        ),
        (
            &[r#"podDisruptionBudget={"minAvailable": "51%", "maxUnavailable": ""}"#],
            "no node could be drained",
        ),
        (
            &["podDisruptionBudget.maxUnavailable=0"],
            "no node could be drained",
        ),
        (
            &[r#"podDisruptionBudget={"minAvailable": "100%", "maxUnavailable": ""}"#],
            "no node could be drained",
        ),
        (&["podDisruptionBudget.minAvailable=1"], "empty one of them"),
        (&["rollingUpdate.maxSurge=0"], "no update could be made"),
        (
            &["preStopSeconds=30"],
            "terminationGracePeriodSeconds is shorter",
        ),
        (&["apiServer.enabled=true"], "leave api.url"),
        (
            &[
                "apiServer.enabled=true",
                r#"api={"url": "", "grpcAddress": ""}"#,
                no_token,
                idp,
            ],
            "apiServer.enabled needs credential.apiToken",
        ),
        (
            &[
                "apiServer.enabled=true",
                r#"api={"url": "", "grpcAddress": ""}"#,
                "tls.enabled=true",
                "tls.openshiftServiceCa=true",
                r#"apiServer.jwks=["http://keys.example", "https://idp.example/keys"]"#,
            ],
            "name the CA of apiServer.jwks in trustedCas",
        ),
        (&[r#"api.url="""#], "no session API"),
        (
            &[
                "metrics.serviceMonitor.enabled=true",
                "metrics.podMonitor.enabled=true",
            ],
            "both metrics.serviceMonitor and metrics.podMonitor",
        ),
        (
            &[
                "metrics.podMonitor.enabled=true",
                r#"networkPolicy.monitoringNamespace="""#,
            ],
            "networkPolicy lets nobody to their port",
        ),
        (
            &["serviceAccount.create=false"],
            "needs serviceAccount.name",
        ),
        (
            &[r#"extraEnv=[{"name": "CP_TOKEN_URL", "value": "x"}]"#],
            "extraEnv sets CP_TOKEN_URL, which another value sets already",
        ),
        (&[r#"global.imageRegistry="""#], "say where your images are"),
    ];
    for (values, why) in cases {
        refused(values, why);
    }
}

#[test]
fn what_lets_a_pod_go_is_taken() {
    let minimal = value_set("minimal");
    render(&[&minimal], &["replicas=1"]);
    let share = r#"podDisruptionBudget={"minAvailable": "50%", "maxUnavailable": ""}"#;
    render(&[&minimal], &[share]);
    let share = share.replace("50%", "51%");
    render(&[&minimal], &["replicas=3", &share]);
}

#[test]
fn an_old_kubernetes_is_refused() {
    let minimal = value_set("minimal");
    let chart = chart();
    let arguments = [
        "template",
        "ambient",
        chart.to_str().unwrap(),
        "--kube-version=1.32.0",
        "--values",
        minimal.to_str().unwrap(),
    ];
    let error = Helm::offline().run(&arguments).unwrap_err();
    assert!(
        error.contains("requires kubeVersion: >=1.33.0-0"),
        "{error}"
    );
}
