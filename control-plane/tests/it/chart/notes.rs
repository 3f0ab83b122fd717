//! What `helm install` says at its end.

use ambient_testing::cluster::{ADMIN, Cluster};

use super::*;

fn notes(values: &[&str]) -> String {
    let (chart, minimal) = (chart(), value_set("minimal"));
    let mut arguments = vec!["install", "ambient", chart.to_str().unwrap()];
    arguments.extend(["--dry-run=client", "--namespace", "chart-notes"]);
    arguments.extend(["--values", minimal.to_str().unwrap()]);
    // Other tests' objects may be there.
    arguments.extend(["--set", "rbac.create=false"]);
    for value in values {
        arguments.extend(["--set-json", value]);
    }
    let helm = Helm::of_cluster(&Cluster::shared().kubeconfig(ADMIN));
    let said = helm.run(&arguments).unwrap();
    let (_, notes) = said.split_once("NOTES:").expect("notes");
    notes.to_owned()
}

#[test]
fn a_token_that_all_sessions_share_is_warned_of() {
    let warning = "WARNING: sessions get the control plane's own API token";
    let idp = r#"credential={"apiToken": {"existingSecret": ""}, "oidc": {
        "tokenUrl": "https://idp.example", "clientId": "me",
        "clientSecret": {"existingSecret": "idp"}}}"#;
    for (values, is_shared) in [
        (&[][..], true),
        (&[r#"tokens.issuer="static""#][..], true),
        (&[r#"tokens.issuer="minted""#][..], false),
        (&[idp][..], false),
    ] {
        let said = notes(values);
        assert_eq!(said.contains(warning), is_shared, "{values:?}: {said}");
    }
}
