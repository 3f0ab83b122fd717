//! Who may reach whom, as the `NetworkPolicy` objects say.

use serde_json::json;

use super::*;

fn policies(objects: &[Value]) -> impl Iterator<Item = &Value> {
    objects
        .iter()
        .filter(|it| text(it, "/kind") == "NetworkPolicy")
}

fn policy<'a>(objects: &'a [Value], name: &str) -> &'a Value {
    let mut found = policies(objects).filter(|it| text(it, "/metadata/name") == name);
    found.next().unwrap_or_else(|| panic!("no policy {name}"))
}

/// All rules of a policy.
fn rules(policy: &Value) -> Vec<&Value> {
    let of = |way: &str| policy["spec"][way].as_array().into_iter().flatten();
    of("ingress").chain(of("egress")).collect()
}

/// Ports that anybody may be called at.
fn open_ports(policy: &Value) -> Vec<&Value> {
    let rules = rules(policy).into_iter();
    let open = rules.filter(|it| it["to"].is_null() && it["from"].is_null());
    let ports = open.flat_map(|it| it["ports"].as_array().unwrap());
    ports.map(|it| &it["port"]).collect()
}

#[test]
fn every_rule_names_its_ports() {
    let mut seen = 0;
    for (name, values) in all_values() {
        for policy in policies(&render(&[&values], &[])) {
            for rule in rules(policy) {
                let ports = rule["ports"].as_array().map_or(&[][..], Vec::as_slice);
                let named = ports.iter().all(|it| !it["port"].is_null());
                assert!(!ports.is_empty() && named, "{name}: {rule}");
                seen += 1;
            }
        }
    }
    assert!(seen > 50, "{seen}");
}

#[test]
fn a_proxy_is_reached_at_its_port_alone() {
    for (proxy, port) in [
        ("http://proxy.example", 80),
        ("https://proxy.example/", 443),
        ("http://user:word@proxy.example", 80),
        ("http://[fd00::1]", 80),
        ("https://proxy.example:3128", 3128),
        ("proxy.example:3129", 3129),
        ("[fd00::1]:3130", 3130),
    ] {
        let value = format!("proxy.https={}", json!(proxy));
        let objects = render(&[&value_set("minimal")], &[&value]);
        let policy = policy(&objects, "ambient-control-plane");
        assert_eq!(*open_ports(policy).last().unwrap(), port, "{proxy}");
    }
}

#[test]
fn names_are_asked_of_the_cluster_and_of_a_cache_on_the_node() {
    let objects = render(&[&value_set("whole")], &[]);
    for policy in policies(&objects) {
        let names = &policy["spec"]["egress"][0];
        let peers = names["to"].as_array().unwrap();
        assert!(
            peers.contains(&json!({"ipBlock": {"cidr": "169.254.0.0/16"}})),
            "{policy}"
        );
        let ports: Vec<_> = names["ports"].as_array().unwrap().iter().collect();
        assert!(ports.iter().all(|it| it["port"] == 53), "{policy}");
    }
}

#[test]
fn what_is_said_of_egress_holds_for_all_pods() {
    let collector =
        r#"networkPolicy.egress.extra=[{"ports": [{"port": 4318, "protocol": "TCP"}]}]"#;
    let objects = render(&[&value_set("whole")], &[collector]);
    assert_eq!(policies(&objects).count(), 3);
    for policy in policies(&objects) {
        assert!(open_ports(policy).contains(&&json!(4318)), "{policy}");
    }
    let objects = render(
        &[&value_set("whole")],
        &["networkPolicy.egress.enabled=false"],
    );
    for policy in policies(&objects) {
        assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress"]));
        assert!(policy["spec"]["egress"].is_null(), "{policy}");
    }
}
